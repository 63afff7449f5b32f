"""The results of a GPU report: a JSON file that is written again, atomically, after every row."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from cogvla.files import write_atomic
from cogvla.policy.provenance import provenance

FILE = "gpu_report.json"
FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"
Row = dict[str, Any]


class Journal:
    """Rows by part and task; a folder that has some already is continued.

    Args:
        folder: folder of the report.
        rehearse: whether this is a rehearsal.
        fresh: forget the results in the folder.

    Raises:
        ValueError: the folder holds a report that this one must not continue.
    """

    def __init__(self, folder: Path, rehearse: bool, fresh: bool = False) -> None:
        self.path = folder / FILE
        about = {**provenance(), "rehearse": rehearse}
        self.body: dict[str, Any] = {**about, "parts": {}}
        if self.path.is_file() and not fresh:
            try:
                before = json.loads(self.path.read_text())
                parts, of = before["parts"], (before["rehearse"], before["machine"]["gpus"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} is no GPU report ({error}): give another --output, or --fresh"
                ) from error
            if of != (rehearse, about["machine"]["gpus"]):
                raise ValueError(
                    f"{self.path} is from another machine, or one of both is a rehearsal: give another --output, or "
                    "--fresh to start anew"
                )
            self.body["parts"] = parts
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, part: str) -> set[str]:
        """Start or continue a part; return the names of its tasks that are done."""
        known = self.part(part)
        tasks = {name: task for name, task in known["tasks"].items() if task["done"] and not _has(task, "missing")}
        self.body["parts"][part] = {**known, "state": RUNNING, "note": "", "tasks": tasks}
        self.write()
        return set(tasks)

    def begin_task(self, part: str, task: str) -> None:
        """Start a task."""
        commit = self.body["commit"]
        self.body["parts"][part]["tasks"][task] = {
            "done": False,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "commit": commit and commit["hash"][:7] + (" (modified)" if commit["modified"] else ""),
            "rows": [],
        }

    def add(self, part: str, task: str, row: Row) -> None:
        """Add a row of a task."""
        self.body["parts"][part]["tasks"][task]["rows"].append(row)
        self.write()

    def end_task(self, part: str, task: str) -> None:
        """Mark a task as done."""
        self.body["parts"][part]["tasks"][task]["done"] = True
        self.write()

    def end(self, part: str, seconds: float, note: str = "") -> None:
        """End a part; the note says why it is not finished."""
        known = self.part(part)
        state = STOPPED if note else FINISHED
        known.update(state=state, note=note, seconds=round(known["seconds"] + seconds, 1))
        self.body["parts"][part] = known
        self.write()

    def part(self, name: str) -> dict[str, Any]:
        """Return what is known about a part."""
        return self.body["parts"].get(name, {"state": "", "note": "", "seconds": 0.0, "tasks": {}})

    def rows(self, part: str) -> list[Row]:
        """Return all rows of a part that have numbers."""
        every = (row for task in self.part(part)["tasks"].values() for row in task["rows"])
        return [row for row in every if "missing" not in row]

    def complete(self, part: str) -> bool:
        """Return whether every row of a part is measured; the others may be possible by now, e.g. with a file."""
        return self._finished_without(part, "missing")

    def succeeded(self, part: str) -> bool:
        """Return whether a part came to its end, and no row failed that this machine could measure."""
        return self._finished_without(part, "failed")

    def _finished_without(self, part: str, key: str) -> bool:
        known = self.part(part)
        return known["state"] == FINISHED and not any(_has(task, key) for task in known["tasks"].values())

    def write(self) -> None:
        """Write the file."""
        write_atomic(self.path, json.dumps(self.body, indent=1) + "\n")


def _has(task: dict[str, Any], key: str) -> bool:
    return any(row.get(key) for row in task["rows"])
