"""Replay many demonstrations in worker processes. Each result is saved at once, so that a restart repeats nothing.

Shape legend: T steps, D numbers of the flattened MuJoCo state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from cogvla.envs.recording.demonstration import Demonstration
from cogvla.files import write_atomic
from cogvla.libero.hdf5.reader import read
from cogvla.libero.hdf5.replay import Replayer, ReplaySettings
from cogvla.processes import Pool


@dataclass(frozen=True)
class Job:
    """One demonstration to replay: its file, its key in the file, and the index of its task in the suite."""

    path: Path
    key: str
    task: int


@dataclass(frozen=True)
class ReplayStart:
    """The start of an episode, to play it again.

    Attributes:
        state: first state: time, positions and velocities.
        fixtures: body -> position and quaternion (w, x, y, z) of the fixtures that the replay placed.
    """

    state: list[float]
    fixtures: dict[str, list[float]]


@dataclass(frozen=True)
class ReplayOutcome:
    """Result of one replay, as saved on disk.

    Attributes:
        reason: why the demonstration was dropped; None: it is kept.
        steps: number of steps of the episode; 0 if it was dropped.
        noops: number of no-op steps that were left out.
        start: where the episode begins.
        unplaced: see `Replayed`.
        path: file of the episode, or None if it was dropped.
    """

    reason: str | None
    steps: int
    noops: int
    start: ReplayStart
    unplaced: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def kept(self) -> bool:
        return self.reason is None


def play(settings: ReplaySettings, jobs: Sequence[Job], folder: Path, workers: int) -> list[ReplayOutcome]:
    """Replay the demonstrations that have no result in `folder` yet, and return all outcomes in order.

    Raises:
        ValueError: a demonstration cannot be read or does not fit its task.
        RuntimeError: a worker process died.
    """
    missing = [index for index in range(len(jobs)) if not _result(folder, index).exists()]
    dropped = 0
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=settings.suite, unit="demonstration") as bar:
        for kept in _played(settings, [(jobs[index], index) for index in missing], folder, workers):
            dropped += not kept
            bar.update()
            bar.set_postfix(dropped=dropped)
    return [_outcome(folder, index) for index in range(len(jobs))]


def _played(settings: ReplaySettings, missing: Sequence[tuple[Job, int]], folder: Path, workers: int) -> Iterator[bool]:
    """Replay the missing demonstrations; yield True for each that is kept, False for each that is dropped."""
    workers = workers if len(missing) > 1 else 0
    with Pool(_replaying, (settings, folder), missing, workers, (ValueError, OSError)) as pool:
        for _ in missing:
            yield pool.next()


@contextmanager
def _replaying(arguments: tuple[ReplaySettings, Path]) -> Iterator[Callable[[tuple[Job, int]], bool]]:
    settings, folder = arguments
    with closing(Replayer(settings)) as replayer:
        yield lambda item: _replay(replayer, item[0], folder, item[1])


def _replay(replayer: Replayer, job: Job, folder: Path, index: int) -> bool:
    """Replay one demonstration, save its outcome, and return True if it is kept."""
    recording = read(job.path, job.key)
    try:
        replayed = replayer.replay(job.task, recording)
    except ValueError as error:
        raise ValueError(f"{job.path}, {job.key}: {error}") from error
    if replayed.episode is not None:
        replayed.episode.save(_episode(folder, index))
    fixtures = recording.fixtures if replayer.settings.replay == "states" else {}
    start = ReplayStart(recording.states_TD[0].tolist(), {body: pose.tolist() for body, pose in fixtures.items()})
    steps = 0 if replayed.episode is None else len(replayed.episode)
    outcome = ReplayOutcome(replayed.reason, steps, replayed.noops, start, replayed.unplaced)
    write_atomic(_result(folder, index), json.dumps(asdict(outcome) | {"path": None}))
    return outcome.kept


def _outcome(folder: Path, index: int) -> ReplayOutcome:
    values = json.loads(_result(folder, index).read_text())
    path = _episode(folder, index)
    if values["reason"] is None and not Demonstration.is_complete(path):
        _result(folder, index).unlink()
        raise ValueError(f"{path} is damaged: run the same command again to make it anew")
    return ReplayOutcome(
        values["reason"],
        values["steps"],
        values["noops"],
        ReplayStart(**values["start"]),
        tuple(values.get("unplaced", ())),
        path if path.exists() else None,
    )


def _result(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.json"


def _episode(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"
