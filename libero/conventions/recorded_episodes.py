"""Read the episodes of a data set as training sees them, with their initial states to play them again.

A data set is either a LeRobotDataset v3, mapped as in training (`DataConfig`), or LIBERO's HDF5 files. Initial states
are known for data sets of `record_demonstrations` and `convert_libero`, and for HDF5 files; other data sets do not have
them.

Shape legend: N frames of the data set, T steps, S state, A action, F chosen frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cogvla.envs.perturbation.perturbation import Perturbation
from cogvla.envs.recording.demonstrator import SCENE_TASK, randomised
from cogvla.envs.recording.recorder import RECORDING_FILE
from cogvla.files import read_object
from cogvla.libero.hdf5 import reader as hdf5_reader
from cogvla.libero.hdf5.conversion import CONVERSION, INITIAL_STATES
from cogvla.libero.hdf5.replay import WAITING_STEPS
from cogvla.libero.tasks import LIBERO_SUITES, instruction, tasks
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.download import local_root
from cogvla.policy.data.gripper import gripper_mistakes, map_grippers
from cogvla.policy.data.reader import FrameGroup, LeRobotReader
from cogvla.policy.data.reader import Mapping as ReaderMapping
from cogvla.policy.interface import Embodiment

EXECUTED, TASK, INITIAL_STATE = "label.executed_action", "label.task", "label.initial_state"
SCENE = f"label.{SCENE_TASK}"


@dataclass(frozen=True)
class EpisodeStart:
    """The start of an episode: `initial_state` or `state` is given.

    Attributes:
        task: index of the task in its suite.
        initial_state: index of an initial state of the suite, or None.
        state: state of the simulator (time, positions, velocities), for LIBERO only; or None.
        fixtures: body -> position and quaternion (w, x, y, z) [7] of fixtures, for LIBERO only.
        waiting_steps: control steps without motion before the first action; None: the settling steps of the suite.
        scene_task: index of the task whose scene it was, if that is another one; or None.
        perturbations: how the scene differed, in a recording with `randomise`.
    """

    task: int
    initial_state: int | None = None
    state: np.ndarray | None = None
    fixtures: Mapping[str, np.ndarray] = field(default_factory=dict)
    waiting_steps: int | None = None
    scene_task: int | None = None
    perturbations: tuple[Perturbation, ...] = ()


@dataclass(frozen=True)
class RecordedEpisode:
    """One recorded episode.

    Attributes:
        name: name of the episode in messages.
        index: index of the episode for `Recordings.images`.
        instruction: instruction of the episode.
        actions_TA: actions to learn, in the embodiment's convention if the mapping is right.
        executed_TA: executed actions; equal to `actions_TA` unless the data set has them separately.
        states_TS: observed states, or None if none are recorded.
        start: where the episode began; None: the data set does not say.
    """

    name: str
    index: int
    instruction: str
    actions_TA: np.ndarray
    executed_TA: np.ndarray
    states_TS: np.ndarray | None
    start: EpisodeStart | None


class Recordings(Protocol):
    """A data set of episodes.

    Attributes:
        name: name of the data set in messages.
        suite: name of the suite that it was recorded in, or None.
        cameras: names of the embodiment's cameras that it has images of.
        turn: expected orientation of its images relative to the simulator's: a key of `image_agreement.TURNS`.
        delay: expected control steps by which its observations are late.
        simulation: package -> version that recorded it, e.g. {"mujoco": "3.3.2"}; empty if unknown.
        statistics: feature (`action` or `state`) -> statistic -> numbers, as stored.
        control_hz: control rate as stored, or None.
        notices: what else is good to know about its files.
    """

    name: str
    suite: str | None
    cameras: tuple[str, ...]
    turn: str
    delay: int
    simulation: Mapping[str, Any]
    statistics: Mapping[str, Mapping[str, Sequence[float]]]
    control_hz: float | None
    notices: Sequence[str]

    @property
    def episodes(self) -> Sequence[RecordedEpisode]: ...

    @property
    def gripper_mistakes(self) -> Sequence[str]:
        """Grippers whose stored values are not in the declared range, see `policy.data.gripper`."""
        ...

    def images(self, episode: RecordedEpisode, camera: str, steps: Sequence[int]) -> np.ndarray:
        """Return the images of a camera at some steps of an episode, uint8 [F,H,W,3]."""
        ...


def open_recordings(source: str, config: DataConfig, embodiment: Embodiment, suite: str | None = None) -> Recordings:
    """Open a data set: HDF5 files, the folder of a LeRobotDataset, or a name on the hub.

    Args:
        source: path or name.
        config: mapping of a LeRobotDataset's columns, as in training.
        embodiment: the robot.
        suite: suite of HDF5 files; None: the suite that the files name.

    Raises:
        ValueError: there is no data set, or it does not fit the mapping.
    """
    path = Path(source)
    if path.exists() and hdf5_reader.is_hdf5(path):
        return Hdf5Recordings(path, suite)
    on_hub = not path.exists() and source.count("/") == 1
    if config.streaming:
        raise ValueError("this command reads the pictures of a data set on the disk: leave data.streaming out")
    root, _ = local_root(None if on_hub else source, source if on_hub else None, config.revision)
    return LeRobotRecordings(root, config, embodiment)


class Hdf5Recordings:
    """LIBERO's own HDF5 files. By design, their images are rotated by 180 degrees and observations are a step late."""

    turn = "rotated 180"
    gripper_mistakes: Sequence[str] = ()
    statistics: Mapping[str, Mapping[str, Sequence[float]]] = {}
    control_hz: float | None = None

    def __init__(self, path: Path, suite: str | None = None) -> None:
        self._files = hdf5_reader.demonstrations(path)
        suites = {file.suite for file in self._files}
        self.name = path.name
        self.suite = suite or (suites.pop() if len(suites) == 1 else None)
        self._tasks = [task.name for task in tasks(self.suite)] if self.suite in LIBERO_SUITES else []
        kinds = {file.regenerated: file.path.name for file in self._files}
        if len(kinds) > 1:
            raise ValueError(
                f"{path} has files of two kinds, whose observations are of other times: {kinds[True]} is of the "
                f"published regeneration, {kinds[False]} is not; check them apart, in two folders"
            )
        self.delay = 0 if self._files[0].regenerated else 1
        missing = {file.path.name: hdf5_reader.lacks(file.path, file.keys[0]) for file in self._files}
        lacking = {name for names, _ in missing.values() for name in names}
        self.cameras = tuple(camera for camera, name in hdf5_reader.IMAGES.items() if name not in lacking)
        self.notices: Sequence[str] = [
            f"{file} has no {', '.join(names)}, so these are not checked; it has {there}"
            for file, (names, there) in missing.items()
            if names
        ]
        named = [pair for file in self._files for pair in file.versions.items()]
        self.simulation: Mapping[str, Any] = {
            package: " and ".join(sorted({version for other, version in named if other == package}))
            for package, _ in named
        }
        self._places = [(file, key) for file in self._files for key in file.keys]

    @cached_property
    def episodes(self) -> Sequence[RecordedEpisode]:
        return [self._episode(index) for index in range(len(self._places))]

    def _episode(self, index: int) -> RecordedEpisode:
        file, key = self._places[index]
        read = hdf5_reader.read(file.path, key)
        start = None
        if file.task in self._tasks:
            waiting = WAITING_STEPS["actions"] if file.regenerated else 0
            start = EpisodeStart(self._tasks.index(file.task), None, read.states_TD[0], read.fixtures, waiting)
        actions_TA = read.actions_TA.astype(np.float32)
        return RecordedEpisode(
            f"{key} of {file.path.name}", index, instruction(file.task), actions_TA, actions_TA, read.observed_TS, start
        )

    def images(self, episode: RecordedEpisode, camera: str, steps: Sequence[int]) -> np.ndarray:
        file, key = self._places[episode.index]
        return hdf5_reader.read_images(file.path, key, camera, list(steps))


