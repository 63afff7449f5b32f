"""A suite without a simulator whose outcomes are known: initial states that divide by `STUCK_EVERY` cannot succeed.

A point moves in the plane by a tenth of the first two actions; each task has a target. Faults can be built in.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from cogvla.envs.suite import Suite, Task, register_suite
from cogvla.policy.interface import ActionChunk, Camera, Embodiment, Observation

TARGETS = np.array([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.5]], np.float32)
TASKS = (Task("right", "go to the right"), Task("left", "go to the left"), Task("up", "go up"))
STUCK_EVERY = 4
MAX_STEPS = 20
EMBODIMENT = Embodiment(
    name="point",
    cameras=(Camera("agentview", 32, 32), Camera("wrist", 32, 32)),
    state_dim=8,
    action_dim=7,
    chunk=4,
    control_hz=20,
    gripper_index=6,
)


class ToyEnv(gym.Env):
    """See the module docstring. `fault` is "raise", "kill" or "hang"; it strikes at step 3 of `at`, or of all."""

    observation_space = gym.spaces.Dict(
        {
            "agentview": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8),
            "wrist": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8),
            "state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32),
        }
    )
    action_space = gym.spaces.Box(-1, 1, (7,), np.float32)

    def __init__(
        self,
        image_size: int = 32,
        render: bool = True,
        fault: str = "",
        at: tuple[int, int] | None = (1, 0),
        once: Path | None = None,
        sleep_s: float = 0.0,
    ) -> None:
        self.skip_images = False
        self.rendered = 0
        self._fault, self._at, self._once, self._sleep_s = fault, at, once, sleep_s

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        options = options or {}
        self._key = (options.get("task", 0), options.get("initial_state", 0))
        self._asked = options.get("asked", self._key[0])
        self._position = np.random.default_rng(self._key).uniform(-0.1, 0.1, 2).astype(np.float32)
        self._steps = 0
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self._steps += 1
        if self._at in (None, self._key) and self._steps == 3:
            self._strike()
        time.sleep(self._sleep_s)
        if self._key[1] % STUCK_EVERY:
            self._position = self._position + 0.1 * np.clip(action[:2], -1, 1).astype(np.float32)
        info = self._info()
        return self._observation(), float(info["success"]), info["success"], self._steps >= MAX_STEPS, info

    def render_camera(self, name: str, height: int, width: int) -> np.ndarray:
        frame = np.full((height, width, 3), 40, np.uint8)
        column, row = ((np.clip(self._position, -0.9, 0.9) + 1) / 2 * (width, height)).astype(int)
        frame[max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = (255, 80, 0)
        return frame

    def _strike(self) -> None:
        if self._once is not None:
            if self._once.exists():
                return
            self._once.touch()
        if self._fault == "raise":
            raise RuntimeError("the toy is broken")
        if self._fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "hang":
            time.sleep(60)

    def _observation(self) -> dict[str, np.ndarray]:
        image = np.zeros((32, 32, 3), np.uint8)
        if not self.skip_images:
            self.rendered += 1
            image = self.render_camera("agentview", 32, 32)
        state = np.concatenate([self._position, TARGETS[self._asked], [self.rendered, 0, 0, 0]])
        return {"agentview": image, "wrist": image, "state": state.astype(np.float32)}

    def _info(self) -> dict[str, Any]:
        distance = np.linalg.norm(TARGETS - self._position, axis=1)
        return {
            "success": bool(distance[self._asked] < 0.08),
            "scene_task_success": bool(distance[self._key[0]] < 0.08),
            "instruction": TASKS[self._asked].instruction,
            "alternative_tasks": [t for t in range(len(TASKS)) if t != self._key[0]],
        }


def toy_suite(**faults: Any) -> Suite:
    """The suite, with the arguments of `ToyEnv` that break it."""
    return Suite("point", TASKS, MAX_STEPS, partial(ToyEnv, **faults))


def broken_factory(image_size: int = 32, render: bool = True) -> ToyEnv:
    """A `Suite.make` that cannot build its environment."""
    raise OSError("no EGL here")


class ToyPolicy:
    """Goes straight to the target in the state, and so solves whatever can be solved. Counts its batches."""

    embodiment = EMBODIMENT

    def __init__(self, sleep_s: float = 0.0, name: str = "point") -> None:
        self.batches: list[int] = []
        self._sleep_s = sleep_s
        self._name = name

    def describe(self) -> dict[str, Any]:
        return {"preset": self._name, "parameters": 0}

    def reset(self) -> None:
        self.batches.clear()

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> ActionChunk:
        observation.validate(self.embodiment)
        self.batches.append(observation.batch_size)
        time.sleep(self._sleep_s)
        position_B2, target_B2 = observation.state[:, :2], observation.state[:, 2:4]
        actions_BKA = np.zeros((observation.batch_size, 4, 7), np.float32)
        actions_BKA[:, :, :2] = np.clip((target_B2 - position_B2) / 0.4, -1, 1)[:, None]
        return ActionChunk(actions_BKA)


def solvable(initial_state: int) -> bool:
    """Whether `ToyPolicy` succeeds from there."""
    return initial_state % STUCK_EVERY != 0


register_suite("point", toy_suite)
