"""Run the parts of a GPU report in a process that is killed when a part reaches its limit.

A part is a function that returns its tasks by name; a task yields rows. An error in a task becomes a row. If the
process dies, the task is noted as failed and a new process goes on with the next one. This file does not import torch,
and neither does the process before a part needs it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from cogvla.policy.cost.not_measured import NotMeasuredError
from cogvla.processes import Child, ProcessDiedError, send
from cogvla.scripts.measure.gpu.journal import Journal, Row
from cogvla.scripts.measure.gpu.settings import Settings

Task = Callable[[], Iterable[Row]]
Tasks = Callable[[Settings], Mapping[str, Task]]
READY, BEGIN, ROW, END, FINISHED = "ready", "begin", "row", "end", "finished"
START_S = 120.0
"""Longest time that a process may take to import everything; it does not count for the limit."""


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        name: name on the command line.
        title: heading in the report.
        tasks: function of a module that returns the tasks, most valuable first.
        limit: seconds after which the part is stopped.
        columns: key of a row -> heading of its column.
    """

    name: str
    title: str
    tasks: Tasks
    limit: float
    columns: Mapping[str, str]


class Worker:
    """A process that runs one part after the other; a new one is started after it was killed. Use it with `with`."""

    def __init__(self) -> None:
        self._child: Child | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def give(self, work: object) -> Child:
        """Send work for `serve`; return the process."""
        if self._child is None:
            self._child = Child(serve, work)
        else:
            self._child.send(work)
        return self._child

    def kill(self) -> None:
        """End the process, and those that compile for it."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.process.pid, signal.SIGKILL)
            self._child.close()
            self._child = None


def run_part(part: Part, settings: Settings, journal: Journal, worker: Worker) -> None:
    """Run the tasks of a part that are not done yet, until its limit."""
    limit = dict(settings.limits).get(part.name, part.limit)
    done, seconds = journal.begin(part.name), 0.0
    note: str | None = None
    while note is None:
        note, spent = _run_process(part, settings, journal, done, limit - seconds, worker)
        seconds += spent
    if note:
        note = note.format(limit=f"{limit:g} s")
        worker.kill()
        print(f"{part.name}: {note}", flush=True)
    journal.end(part.name, seconds, note)


def _run_process(
    part: Part, settings: Settings, journal: Journal, done: set[str], left: float, worker: Worker
) -> tuple[str | None, float]:
    """Run tasks in one process, and add those that end to `done`.

    Returns:
        "" when all tasks are done, or why the part stops, or None if the process died and another one can go on; and
        the seconds that the tasks took.
    """
    child, running = worker.give((part.tasks, settings, done)), ""
    started, patience = time.monotonic(), START_S
    try:
        while True:
            if not child.connection.poll(max(0.0, started + patience - time.monotonic())):
                return "stopped at its limit of {limit}" + (f", in {running}" if running else ""), left
            kind, content = child.receive()
            if kind == FINISHED:
                return "", time.monotonic() - started
            if kind == READY:
                started, patience = time.monotonic(), left
            elif kind == BEGIN:
                running = content
                journal.begin_task(part.name, running)
            elif kind == ROW:
                journal.add(part.name, running, content)
                print(f"{part.name}: {_line(content, part)}", flush=True)
            else:
                journal.end_task(part.name, running)
                done.add(running)
                running = ""
    except ProcessDiedError as error:
        worker.kill()
        if not running:
            return f"its process died: {error}", 0.0
        journal.add(part.name, running, failure(running, f"the process died: {error}"))
        journal.end_task(part.name, running)
        done.add(running)
        return None, time.monotonic() - started


def serve(connection: Connection) -> None:
    """Run the tasks of one part after the other in this process; messages say which."""
    while True:
        tasks, settings, done = connection.recv()
        torch = sys.modules.get("torch")  # loaded with the functions of the part, if they need it
        if torch is not None:
            torch.set_num_threads(settings.threads)
        send(connection, (READY, None))
        for name, task in tasks(settings).items():
            if name in done:
                continue
            send(connection, (BEGIN, name))
            for row in attempt(name, task):
                send(connection, (ROW, row))
            send(connection, (END, name))
            gc.collect()
            if torch is not None and settings.device.startswith("cuda"):
                torch.cuda.empty_cache()
        send(connection, (FINISHED, None))


def attempt(name: str, task: Task) -> Iterable[Row]:
    """Yield the rows of a task; an error becomes its last row."""
    try:
        yield from task()
    except NotMeasuredError as error:
        yield {"row": name, "missing": f"not measured: {error}"}
    except Exception as error:
        text = str(error).strip().splitlines()[:1] or [""]
        yield {**failure(name, f"{type(error).__name__}: {text[0]}"), "traceback": traceback.format_exc()[-3000:]}


def failure(name: str, text: str) -> Row:
    """Return the row of a task that failed; it is measured again by the next run."""
    return {"row": name, "missing": text, "failed": True}


def _line(row: Row, part: Part) -> str:
    if "missing" in row:
        return f"{row['row']}: {row['missing']}"
    numbers = (f"{heading} {number(row[key])}" for key, heading in part.columns.items() if key in row)
    return f"{row['row']}: " + ", ".join(numbers)


def number(value: object) -> str:
    """Format a value of a row for people."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)
