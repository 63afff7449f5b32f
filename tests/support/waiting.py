"""Wait for something that other threads or processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogvla.real_robot.bridge.bridge import Bridge


PATIENCE_S = 480.0
"""Long enough for a very busy machine, and below the time limit of a test."""


def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds; fail if it does not in `PATIENCE_S`."""
    last = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < last, "it did not happen in time"
        time.sleep(0.005)


def wait_ticks(bridge: Bridge, number: int = 4) -> None:
    """Return after so many control ticks of a bridge; all but the last have been shown to `on_tick`."""
    last = bridge.diagnostics()["tick"] + number
    until(lambda: bridge.diagnostics()["tick"] >= last)
