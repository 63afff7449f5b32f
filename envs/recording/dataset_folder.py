"""A data set that takes long to make: it appears in one piece, and nothing that was done is done again.

OUTPUT.recording/lock             held by the one process that works there
OUTPUT.recording/settings.json    what is being made; a different request is refused
OUTPUT.recording/episodes/        what is done, each file put in place by one rename
OUTPUT.recording/dataset/         the data set being put together, from episode 0 at every start
OUTPUT/                           the data set, put in place by one rename at the end
OUTPUT.recording/before/          a shorter one that was there, from the end until OUTPUT.recording is deleted
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LOCK = "lock"


@dataclass
class DatasetFolder:
    """Where a data set is made, and where it will be.

    Attributes:
        output: folder of the finished data set.
        activity, made: for names and messages, e.g. `recording` and `recorded`.
        record: file of the finished data set that holds (at least) what was requested.
    """

    output: Path
    activity: str
    made: str
    record: str
    _lock: IO[str] | None = field(default=None, init=False, repr=False)

    @property
    def work(self) -> Path:
        """Holds everything until the data set is finished."""
        return self.output.with_name(f"{self.output.name}.{self.activity}")

    @property
    def episodes(self) -> Path:
        return self.work / "episodes"

    @property
    def dataset(self) -> Path:
        return self.work / "dataset"

    @property
    def existing(self) -> dict[str, Any] | None:
        """What the finished data set says about itself; None: there is none. ValueError: there is something else."""
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        found = self.output / self.record
        if not found.is_file():
            raise ValueError(f"{self.output} exists and was not {self.made} by this command; choose another output")
        return json.loads(found.read_text())

    def is_finished(self, request: dict[str, Any]) -> bool:
        """Whether the data set is there; ValueError when the folder holds another one, or something else."""
        if (existing := self.existing) is None:
            return False
        changed = _changed(existing, request)
        if changed:
            was = ", ".join(f"{key}={existing.get(key)!r}" for key in changed)
            raise ValueError(
                f"{self.output} was {self.made} with {was}; choose another output, or delete it to start anew"
            )
        return True

    def prepare(self, request: dict[str, Any], resume: bool) -> None:
        """Make the folder of work, or keep the one that is there.

        ValueError when that is of another request, or when another process works there.
        """
        self._hold()
        if not resume:
            for content in self.work.iterdir():
                if content.name != LOCK:
                    shutil.rmtree(content) if content.is_dir() else content.unlink()
        self.episodes.mkdir(parents=True, exist_ok=True)
        for leftover in self.episodes.glob(".*"):
            leftover.unlink()
        shutil.rmtree(self.dataset, ignore_errors=True)
        path = self.work / "settings.json"
        if path.exists():
            changed = _changed(json.loads(path.read_text()), request)
            if changed:
                raise ValueError(
                    f"{self.work} holds an unfinished {self.activity} with another {', '.join(changed)}; finish that "
                    "one, choose another output, or start anew with resume=false"
                )
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(request, indent=1))
        os.replace(temporary, path)

    def _hold(self) -> None:
        """Until this process ends, however it ends, or `publish`."""
        self.work.mkdir(parents=True, exist_ok=True)
        lock = (self.work / LOCK).open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"another process works in {self.work}; wait for it, or choose another output") from None
        self._lock = lock

    def publish(self, record: dict[str, Any], instead: bool = False) -> None:
        """Put the finished data set in its place; with `instead`, the one that is there makes room."""
        (self.dataset / self.record).write_text(json.dumps(record, indent=1))
        if instead:
            os.replace(self.output, self.work / "before")
        elif self.output.is_dir():
            self.output.rmdir()  # empty, or `is_finished` would have refused it
        os.replace(self.dataset, self.output)
        shutil.rmtree(self.work)
        if self._lock is not None:
            self._lock.close()


def _changed(existing: dict[str, Any], request: dict[str, Any]) -> list[str]:
    wanted = json.loads(json.dumps(request))  # what was read has lists for tuples
    return [key for key in wanted if existing.get(key) != wanted[key]]
