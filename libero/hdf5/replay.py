"""Replay LIBERO's HDF5 demonstrations in the simulator, to render them at another size with the present renderer.

There are two ways:

- `states` restores the recorded states one after the other. Images and states are those of the demonstration, whatever
  the physics of this simulator. Fixtures stand as in the recorded model.
- `actions` executes the recorded actions, as published training data was made: it starts in the first state, waits ten
  steps, and executes all actions but the no-ops. Images and states are those of this simulator. Fixtures stand as in
  evaluations.

Both leave out no-op steps (`is_noop`), and drop a demonstration whose goal does not hold at the end.

Shape legend: T steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cogvla.envs.recording.demonstration import IMAGE_PREFIX, Demonstration, pack
from cogvla.libero.env import CAMERAS, LiberoEnv, LiberoSettings
from cogvla.libero.hdf5.reader import Recording

Replay = Literal["states", "actions"]
NOOP_THRESHOLD = 1e-4
WAITING_STEPS = {"states": 0, "actions": 10}
"""Way of replay -> control steps between the first recorded state and the first action."""
WAIT = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
CONTROL_HZ = 20


def is_noop(action_A: np.ndarray, previous_A: np.ndarray | None) -> bool:
    """Return True for an action without motion and with the same gripper command as the last kept action.

    This is the rule of the published data: no motion means that the norm of the first six numbers is below 1e-4. The
    gripper of the first action does not count (`previous_A` is None).
    """
    still = float(np.linalg.norm(action_A[:-1])) < NOOP_THRESHOLD
    return still and (previous_A is None or bool(action_A[-1] == previous_A[-1]))


def kept_steps(actions_TA: np.ndarray) -> list[int]:
    """Return the indices of the steps that are not no-ops."""
    kept: list[int] = []
    for step, action_A in enumerate(actions_TA):
        if not is_noop(action_A, actions_TA[kept[-1]] if kept else None):
            kept.append(step)
    return kept


@dataclass(frozen=True)
class ReplaySettings:
    """Settings of a replay.

    Attributes:
        suite: name of a LIBERO suite.
        libero: settings of the simulation.
        replay: `states` or `actions`, see above.
        image_size: height and width of the images in pixels.
        keep_noops: True keeps no-op steps.
    """

    suite: str
    libero: LiberoSettings
    replay: Replay = "states"
    image_size: int = 256
    keep_noops: bool = False

    def __post_init__(self) -> None:
        if self.replay not in get_args(Replay):
            raise ValueError(f"replay must be one of {', '.join(get_args(Replay))}, got {self.replay!r}")


@dataclass(frozen=True)
class Replayed:
    """Result of one replay, in memory.

    Attributes:
        episode: the episode, or None if it was dropped.
        reason: why it was dropped, or None.
        noops: number of no-op steps that were left out.
        unplaced: fixtures of the scene whose recorded poses are unknown; they stand where this simulator puts them.
    """

    episode: Demonstration | None
    reason: str | None
    noops: int
    unplaced: tuple[str, ...] = ()


class Replayer:
    """Replays demonstrations of one suite in one environment."""

    def __init__(self, settings: ReplaySettings) -> None:
        self.settings = settings
        self.env = LiberoEnv(settings.suite, settings.libero, settings.image_size)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def replay(self, task: int, recording: Recording) -> Replayed:
        """Replay one demonstration of a task, given by its index in the suite."""
        total = len(recording.actions_TA)
        kept = list(range(total)) if self.settings.keep_noops else kept_steps(recording.actions_TA)
        noops = total - len(kept)
        if not kept:
            return Replayed(None, "all steps are no-ops", noops)
        by_states = self.settings.replay == "states"
        steps: dict[str, list[np.ndarray]] = defaultdict(list)
        for step, observation in (self._shown if by_states else self._executed)(task, recording, kept):
            for name, value in self._row(task, observation, recording.actions_TA[step]).items():
                steps[name].append(value)
        if not self.env.task_success(task):
            return Replayed(None, f"the goal does not hold at the end of its {self.settings.replay}", noops)
        fixtures = self.env.scene.fixtures if by_states else []
        unplaced = tuple(name for name in fixtures if name not in recording.fixtures)
        return Replayed(pack(self.env.tasks[task].instruction, CONTROL_HZ, steps), None, noops, unplaced)

    def _shown(self, task: int, recording: Recording, kept: list[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield each kept step and its restored observation; leave the scene in the last recorded state."""
        self.env.skip_images = True
        self.env.restore(recording.states_TD[0], task, recording.fixtures)
        self.env.skip_images = False
        for step in kept:
            yield step, self.env.restore(recording.states_TD[step])
        self.env.skip_images = True
        self.env.restore(recording.states_TD[-1])

    def _executed(
        self, task: int, recording: Recording, kept: list[int]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Execute the kept actions; yield each step and the observation before it; leave the scene after the last."""
        self.env.skip_images = True
        self.env.restore(recording.states_TD[0], task)
        for _ in range(WAITING_STEPS["actions"] - 1):
            self.env.step(WAIT)
        self.env.skip_images = False
        observation, *_ = self.env.step(WAIT)
        for step in kept:
            yield step, observation
            self.env.skip_images = step == kept[-1]
            observation, *_ = self.env.step(recording.actions_TA[step])

    def _row(self, task: int, observation: dict[str, np.ndarray], action_A: np.ndarray) -> dict[str, Any]:
        return {
            "observation.state": observation["state"],
            "action": action_A.astype(np.float32),
            "label.task": np.array([task], np.int64),
        } | {IMAGE_PREFIX + camera: observation[camera] for camera in CAMERAS}
