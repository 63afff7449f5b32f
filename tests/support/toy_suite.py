"""A suite without a simulator: a point moves to one of three places, and two small pictures show it."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from cogvla.envs.recording.correction_pool import Corrected
from cogvla.envs.recording.recorder import record
from cogvla.envs.suite import Suite, Task, chosen_start, register_suite, suite_names
from cogvla.policy.interface import ActionChunk, Camera, Embodiment, Observation

PLACES = np.array([[0.5, 0.0, 0.1], [0.0, 0.5, 0.2], [-0.5, 0.0, 0.3]], np.float32)
INSTRUCTIONS = ("go right", "go up", "go left")
NAME = "toy"


class ToyEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 10}

    def __init__(self, image_size: int = 16, render: bool = True) -> None:
        self.size, self.rendered = image_size, render
        box = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        state = gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)
        self.observation_space = gym.spaces.Dict({"agentview": box, "wrist": box, "state": state})
        self.action_space = gym.spaces.Box(-1, 1, (7,), np.float32)

    def labels_for(self, task: int) -> dict[str, np.ndarray]:
        return {"target": PLACES[task], "goal": PLACES[task] + 1}

    def labels(self) -> dict[str, np.ndarray]:
        return self.labels_for(self.task)

    def camera_projection(self, name: str) -> np.ndarray:
        return np.full((3, 4), float(name == "wrist"), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        options = options or {}
        self.scene, self.initial_state = chosen_start(options, 3, self.np_random)
        possible = [self.scene, *[i for i in range(3) if i != self.scene][: 1 + self.initial_state // 10 % 2]]
        self.task = options.get("asked", self.scene)
        if self.task not in possible:
            raise ValueError(f"task {self.task} cannot be carried out in this scene")
        self.rng = np.random.default_rng([self.scene, self.initial_state])
        self.position, self.steps = self.rng.uniform(-0.2, 0.2, 3), 0
        return self._observe(), {**self._info(), "alternative_tasks": [i for i in possible if i != self.task]}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if np.shape(action) != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, got {action}")
        self.position += 0.1 * np.clip(action[:3], -1, 1)
        self.steps += 1
        info = self._info()
        return self._observe(), float(info["success"]), info["success"], self.steps >= 40, info

    def _info(self) -> dict[str, Any]:
        there = np.linalg.norm(self.position - PLACES, axis=1) < 0.1
        return {
            "success": bool(there[self.task]),
            "scene_task_success": bool(there[self.scene]),
            "instruction": INSTRUCTIONS[self.task],
        }

    def _observe(self) -> dict[str, np.ndarray]:
        state = np.zeros(8, np.float32)
        state[:3] = self.position
        picture = np.zeros((self.size, self.size, 3), np.uint8)
        if not self.rendered:
            return {"agentview": picture, "wrist": picture, "state": state}
        picture += np.uint8(40 * self.scene)
        x, y = (np.clip(self.position[:2] + 0.5, 0, 0.99) * self.size).astype(int)
        picture[x, y] = 255
        return {"agentview": picture, "wrist": picture[::-1].copy(), "state": state}


class ToyExpert:
    def __init__(self, env: gym.Env, rng: np.random.Generator, noise: float = 0.0) -> None:
        self.env, self.rng, self.noise, self.phase = env.unwrapped, rng, noise, 0

    def act(self) -> np.ndarray:
        toward = PLACES[self.env.task] - self.env.position
        self.phase = int(np.linalg.norm(toward) < 0.3)
        return np.append(np.clip(3 * toward, -0.5, 0.5), [0, 0, 0, 1]).astype(np.float32)

    def noisy(self, action: np.ndarray) -> np.ndarray:
        return np.clip(action + self.noise * self.rng.normal(0, 0.1, 7), -1, 1).astype(np.float32)

    def follow(self, executed: np.ndarray) -> None:
        """There is no memory."""


class DesertingExpert(ToyExpert):
    """Does nothing any more once someone else has acted."""

    left = False

    def act(self) -> np.ndarray:
        return np.zeros(7, np.float32) if self.left else super().act()

    def follow(self, executed: np.ndarray) -> None:
        self.left = True


class SometimesLostExpert(ToyExpert):
    """Fails on every third initial state."""

    def act(self) -> np.ndarray:
        return np.zeros(7, np.float32) if self.env.initial_state % 3 == 1 else super().act()


class NeverExpert(ToyExpert):
    """Fails."""

    def act(self) -> np.ndarray:
        return np.zeros(7, np.float32)


class OwnTaskExpert(ToyExpert):
    """Solves the scene's own task only."""

    def act(self) -> np.ndarray:
        return super().act() if self.env.task == self.env.scene else np.zeros(7, np.float32)


