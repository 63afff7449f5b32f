"""Working folder of a data set that takes long to make: resumes after an interruption, publishes in one piece.

OUTPUT.recording/lock             lock of the one process that works there
OUTPUT.recording/settings.json    the request; a different request is refused
OUTPUT.recording/episodes/        finished episodes, each file put in place by one rename
OUTPUT.recording/dataset/         the unfinished data set, written from episode 0 at every start
OUTPUT/                           the finished data set, put in place by one rename
OUTPUT.recording/before/          the shorter data set that it replaces, until OUTPUT.recording is deleted
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cogvla.files import is_left_by_macos, read_object, write_atomic

LOCK, SETTINGS = "lock", "settings.json"
START_ANEW = "delete its folder to start anew"


@dataclass
class DatasetFolder:
    """Working folder and final folder of a data set.

    Attributes:
        output: folder of the finished data set.
        activity: name of the activity in file names and messages, e.g. `recording`.
        made: its past participle for messages, e.g. `recorded`.
        record: path, relative to `output`, of the JSON file that holds at least the request.
    """

    output: Path
    activity: str
    made: str
    record: str
    _lock: IO[str] | None = field(default=None, init=False, repr=False)

    @property
    def work(self) -> Path:
        """The working folder; it holds everything until the data set is finished."""
        return self.output.with_name(f"{self.output.name}.{self.activity}")

    @property
    def episodes(self) -> Path:
        return self.work / "episodes"

    @property
    def dataset(self) -> Path:
        return self.work / "dataset"

    @property
    def existing(self) -> dict[str, Any] | None:
        """The record of the finished data set, or None if there is none; ValueError if `output` is something else."""
        if not self.output.exists() or (self.output.is_dir() and all(map(is_left_by_macos, self.output.iterdir()))):
            return None
        found = self.output / self.record
        if not found.is_file():
            raise ValueError(
                f"{self.output} exists and was not {self.made} by this command, or another tool has edited it (it has "
                f"no {self.record}); choose another output, or train on it as it is (train_policy demonstrations=null)"
            )
        return read_object(found, START_ANEW)

    def is_finished(self, request: dict[str, Any], resume: bool = True, later: Mapping[str, Any] | None = None) -> bool:
        """Return True if the requested data set is finished.

        Args:
            request: everything that changes the data set.
            resume: False: it shall not be there.
            later: likewise, but a data set from before these keys fits any value.

        Raises:
            ValueError: `output` holds a data set of another request, or something else, or it shall not be resumed.
        """
        if (existing := self.existing) is None:
            return False
        changed = _changed({**(later or {}), **existing}, request | dict(later or {}))
        if changed:
            was = ", ".join(f"{key}={existing.get(key)!r}" for key in changed)
            raise ValueError(
                f"{self.output} was {self.made} with {was}; choose another output, or delete it to start anew"
            )
        if not resume:
            raise ValueError(
                f"{self.output} is finished, and resume=false deletes only what is unfinished: choose another output, "
                "or delete it to start anew"
            )
        return True

    def prepare(self, request: dict[str, Any], resume: bool, later: Mapping[str, Any] | None = None) -> None:
        """Lock the working folder and make it ready for work.

        Args:
            request: everything that changes the data set.
            resume: True keeps finished episodes; False deletes everything in the folder first.
            later: likewise, but a folder from before these keys fits any value, and holds this one from then on.

        Raises:
            ValueError: the folder is of another request, or another process works there.
        """
        self._hold()
        if not resume:
            self._empty()
        path = self.work / SETTINGS
        if not path.exists() and self.episodes.is_dir() and any(self.episodes.glob("[!.]*")):
            raise ValueError(
                f"{self.work} holds episodes of an unknown request, for instance because its deletion was interrupted; "
                "delete that folder (resume=false) to start anew"
            )
        self.episodes.mkdir(parents=True, exist_ok=True)
        for leftover in self.episodes.glob(".*"):
            leftover.unlink()
        shutil.rmtree(self.dataset, ignore_errors=True)
        request = request | dict(later or {})
        begun = {**(later or {}), **read_object(path, START_ANEW)} if path.exists() else request
        if changed := _changed(begun, request):
            raise ValueError(
                f"{self.work} holds an unfinished {self.activity} with another {', '.join(changed)}; finish that "
                "one, choose another output, or delete that folder (resume=false) to start anew"
            )
        write_atomic(path, json.dumps(begun, indent=1))

    def _empty(self) -> None:
        """Delete everything in the working folder but the lock; last the settings, which say whose they are."""
        for content in sorted(self.work.iterdir(), key=lambda each: each.name == SETTINGS):
            if content.name != LOCK:
                shutil.rmtree(content) if content.is_dir() else content.unlink()

    def _hold(self) -> None:
        """Lock the working folder until `publish`, or until this process ends in any way."""
        self.work.mkdir(parents=True, exist_ok=True)
        lock = (self.work / LOCK).open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"another process works in {self.work}; wait for it, or choose another output") from None
        self._lock = lock

    def publish(self, record: dict[str, Any], instead: bool = False) -> None:
        """Write the record and move the finished data set to `output`; `instead` replaces the data set there."""
        (self.dataset / self.record).write_text(json.dumps(record, indent=1))
        if instead:
            os.replace(self.output, self.work / "before")
        elif self.output.is_dir():
            for leftover in filter(is_left_by_macos, list(self.output.iterdir())):
                leftover.unlink()
            self.output.rmdir()  # it is empty, because `is_finished` refuses other folders
        os.replace(self.dataset, self.output)
        with suppress(OSError):  # the data set is there, and a network disk keeps the file of the lock while it is open
            self._empty()
            shutil.rmtree(self.work)
        if self._lock is not None:
            self._lock.close()


def _changed(existing: dict[str, Any], request: dict[str, Any]) -> list[str]:
    there, wanted = (json.loads(json.dumps(each)) for each in (existing, request))  # JSON turns tuples into lists
    return [key for key in wanted if there.get(key) != wanted[key]]