class LeRobotRecordings:
    """A LeRobotDataset v3, mapped as in training."""

    turn, delay = "as it is", 0
    notices: Sequence[str]

    def __init__(self, root: Path, config: DataConfig, embodiment: Embodiment) -> None:
        self.name = root.name
        self.cameras = tuple(name for name in embodiment.camera_names if name in config.cameras)
        self._config, self._embodiment, self._root = config, embodiment, root
        stored = _json(root / "meta" / "info.json").get("features", {})
        labels = tuple((key, key) for key in (EXECUTED, TASK, INITIAL_STATE, SCENE) if key in stored)
        self._reader = LeRobotReader(
            root,
            ReaderMapping(
                cameras=tuple(config.cameras[name] for name in self.cameras),
                state=config.state_keys,
                action=config.action_keys,
                labels=labels,
                instruction=config.instruction_key,
                state_dim=embodiment.state_dim,
                action_dim=embodiment.action_dim,
            ),
            config.episodes,
        )
        made = _json(root / RECORDING_FILE) or _json(root / CONVERSION)
        self._randomise, self._seed = made.get("randomise") or (), int(made.get("seed") or 0)
        self.suite = made.get("suite")
        self.simulation: Mapping[str, Any] = made.get("simulation", {})
        self.notices = [str(warning) for warning in made.get("warnings", [])]
        self.control_hz: float | None = float(self._reader.metadata.fps)
        statistics = _json(root / "meta" / "stats.json")
        keys = {"action": config.action_keys, "state": config.state_keys}
        self.statistics: Mapping[str, Mapping[str, Sequence[float]]] = {
            name: statistics[key] for name, (key, *others) in keys.items() if key in statistics and not others
        }

    @cached_property
    def _columns(self) -> tuple[dict[str, np.ndarray], list[str]]:
        columns, instructions = self._reader.columns()
        stored_NA = torch.from_numpy(columns["action"])
        self._gripper_mistakes = gripper_mistakes(stored_NA, self._config.gripper, self._embodiment)
        for key in ("action", f"label/{EXECUTED}"):
            if key in columns:
                mapped = map_grippers(torch.from_numpy(columns[key]), self._config.gripper, self._embodiment)
                columns[key] = mapped.numpy()
        return columns, instructions

    @property
    def gripper_mistakes(self) -> Sequence[str]:
        return self._gripper_mistakes if self._columns else ()

    @cached_property
    def _parts(self) -> list[FrameGroup]:
        return list(self._reader.parts())

    @cached_property
    def _first_rows(self) -> np.ndarray:
        """Indices of the first row of each episode, and then the number of frames."""
        episode_N = self._columns[0]["episode"]
        return np.concatenate([[0], np.flatnonzero(np.diff(episode_N)) + 1, [len(episode_N)]])

    @cached_property
    def episodes(self) -> Sequence[RecordedEpisode]:
        columns, instructions = self._columns
        file = self._root / INITIAL_STATES
        starts = _json(file).get("episodes")
        total = self._reader.metadata.total_episodes
        if starts is not None and (not isinstance(starts, list) or len(starts) != total):
            raise ValueError(
                f"{file} is not of these {total} episodes: the data set was edited; delete this file, and the check "
                "does without initial states"
            )
        found = []
        for index, (first, end) in enumerate(zip(self._first_rows[:-1], self._first_rows[1:], strict=True)):
            rows = slice(first, end)
            number = int(columns["episode"][first])
            found.append(
                RecordedEpisode(
                    name=f"episode {number}",
                    index=index,
                    instruction=instructions[int(columns["instruction"][first])],
                    actions_TA=columns["action"][rows],
                    executed_TA=columns.get(f"label/{EXECUTED}", columns["action"])[rows],
                    states_TS=columns["state"][rows],
                    start=self._start(first) if starts is None else _start(starts[number], f"{file}: episode {number}"),
                )
            )
        return found

    def _start(self, row: int) -> EpisodeStart | None:
        columns = self._columns[0]
        task, state = columns.get(f"label/{TASK}"), columns.get(f"label/{INITIAL_STATE}")
        if task is None or state is None:
            return None
        scene_task = int(columns.get(f"label/{SCENE}", task)[row])
        return EpisodeStart(
            int(task[row]),
            initial_state=int(state[row]),
            scene_task=None if scene_task == int(task[row]) else scene_task,
            perturbations=randomised(self._randomise, self._seed, scene_task, int(state[row])),
        )

    def images(self, episode: RecordedEpisode, camera: str, steps: Sequence[int]) -> np.ndarray:
        rows = [int(self._first_rows[episode.index]) + step for step in steps]
        found: dict[int, np.ndarray] = {}
        for part in self._parts:
            if self.cameras[part.view] == camera and np.isin(rows, part.rows).any():
                for places, frames_FCHW in self._reader.decode(part, only=rows):
                    found |= {
                        int(row): frame.transpose(1, 2, 0) for row, frame in zip(places, frames_FCHW, strict=True)
                    }
        return np.stack([found[row] for row in rows])


def _start(values: Mapping[str, Any], where: str) -> EpisodeStart:
    try:
        return EpisodeStart(
            int(values["task"]),
            state=np.array(values["state"], np.float64),
            fixtures={body: np.array(pose, np.float64) for body, pose in values["fixtures"].items()},
            waiting_steps=int(values["waiting_steps"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error}); convert the data set again") from error


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON file with an object; an empty one if there is no file; ValueError if it is damaged."""
    return read_object(path, "record or download the data set again") if path.is_file() else {}
