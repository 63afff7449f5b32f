"""Many demonstrations replayed by processes; what became of each is on disk at once, so that nothing is done twice."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from cogvla.envs.evaluation.episode_log import write_atomic
from cogvla.envs.recording.demonstration import Demonstration
from cogvla.libero.hdf5.reader import read
from cogvla.libero.hdf5.replay import Replayer, ReplaySettings


@dataclass(frozen=True)
class Job:
    """One demonstration: its file, its key there, and the index of its task."""

    path: Path
    key: str
    task: int


@dataclass(frozen=True)
class Start:
    """From where it can be played again: the first state, and body -> pose of fixtures that were placed."""

    state: list[float]
    fixtures: dict[str, list[float]]


@dataclass(frozen=True)
class Outcome:
    """What became of a demonstration.

    Attributes:
        reason: why it was dropped; None: it is kept.
        steps: of the episode; 0 when it was dropped.
        noops: steps that were left out.
        start: see `Start`.
        path: the episode's file, or None.
    """

    reason: str | None
    steps: int
    noops: int
    start: Start
    path: Path | None = None

    @property
    def kept(self) -> bool:
        return self.reason is None


def play(settings: ReplaySettings, jobs: Sequence[Job], folder: Path, workers: int) -> list[Outcome]:
    """Replay what is not in the folder yet, and return the outcomes of all, in order.

    Raises:
        ValueError: a demonstration cannot be read or does not fit its task.
        RuntimeError: a worker died.
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
    """Replay them, in processes or in this one; yields whether one more is kept."""
    if workers == 0 or len(missing) < 2:
        if missing:
            with closing(Replayer(settings)) as replayer:
                for job, index in missing:
                    yield _replay(replayer, job, folder, index)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), context, _start) as pool:
        try:
            for future in as_completed([pool.submit(_replay_there, settings, *job, folder) for job in missing]):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker died (often: not enough memory); use fewer workers, the same command goes on where it stopped"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start() -> None:
    """In a worker: Ctrl-C is for the parent, and the processes share the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"


@functools.cache
def _replayer(settings: ReplaySettings) -> Replayer:
    """The one environment of a worker."""
    return Replayer(settings)


def _replay_there(settings: ReplaySettings, job: Job, index: int, folder: Path) -> bool:
    return _replay(_replayer(settings), job, folder, index)


def _replay(replayer: Replayer, job: Job, folder: Path, index: int) -> bool:
    """Replay one demonstration, put its outcome into the folder, and say whether it is kept."""
    recording = read(job.path, job.key)
    try:
        replayed = replayer.replay(job.task, recording)
    except ValueError as error:
        raise ValueError(f"{job.path}, {job.key}: {error}") from error
    if replayed.episode is not None:
        replayed.episode.save(_episode(folder, index))
    fixtures = recording.fixtures if replayer.settings.replay == "states" else {}
    start = Start(recording.states_TD[0].tolist(), {body: pose.tolist() for body, pose in fixtures.items()})
    steps = 0 if replayed.episode is None else len(replayed.episode)
    outcome = Outcome(replayed.reason, steps, replayed.noops, start)
    write_atomic(_result(folder, index), json.dumps(asdict(outcome) | {"path": None}))
    return outcome.kept


def _outcome(folder: Path, index: int) -> Outcome:
    values = json.loads(_result(folder, index).read_text())
    path = _episode(folder, index)
    if values["reason"] is None and not Demonstration.is_complete(path):
        _result(folder, index).unlink()
        raise ValueError(f"{path} is damaged; the same command makes it anew")
    return Outcome(
        values["reason"], values["steps"], values["noops"], Start(**values["start"]), path if path.exists() else None
    )


def _result(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.json"


def _episode(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"
