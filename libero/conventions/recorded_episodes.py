"""Episodes of a data set as training sees them, and from where each can be played again.

Two kinds of data set: a LeRobotDataset v3, mapped as in training (`DataConfig`), and LIBERO's HDF5 files. Where an
episode begins is known for what `record_demonstrations` and `convert_libero` wrote, and for HDF5 files; other data sets
do not say it.

Shape legend: N frames of the data set, T steps, S state, A action, F chosen frames.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cogvla.envs.recording.recorder import RECORDING_FILE
from cogvla.libero.hdf5 import reader as hdf5_reader
from cogvla.libero.hdf5.conversion import CONVERSION, INITIAL_STATES
from cogvla.libero.hdf5.replay import WAITING_STEPS
from cogvla.libero.tasks import LIBERO_SUITES, instruction, tasks
from cogvla.policy.data.demonstrations import DataConfig, convert_gripper
from cogvla.policy.data.reader import LeRobotReader, Part, local_root
from cogvla.policy.data.reader import Mapping as ReaderMapping
from cogvla.policy.interface import Embodiment

EXECUTED, TASK, INITIAL_STATE = "label.executed_action", "label.task", "label.initial_state"


@dataclass(frozen=True)
class Start:
    """How an episode began.

    Attributes:
        task: the suite's task.
        initial_state: one of the suite's, or None.
        state: else the simulator's state, for LIBERO.
        fixtures: body -> pose of what stands still, for LIBERO.
        waiting_steps: without motion, before the first action; None: as many as the suite's recordings have.
    """

    task: int
    initial_state: int | None = None
    state: np.ndarray | None = None
    fixtures: Mapping[str, np.ndarray] = field(default_factory=dict)
    waiting_steps: int | None = None


@dataclass(frozen=True)
class Episode:
    """One recorded episode.

    Attributes:
        name: for messages.
        index: for `Recordings.images`.
        instruction: what was asked.
        actions_TA: what is learned, in the embodiment's convention if the mapping is right.
        executed_TA: what was executed, if that is known to be something else.
        states_TS: what the policy was shown; None where it is missing.
        start: None: the data set does not say.
    """

    name: str
    index: int
    instruction: str
    actions_TA: np.ndarray
    executed_TA: np.ndarray
    states_TS: np.ndarray | None
    start: Start | None


class Recordings(Protocol):
    """A data set of episodes.

    Attributes:
        name: for messages.
        suite: which suite it was recorded in, or None.
        cameras: of the embodiment, which it has images of.
        turn: how images are turned against the simulator's when all is well (`TURNS` of `image_agreement`).
        delay: control steps by which observations are late when all is well.
        simulation: what it was recorded with, e.g. {"mujoco": "3.3.2"}; empty where that is unknown.
        statistics: feature -> statistic -> numbers, as stored; feature is `action` or `state`.
        control_hz: as stored, or None.
    """

    name: str
    suite: str | None
    cameras: tuple[str, ...]
    turn: str
    delay: int
    simulation: Mapping[str, Any]
    statistics: Mapping[str, Mapping[str, Sequence[float]]]
    control_hz: float | None

    @property
    def episodes(self) -> Sequence[Episode]: ...

    def images(self, episode: Episode, camera: str, steps: Sequence[int]) -> np.ndarray:
        """uint8 [F,H,W,3]."""
        ...


def open_recordings(source: str, config: DataConfig, embodiment: Embodiment, suite: str | None = None) -> Recordings:
    """The data set at a path, or of that name on the hub; `suite` where it does not say which one it is of.

    Raises:
        ValueError: there is none, or it does not fit the mapping; says what to do.
    """
    path = Path(source)
    if path.exists() and hdf5_reader.is_hdf5(path):
        return Hdf5Recordings(path, suite)
    on_hub = not path.exists() and source.count("/") == 1
    root = local_root(None if on_hub else source, source if on_hub else None, config.revision)
    return LeRobotRecordings(root, config, embodiment)


class Hdf5Recordings:
    """LIBERO's own files: that their images are upside down and observations one step late is as it should be."""

    turn = "rotated 180"
    statistics: Mapping[str, Mapping[str, Sequence[float]]] = {}
    control_hz: float | None = None

    def __init__(self, path: Path, suite: str | None = None) -> None:
        self._files = hdf5_reader.demonstrations(path)
        suites = {file.suite for file in self._files}
        self.name = path.name
        self.suite = suite or (suites.pop() if len(suites) == 1 else None)
        self._tasks = [task.name for task in tasks(self.suite)] if self.suite in LIBERO_SUITES else []
        self.delay = 0 if self._files[0].regenerated else 1
        self.cameras = tuple(hdf5_reader.IMAGES)
        self.simulation: Mapping[str, Any] = self._files[0].versions
        self._places = [(file, key) for file in self._files for key in file.keys]

    @cached_property
    def episodes(self) -> Sequence[Episode]:
        return [self._episode(index) for index in range(len(self._places))]

    def _episode(self, index: int) -> Episode:
        file, key = self._places[index]
        read = hdf5_reader.read(file.path, key)
        start = None
        if file.task in self._tasks:
            waiting = WAITING_STEPS["actions"] if file.regenerated else 0
            start = Start(self._tasks.index(file.task), None, read.states_TD[0], read.fixtures, waiting)
        actions_TA = read.actions_TA.astype(np.float32)
        return Episode(
            f"{key} of {file.path.name}", index, instruction(file.task), actions_TA, actions_TA, read.observed_TS, start
        )

    def images(self, episode: Episode, camera: str, steps: Sequence[int]) -> np.ndarray:
        file, key = self._places[episode.index]
        return hdf5_reader.read_images(file.path, key, camera, list(steps))


