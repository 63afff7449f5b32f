"""Plays LIBERO's HDF5 demonstrations again in the simulator, to see them at another size and with today's renderer.

Two ways, and what is different:

- `states`: the recorded states are shown one after the other. Images and states are those of the demonstration,
  whatever the physics of this simulator. Fixtures stand where the recorded model has them.
- `actions`: as published training data was made. The simulator starts in the first state, waits ten steps, and executes
  the actions; what is no action is left out and not executed. Images and states are those of this simulator. Fixtures
  stand as in evaluations.

In both, steps that are no action (`is_noop`) are left out, and a demonstration whose goal does not hold at the end is
dropped.

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
"""Steps between the first recorded state and the first action."""
WAIT = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
CONTROL_HZ = 20


def is_noop(action_A: np.ndarray, previous_A: np.ndarray | None) -> bool:
    """Whether an action moves nothing: no motion, and the gripper's command is that of the last action that was kept.

    The published rule: the norm of the first six numbers is below 1e-4; the first action is judged by that alone.
    """
    still = float(np.linalg.norm(action_A[:-1])) < NOOP_THRESHOLD
    return still and (previous_A is None or bool(action_A[-1] == previous_A[-1]))


def kept_steps(actions_TA: np.ndarray) -> list[int]:
    """The steps that are actions."""
    kept: list[int] = []
    for step, action_A in enumerate(actions_TA):
        if not is_noop(action_A, actions_TA[kept[-1]] if kept else None):
            kept.append(step)
    return kept


@dataclass(frozen=True)
class ReplaySettings:
    """How demonstrations are replayed.

    Attributes:
        suite: one of LIBERO's.
        libero: how it is simulated.
        replay: `states` or `actions`, see above.
        image_size: height and width of the images, in pixels.
        keep_noops: leave the steps in that are no action.
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
    """What became of a demonstration.

    Attributes:
        episode: what is kept, or None.
        reason: why it is dropped, or None.
        noops: steps that were left out.
        recorded_steps: as many as the demonstration had.
    """

    episode: Demonstration | None
    reason: str | None
    noops: int
    recorded_steps: int


class Replayer:
    """Replays demonstrations of one suite in one environment."""

    def __init__(self, settings: ReplaySettings) -> None:
        self.settings = settings
        self.env = LiberoEnv(settings.suite, settings.libero, settings.image_size)

    def close(self) -> None:
        """Free the environment."""
        self.env.close()

    def replay(self, task: int, recording: Recording) -> Replayed:
        """One demonstration of a task (its index)."""
        total = len(recording.actions_TA)
        kept = list(range(total)) if self.settings.keep_noops else kept_steps(recording.actions_TA)
        noops = total - len(kept)
        if not kept:
            return Replayed(None, "no step is an action", noops, total)
        by_states = self.settings.replay == "states"
        steps: dict[str, list[np.ndarray]] = defaultdict(list)
        for step, observation in (self._shown if by_states else self._executed)(task, recording, kept):
            for name, value in self._row(task, observation, recording.actions_TA[step]).items():
                steps[name].append(value)
        if not self.env.task_success(task):
            return Replayed(None, f"the goal does not hold after the last of its {self.settings.replay}", noops, total)
        return Replayed(pack(self.env.tasks[task].instruction, CONTROL_HZ, steps), None, noops, total)

    def _shown(self, task: int, recording: Recording, kept: list[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Each kept step with what is seen before its action; leaves the scene in the last recorded state."""
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
        """Each kept step with what is seen before its action; leaves the scene after the last action."""
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
