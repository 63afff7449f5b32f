"""Run the parts of a GPU report, each in a process of its own that is killed at the part's limit.

A part is a function that returns its tasks by name; a task yields rows. An error in a task becomes a row. If the
process dies, the task is noted as failed and a new process goes on with the next one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from cogvla.policy.cost.variants import NotMeasuredError
from cogvla.processes import Child, ProcessDiedError, send
from cogvla.scripts.measure.gpu.journal import Journal, Row
from cogvla.scripts.measure.gpu.settings import Settings

Task = Callable[[], Iterable[Row]]
Tasks = Callable[[Settings], Mapping[str, Task]]
BEGIN, ROW, END, FINISHED = "begin", "row", "end", "finished"


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


def run_part(part: Part, settings: Settings, journal: Journal, say: Callable[[str], None] = print) -> None:
    """Run the tasks of a part that are not done yet, until its limit."""
    limit = dict(settings.limits).get(part.name, part.limit)
    started = time.monotonic()
    done = journal.begin(part.name)
    note: str | None = None
    while note is None:
        note = _run_process(part, settings, journal, done, started + limit, say)
    seconds = time.monotonic() - started
    if note:
        note = note.format(limit=f"{limit:g} s")
        say(f"{part.name}: {note}")
    journal.end(part.name, seconds, note)


def _run_process(
    part: Part, settings: Settings, journal: Journal, done: set[str], deadline: float, say: Callable[[str], None]
) -> str | None:
    """Run tasks in one process, and add those that end to `done`.

    Returns:
        "" when all tasks are done; why the part stops; or None if the process died and another one can go on.
    """
    child, running = Child(serve, (part.tasks, settings, done)), ""
    try:
        while True:
            if not child.connection.poll(max(0.0, deadline - time.monotonic())):
                return "stopped at its limit of {limit}" + (f", in {running}" if running else "")
            kind, content = child.receive()
            if kind == FINISHED:
                return ""
            if kind == BEGIN:
                running = content
                journal.begin_task(part.name, running)
            elif kind == ROW:
                journal.add(part.name, running, content)
                say(f"{part.name}: {_line(content, part)}")
            else:
                journal.end_task(part.name, running)
                done.add(running)
                running = ""
    except ProcessDiedError as error:
        if not running:
            return f"its process died: {error}"
        journal.add(part.name, running, failure(running, f"the process died: {error}"))
        journal.end_task(part.name, running)
        done.add(running)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)  # with the processes that compile for it
        child.close()


def serve(connection: Connection) -> None:
    """Run the tasks of a part in this process; the first message says which."""
    tasks, settings, done = connection.recv()
    torch.set_num_threads(settings.threads)
    for name, task in tasks(settings).items():
        if name in done:
            continue
        send(connection, (BEGIN, name))
        for row in attempt(name, task):
            send(connection, (ROW, row))
        send(connection, (END, name))
        gc.collect()
        if settings.device.startswith("cuda"):
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