class LeRobotRecordings:
    """A LeRobotDataset v3, mapped as training maps it."""

    turn, delay = "as it is", 0

    def __init__(self, root: Path, config: DataConfig, embodiment: Embodiment) -> None:
        self.name = root.name
        self.cameras = tuple(name for name in embodiment.camera_names if name in config.cameras)
        self._config, self._embodiment, self._root = config, embodiment, root
        stored = json.loads((root / "meta" / "info.json").read_text())["features"]
        labels = tuple((key, key) for key in (EXECUTED, TASK, INITIAL_STATE) if key in stored)
        self._reader = LeRobotReader(
            root,
            ReaderMapping(
                cameras=tuple(config.cameras[name] for name in self.cameras),
                state=config.state,
                action=config.action,
                labels=labels,
                instruction=config.instruction_key,
                state_dim=embodiment.state_dim,
                action_dim=embodiment.action_dim,
            ),
        )
        made = _json(root / RECORDING_FILE) or _json(root / CONVERSION)
        self.suite = made.get("suite")
        self.simulation: Mapping[str, Any] = made.get("simulation", {})
        self.control_hz: float | None = float(self._reader.info["fps"])
        statistics = _json(root / "meta" / "stats.json")
        keys = {"action": config.action, "state": config.state}
        self.statistics: Mapping[str, Mapping[str, Sequence[float]]] = {
            name: statistics[key] for name, key in keys.items() if key in statistics
        }

    @cached_property
    def _columns(self) -> tuple[dict[str, np.ndarray], list[str]]:
        columns, instructions = self._reader.columns()
        if self._config.gripper is not None:
            for key in ("action", f"label/{EXECUTED}"):
                if key in columns:
                    mapped = convert_gripper(torch.from_numpy(columns[key]), self._config.gripper, self._embodiment)
                    columns[key] = mapped.numpy()
        return columns, instructions

    @cached_property
    def _parts(self) -> list[Part]:
        return list(self._reader.parts())

    @cached_property
    def _first_rows(self) -> np.ndarray:
        """Of each episode, and the number of frames."""
        episode_N = self._columns[0]["episode"]
        return np.concatenate([[0], np.flatnonzero(np.diff(episode_N)) + 1, [len(episode_N)]])

    @cached_property
    def episodes(self) -> Sequence[Episode]:
        columns, instructions = self._columns
        starts = _json(self._root / INITIAL_STATES).get("episodes")
        found = []
        for index, (first, end) in enumerate(zip(self._first_rows[:-1], self._first_rows[1:], strict=True)):
            rows = slice(first, end)
            number = int(columns["episode"][first])
            found.append(
                Episode(
                    name=f"episode {number}",
                    index=index,
                    instruction=instructions[int(columns["instruction"][first])],
                    actions_TA=columns["action"][rows],
                    executed_TA=columns.get(f"label/{EXECUTED}", columns["action"])[rows],
                    states_TS=columns["state"][rows],
                    start=self._start(first) if starts is None else _start(starts[number]),
                )
            )
        return found

    def _start(self, row: int) -> Start | None:
        columns = self._columns[0]
        task, state = columns.get(f"label/{TASK}"), columns.get(f"label/{INITIAL_STATE}")
        return None if task is None or state is None else Start(int(task[row]), initial_state=int(state[row]))

    def images(self, episode: Episode, camera: str, steps: Sequence[int]) -> np.ndarray:
        rows = [int(self._first_rows[episode.index]) + step for step in steps]
        found: dict[int, np.ndarray] = {}
        for part in self._parts:
            if self.cameras[part.view] == camera and np.isin(rows, part.rows).any():
                for places, frames_FCHW in self._reader.decode(part, only=rows):
                    found |= {
                        int(row): frame.transpose(1, 2, 0) for row, frame in zip(places, frames_FCHW, strict=True)
                    }
        return np.stack([found[row] for row in rows])


def _start(values: Mapping[str, Any]) -> Start:
    return Start(
        int(values["task"]),
        state=np.array(values["state"]),
        fixtures={body: np.array(pose) for body, pose in values["fixtures"].items()},
        waiting_steps=int(values["waiting_steps"]),
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