class BrokenExpert(ToyExpert):
    """Has a bug."""

    def act(self) -> np.ndarray:
        raise ZeroDivisionError("the expert's bug")


class MissingFileExpert(ToyExpert):
    """Needs a file that is not there."""

    def act(self) -> np.ndarray:
        return np.load("the-experts-file.npy")


class SlowExpert(ToyExpert):
    """Leaves time to interrupt it."""

    def act(self) -> np.ndarray:
        time.sleep(0.02)
        return super().act()


class FullDiskExpert(ToyExpert):
    """From the second episode of a task on, the process may write no file beyond a few bytes."""

    def act(self) -> np.ndarray:
        if self.env.initial_state >= 1010:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with an error, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        return super().act()


class HalfLabelled(ToyEnv):
    """Forgot the cameras."""

    @property
    def camera_projection(self) -> Any:
        raise AttributeError


class Unlabelled(HalfLabelled):
    """Knows nothing of labels."""

    @property
    def labels(self) -> Any:
        raise AttributeError

    labels_for = labels


class Unasked(ToyEnv):
    """Does not say what else is possible."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        del info["alternative_tasks"]
        return observation, info


class Deaf(ToyEnv):
    """Plays the scene's own task, whatever is asked."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=seed, options={k: v for k, v in (options or {}).items() if k != "asked"})


class Alone(ToyEnv):
    """Offers nothing else."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**info, "alternative_tasks": []}


class Noiseless(ToyExpert):
    """Forgot the noise."""

    @property
    def noisy(self) -> Any:
        raise AttributeError


class SilentExpert(ToyExpert):
    """Cannot say what to do while someone else acts."""

    @property
    def follow(self) -> Any:
        raise AttributeError


class ToyPolicy:
    """Goes to the place of its instruction at a speed, `speed` metres in each step; 0: it hovers.

    Its answers differ in the last digits from batch to batch, as those of a network do.
    """

    embodiment = Embodiment(
        name="toy",
        cameras=(Camera("agentview", 16, 16), Camera("wrist", 16, 16)),
        state_dim=8,
        action_dim=7,
        chunk=4,
        control_hz=10,
        gripper_index=6,
    )

    def __init__(self, speed: float, **other: Any) -> None:
        self.speed = speed
        self.embodiment = replace(self.embodiment, **other)

    def describe(self) -> dict[str, Any]:
        return {"checkpoint": "toy", "step": 7}

    def reset(self) -> None:
        pass

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        pass

    def act(self, observation: Observation) -> ActionChunk:
        observation.validate(self.embodiment)
        places_B3 = PLACES[[INSTRUCTIONS.index(text) for text in observation.instruction]]
        toward_B3 = places_B3 - observation.state[:, :3]
        actions_BKA = np.zeros((len(places_B3), self.embodiment.chunk, 7), np.float32)
        actions_BKA[..., :3] = (10 * self.speed * toward_B3 / np.linalg.norm(toward_B3, axis=1, keepdims=True))[:, None]
        return ActionChunk(actions_BKA + np.float32(1e-4) * observation.batch_size)


def make(image_size: int = 16, render: bool = True) -> gym.Env:
    return ToyEnv(image_size, render)


def suite() -> Suite:
    return Suite(NAME, tuple(Task(text, text) for text in INSTRUCTIONS), 40, make, expert=ToyExpert)


def register() -> None:
    if NAME not in suite_names():
        register_suite(NAME, suite)


def record_slowly(output: str, episodes: int, speed: float | None = None) -> None:
    """For tests that need a recorder to kill; `speed`: that of a policy which is corrected."""
    register()
    corrected = None if speed is None else Corrected(ToyPolicy(speed), patience=5)
    record(NAME, episodes, Path(output), image_size=16, expert=SlowExpert, corrected=corrected)
