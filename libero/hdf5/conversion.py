"""Convert LIBERO's HDF5 demonstrations to a LeRobotDataset: worker processes replay them, this process writes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cogvla.envs.recording.dataset_folder import DatasetFolder
from cogvla.envs.recording.demonstration import Demonstration
from cogvla.libero.env import LiberoSettings
from cogvla.libero.hdf5.jobs import Job, ReplayOutcome, play
from cogvla.libero.hdf5.page import page, summary
from cogvla.libero.hdf5.reader import demonstrations, digest
from cogvla.libero.hdf5.replay import WAITING_STEPS, ReplaySettings
from cogvla.libero.suites import libero_suite
from cogvla.libero.tasks import LIBERO_SUITES, suites_of

CONVERSION = "meta/conversion.json"
"""File in a finished data set: its sources, its settings, and the numbers of the statistics page."""
INITIAL_STATES = "meta/initial_states.json"
"""File in a finished data set: the initial state of each episode, to play the episode again."""


@dataclass(frozen=True)
class Conversion:
    """A planned conversion.

    Attributes:
        settings: settings of the replays.
        jobs: all demonstrations, task after task.
        request: everything that changes the result. An interrupted conversion goes on only with an equal request.
        digests: name of a file -> hash of its actions, states and models; not known of older conversions.
        instructions: instructions of the suite's tasks.
    """

    settings: ReplaySettings
    jobs: tuple[Job, ...]
    request: dict[str, Any]
    digests: dict[str, str]
    instructions: tuple[str, ...]

    @classmethod
    def of(cls, source: Path, suite_name: str | None, libero: LiberoSettings, **options: Any) -> Conversion:
        """Plan the conversion of all demonstrations in a file or folder.

        Args:
            source: a `TASK_demo.hdf5`, or a folder of them.
            suite_name: one of LIBERO's suites; None: the suite that the files name.
            libero: settings of the simulation.
            options: `replay`, `image_size`, `keep_noops` of `ReplaySettings`.

        Raises:
            ValueError: the suite is unknown, or has no task for one of the files.
        """
        files = demonstrations(source)
        if suite_name is None:
            named = {file.suite for file in files}
            suite_name = named.pop() if len(named) == 1 else None
        if suite_name not in LIBERO_SUITES:
            raise ValueError(
                f"the files in {source} are not all of the same LIBERO suite: give suite=NAME, "
                f"one of {', '.join(LIBERO_SUITES)}"
            )
        suite = libero_suite(suite_name, libero)
        indices = {task.name: index for index, task in enumerate(suite.tasks)}
        unknown = [f"{file.path.name} ({_home(file.task)})" for file in files if file.task not in indices]
        if unknown:
            raise ValueError(f"{suite_name} has no task for {', '.join(unknown)}: give another suite=NAME or source")
        files.sort(key=lambda file: indices[file.task])
        settings = ReplaySettings(suite_name, libero, **options)
        request = {
            "suite": suite_name,
            "source": {file.path.name: [file.path.stat().st_size, len(file.keys)] for file in files},
            "replay": settings.replay,
            "image_size": settings.image_size,
            "keep_noops": settings.keep_noops,
            "simulation": dict(suite.settings),
        }
        jobs = tuple(Job(file.path, key, indices[file.task]) for file in files for key in file.keys)
        digests = {file.path.name: digest(file) for file in files}
        return cls(settings, jobs, request, digests, tuple(task.instruction for task in suite.tasks))


def _home(task: str) -> str:
    """Return in words which suites have a task of this name."""
    found = suites_of(task)
    return f"a task of {', '.join(found)}" if found else "a task of no suite"


def convert(conversion: Conversion, output: Path, workers: int, *, resume: bool = True, video: bool = False) -> Path:
    """Replay all demonstrations, write those that succeed, and return the data set's folder.

    Does nothing if the folder already holds this data set.

    Args:
        conversion: demonstrations and settings.
        output: folder of the data set.
        workers: number of worker processes; 0 replays in this process.
        resume: True goes on with an interrupted conversion; False starts from the beginning. A finished one stays.
        video: True stores the cameras as videos, False as images.

    Raises:
        ValueError: a file is damaged or does not fit the suite, the folder holds something else, or no demonstration
            can be kept.
    """
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    request = conversion.request | {"video": video}
    folder = DatasetFolder(output, "converting", "converted", CONVERSION)
    content = {"content": conversion.digests}
    if folder.is_finished(request, resume, content):
        return output
    folder.prepare(request, resume, content)
    outcomes = play(conversion.settings, conversion.jobs, folder.episodes, workers)
    folder.publish(request | content | _write(conversion, outcomes, folder.dataset, request))
    return output


def _write(
    conversion: Conversion, outcomes: list[ReplayOutcome], root: Path, request: dict[str, Any]
) -> dict[str, Any]:
    """Write the kept episodes in order, and the statistics page; return the page's numbers."""
    from cogvla.envs.recording.dataset_writer import DatasetWriter  # here, because importing lerobot takes seconds

    kept = [(job, outcome) for job, outcome in zip(conversion.jobs, outcomes, strict=True) if outcome.kept]
    if not kept:
        reasons = ", ".join(sorted({str(outcome.reason) for outcome in outcomes}))
        raise ValueError(f"none of the {len(outcomes)} demonstrations can be kept: {reasons}")
    arrays: dict[str, list[np.ndarray]] = {"observation.state": [], "action": []}
    with ExitStack() as stack:
        writer: DatasetWriter | None = None
        for _, outcome in tqdm(kept, desc="write", unit="episode"):
            assert outcome.path is not None
            episode = Demonstration.load(outcome.path)
            if writer is None:
                name = f"cogvla/{conversion.settings.suite}"
                writer = DatasetWriter(root, name, episode, "panda", request["video"])
                stack.callback(writer.close)
            writer.add(episode)
            for key, values in arrays.items():
                values.append(episode.arrays[key])
    found = summary(
        conversion.instructions,
        [(job.task, outcome) for job, outcome in zip(conversion.jobs, outcomes, strict=True)],
        {key: np.concatenate(values) for key, values in arrays.items()},
    )
    warnings = _warnings(kept)
    origin = [{"source": job.path.name, "demonstration": job.key} for job, _ in kept]
    waiting = WAITING_STEPS[conversion.settings.replay]
    starts = [{"task": job.task, "waiting_steps": waiting, **asdict(outcome.start)} for job, outcome in kept]
    (root / INITIAL_STATES).write_text(json.dumps({"episodes": starts}))
    (root / "README.md").write_text(page(request, found, warnings))
    return found | {"warnings": warnings, "episodes": origin}


def _warnings(kept: Sequence[tuple[Job, ReplayOutcome]]) -> list[str]:
    """Return a line for each file and the fixtures whose recorded poses it does not hold."""
    lines = []
    counts = Counter((job.path.name, outcome.unplaced) for job, outcome in kept if outcome.unplaced)
    for (name, fixtures), count in counts.items():
        lines.append(
            f"{name}: {count} demonstrations do not say where {', '.join(fixtures)} stood (model_file): the images "
            "show them where this simulator puts them. Use replay=actions, or files with models"
        )
    return lines
