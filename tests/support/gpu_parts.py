"""Parts of a GPU report for tests of its runner."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from cogvla.policy.cost.not_measured import NotMeasuredError
from cogvla.scripts.measure.gpu.journal import Row
from cogvla.scripts.measure.gpu.runner import Part, Task
from cogvla.scripts.measure.gpu.settings import Settings

COLUMNS = {"value": "value"}


def mixed_tasks(settings: Settings) -> Mapping[str, Task]:
    """Tasks that work, fail, cannot be measured, and die; each notes in a file that it ran."""

    def good(name: str) -> Iterable[Row]:
        with (Path(settings.output) / "ran").open("a") as file:
            file.write(f"{name}\n")
        yield {"row": name, "value": 1.5}

    def failing() -> Iterable[Row]:
        yield from good("before")
        raise RuntimeError("CUDA out of memory\nand more")

    def impossible() -> Iterable[Row]:
        list(good("impossible"))
        raise NotMeasuredError("no FP8 here")

    def dying() -> Iterable[Row]:
        yield from good("dying")
        os.kill(os.getpid(), signal.SIGKILL)

    return {
        "first": lambda: good("first"),
        "failing": failing,
        "impossible": impossible,
        "dying": dying,
        "last": lambda: good("last"),
    }


def slow_tasks(settings: Settings) -> Mapping[str, Task]:
    """Two rows, then one that takes an hour unless the file `quick` is there."""

    def row(name: str) -> Iterable[Row]:
        yield {"row": name, "value": 2.5}
        if name == "second" and not (Path(settings.output) / "quick").exists():
            time.sleep(3600)

    return {name: lambda name=name: row(name) for name in ("first", "second", "third")}  # type: ignore[misc]


MIXED = Part("mixed", "Mixed", mixed_tasks, 300, COLUMNS)
SLOW = Part("slow", "Slow", slow_tasks, 300, COLUMNS)
