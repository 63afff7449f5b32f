"""Log of an evaluation: a folder with results that survive a crash, their configuration, and a choice of videos.

run.json          fingerprint (everything that changes the numbers: suite, protocol, policy), and all sessions
episodes.jsonl    one line for each finished episode, on disk before the next episode counts
videos/           a few for each task, failures first
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cogvla.envs.episodes import EpisodeResult
from cogvla.envs.evaluation.perturbed import PICTURE
from cogvla.files import write_atomic

RUN, EPISODES, VIDEOS = "run.json", "episodes.jsonl", "videos"
REPORT = ("report.html", "report.json", "episodes.parquet")
Key = tuple[int, int]


class EpisodeLog:
    """Log that reads earlier results and appends new ones. Use it as a context manager: it locks the folder.

    Args:
        folder: folder of the evaluation; made if missing.
        fingerprint: everything that changes an episode's numbers, as plain values.
        session: present session (time, command line, versions), for the report.
        resume: True goes on with the results in the folder; False deletes them, and their report.

    Raises:
        ValueError: the folder holds results of another fingerprint or no evaluation, or another process writes to it.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, Any], session: Mapping[str, Any], resume: bool = True
    ) -> None:
        self.folder = folder
        self._fingerprint = _plain(fingerprint)
        self._session = json.loads(json.dumps(session, default=str))
        self._resume = resume
        self._file: IO[str] | None = None
        self.results: dict[Key, EpisodeResult] = {}
        self.sessions: list[dict[str, Any]] = []

    def __enter__(self) -> EpisodeLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = self.folder / EPISODES
        self._file = lines.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"another process is evaluating into {self.folder}; choose another output") from error
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None, "the log is open inside its context"
        self._file.close()

    def _open(self) -> None:
        assert self._file is not None, "the log is open inside its context"
        run = self.folder / RUN
        if not self._resume:
            self._file.truncate(0)
            self._file.seek(0)
            for name in (RUN, *REPORT, PICTURE):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / VIDEOS, ignore_errors=True)
        if run.exists():
            fingerprint, self.sessions = read_run(self.folder)
            check_fingerprint(self.folder, fingerprint, self._fingerprint)
            self.results = self._read()
        elif self._file.tell():
            raise ValueError(f"{self.folder} holds episodes but no {RUN}; choose another output, or delete it")
        self.sessions.append(self._session)
        write_atomic(run, json.dumps({"fingerprint": self._fingerprint, "sessions": self.sessions}, indent=2) + "\n")

    def _read(self) -> dict[Key, EpisodeResult]:
        """Read the finished episodes but not the errors, which are tried again; cut off an incomplete last line."""
        assert self._file is not None, "the log is open inside its context"
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind("\n") + 1
        if whole < len(text):
            self._file.truncate(len(text[:whole].encode()))
        results = read_episodes(self.folder / EPISODES)
        return {key: result for key, result in results.items() if result.error is None}

    def append(self, result: EpisodeResult) -> None:
        """Write one result to disk, and make the path of its video relative to the folder."""
        assert self._file is not None, "the log is open inside its context"
        if result.video is not None:
            result = replace(result, video=str(Path(result.video).relative_to(self.folder)))
        self.results[result.task, result.initial_state] = result
        self._file.write(json.dumps(result.to_dict()) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def check_videos(per_task: int) -> None:
    """Raise a ValueError if this is no number of videos per task."""
    if type(per_task) is not int or per_task < 0:
        raise ValueError(f"videos per task must be a whole number of at least 0, got {per_task!r}")


class VideoChoice:
    """Choice of the episodes to film: for each task up to `per_task`, failures before successes."""

    def __init__(self, log: EpisodeLog, per_task: int) -> None:
        check_videos(per_task)
        self._log = log
        self._per_task = per_task
        self._chosen: dict[int, list[bool]] = {}  # task -> success of each filmed episode
        for result in log.results.values():
            if self.path(result) is not None:
                self._chosen.setdefault(result.task, []).append(result.success)

    def __call__(self, result: EpisodeResult) -> Path | None:
        """Return the path for the video of this episode, or None (see `cogvla.envs.rollout.rollout.rollout`)."""
        chosen = self._chosen.setdefault(result.task, [])
        rivals = chosen if result.success else [success for success in chosen if not success]
        if len(rivals) >= self._per_task:
            return None
        chosen.append(result.success)
        outcome = "success" if result.success else "failure"
        name = f"task{result.task:02d}_state{result.initial_state:02d}_{outcome}.mp4"
        return self._log.folder / VIDEOS / name

    def path(self, result: EpisodeResult) -> Path | None:
        """Return the path of an episode's video, or None if there is no video or it was deleted."""
        path = None if result.video is None else self._log.folder / result.video
        return path if path is not None and path.exists() else None

    def prune(self) -> None:
        """Delete videos of successes that later failures have replaced."""
        for task in {result.task for result in self._log.results.values()}:
            filmed = [r for r in self._log.results.values() if r.task == task and self.path(r) is not None]
            for result in sorted(filmed, key=lambda r: (r.success, r.initial_state))[self._per_task :]:
                path = self.path(result)
                if path is not None and result.success:
                    path.unlink()


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the fingerprint and the sessions of an evaluation's folder.

    Raises:
        ValueError: the folder is not of an evaluation, or the file is damaged.
    """
    run = folder / RUN
    try:
        known = json.loads(run.read_text())
        return known["fingerprint"], known["sessions"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not the folder of an evaluation: it has no {RUN}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is damaged ({error}); choose another output, or delete {folder}") from error


def check_fingerprint(folder: Path, known: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise a ValueError if the results in a folder, whose fingerprint is `known`, are not of the present one."""
    changed = differences(known, _plain(present))
    if changed:
        raise ValueError(
            f"{folder} holds results of another configuration ({'; '.join(changed)}): choose another output, or "
            f"delete {folder}"
        )


def _plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint as it is read from a file."""
    return json.loads(json.dumps(fingerprint, sort_keys=True, default=str))


def read_episodes(path: Path) -> dict[Key, EpisodeResult]:
    """Read the last result of each episode. Errors are included, but an error never replaces a result."""
    results: dict[Key, EpisodeResult] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            result = EpisodeResult.from_dict(json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is damaged ({error}): delete that line, or its folder"
            ) from error
        key = result.task, result.initial_state
        if result.error is None or key not in results:
            results[key] = result
    return results


def check_simulators(sessions: Iterable[Mapping[str, Any]], advice: str) -> None:
    """Check that all sessions had one version of MuJoCo, since success rates change with it.

    Args:
        sessions: sessions, see `EpisodeLog`; older ones may not name their versions.
        advice: what the user can do, the end of the message.

    Raises:
        ValueError: they had several.
    """
    found = sorted({str(each["versions"]["mujoco"]) for each in sessions if "mujoco" in (each.get("versions") or {})})
    if len(found) > 1:
        raise ValueError(f"episodes of MuJoCo {' and '.join(found)} cannot be mixed: {advice}")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """List the values that differ between two nested mappings, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    return [] if old == new else [f"{name}: {old} there, {new} now"]
