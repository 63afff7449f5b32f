"""Our suites as environments of lerobot's commands: `--env.type=cogvla --env.task=tabletop_object`.

The seed of a reset says which episode is played, so that `lerobot-eval` plays the same initial states as `eval_libero`:
initial state `seed` modulo their number for one task; for all tasks in turn, episode `seed` in our protocol's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig, HubEnvConfig

from cogvla.envs.contract import ACTION_DIM, CAMERAS, SuiteEnv, resting_action
from cogvla.envs.evaluation.protocol import protocol_for
from cogvla.envs.suite import Suite, get_suite
from cogvla.lerobot_versions import frozen_at_the_end
from cogvla.plugins import import_plugin

GYM_ID = "cogvla/Suite-v0"


def _features(image_size: int) -> dict[str, PolicyFeature]:
    image = PolicyFeature(FeatureType.VISUAL, (image_size, image_size, 3))
    return {
        **{f"pixels/{name}": image for name in CAMERAS},
        "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
        "action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,)),
    }


@EnvConfig.register_subclass("cogvla")
@dataclass
class CogVLAEnv(HubEnvConfig):
    """Options `--env.NAME=` of lerobot's commands.

    Attributes:
        task: name of a suite, such as tabletop_object.
        fps: control rate in Hz.
        task_ids: indices of the tasks to play; None: all.
        image_size: height and width of the images in pixels.
        imports: modules that register further suites.
        protocol: name of the evaluation protocol that says waiting steps, step limit and seed; None: the suite's own.
        libero: settings of the suites of LIBERO, keys of `LiberoSettings`.
        hub_path: repository of the hub whose `env.py` builds the environments, see `envhub/env.py`; None: built here.
    """

    task: str | None = "tabletop_object"
    fps: int = 20
    task_ids: list[int] | None = None
    image_size: int = 128
    imports: list[str] = field(default_factory=list)
    protocol: str | None = None
    libero: dict[str, Any] = field(default_factory=dict)
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            **{f"pixels/{name}": f"observation.images.{name}" for name in CAMERAS},
            "agent_pos": "observation.state",
            "action": "action",
        }
    )

    def __post_init__(self) -> None:
        self.features = self.features or _features(self.image_size)

    @property
    def gym_id(self) -> str:
        """Id of the environment for lerobot 0.4, which calls `gym.make`."""
        return GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `SuiteEnvironment`; one task, or all in turn."""
        if self.task_ids is not None and len(self.task_ids) > 1:
            raise ValueError("lerobot 0.4 plays one environment: give --env.task_ids='[N]', or leave it out for all")
        return self._arguments(None if self.task_ids is None else self.task_ids[0])

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Return `{suite: {task: environments}}`, as lerobot 0.6 asks for it."""
        suite = _suite(str(self.task), self.imports, self.libero)
        chosen = list(range(len(suite.tasks))) if self.task_ids is None else list(self.task_ids)
        _check_tasks(suite, chosen)
        several = use_async_envs and n_envs > 1
        kind = partial(gym.vector.AsyncVectorEnv, context="forkserver") if several else gym.vector.SyncVectorEnv

        def build(task: int) -> gym.vector.VectorEnv:
            one = frozen_at_the_end(partial(SuiteEnvironment, **self._arguments(task)))
            return kind([one] * n_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

        return {suite.name: {task: build(task) for task in chosen}}

    def _arguments(self, task: int | None) -> dict[str, Any]:
        return {
            "suite": str(self.task),
            "task_id": task,
            "image_size": self.image_size,
            "imports": tuple(self.imports),
            "protocol": self.protocol,
            "libero": dict(self.libero),
        }


class SuiteEnvironment(gym.Env[dict[str, Any], np.ndarray]):
    """One of our environments with lerobot's observations, attributes and info.

    Args:
        suite: name of the suite.
        task_id: index of the task; None: the seed of each reset chooses it.
        image_size: height and width of the images in pixels.
        imports: modules that register further suites.
        protocol: see `CogVLAEnv`.
        libero: see `CogVLAEnv`.
        render_mode: for gymnasium; there is only `rgb_array`.

    Raises:
        ValueError: there is no such suite, task or protocol, or LIBERO cannot be played here.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        suite: str,
        task_id: int | None = None,
        image_size: int = 128,
        imports: tuple[str, ...] = (),
        protocol: str | None = None,
        libero: Mapping[str, Any] | None = None,
        render_mode: str = "rgb_array",
    ) -> None:
        self._suite = _suite(suite, imports, libero)
        if task_id is not None:
            _check_tasks(self._suite, [task_id])
        rules = protocol_for(self._suite, protocol, {}).for_suite(self._suite)
        self._waiting_steps, self._max_episode_steps = rules.waiting_steps, int(str(rules.max_steps))
        self._seed = rules.seed
        self._task_id, self.render_mode = task_id, render_mode
        self._env: SuiteEnv = self._suite.make(image_size=image_size)
        self._steps = 0
        self.task_description = "" if task_id is None else self._suite.tasks[task_id].instruction
        spaces = self._env.observation_space.spaces
        self.observation_space = gym.spaces.Dict(
            {"pixels": gym.spaces.Dict({name: spaces[name] for name in CAMERAS}), "agent_pos": spaces["state"]}
        )
        self.action_space = self._env.action_space
        self._seen: dict[str, np.ndarray] = {}

    @property
    def task(self) -> str:
        """The instruction, under another of lerobot's names."""
        return self.task_description

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode that the seed names; without one, draw a state for evaluation."""
        super().reset(seed=seed)
        states, tasks = self._suite.initial_states, len(self._suite.tasks)
        number = int(self.np_random.integers(states * tasks)) if seed is None else int(seed)
        task, state = (number % tasks, number // tasks) if self._task_id is None else (self._task_id, number)
        self._seen, info = self._env.reset(seed=self._seed, options={"task": task, "initial_state": state % states})
        for _ in range(self._waiting_steps):
            self._seen, _, _, _, info = self._env.step(resting_action())
        self._steps, self.task_description = 0, str(info["instruction"])
        return self._observation(), {"is_success": False, "task": task, "initial_state": state % states}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Make one control step."""
        self._seen, reward, terminated, _, info = self._env.step(np.asarray(action, np.float32))
        self._steps += 1
        over = self._steps >= self._max_episode_steps
        return self._observation(), float(reward), terminated, over, {"is_success": bool(info["success"])}

    def render(self) -> np.ndarray:
        """Return what the first camera sees, uint8 [H,W,3]."""
        return np.asarray(self._seen[CAMERAS[0]])

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _observation(self) -> dict[str, Any]:
        pixels = {name: np.asarray(self._seen[name], np.uint8) for name in CAMERAS}
        return {"pixels": pixels, "agent_pos": np.asarray(self._seen["state"], np.float32)}


def _suite(name: str, imports: Sequence[str], libero: Mapping[str, Any] | None) -> Suite:
    for module in imports:
        import_plugin(module, "env.imports")
    return get_suite(name, {"libero": libero or {}})


def _check_tasks(suite: Suite, tasks: list[int]) -> None:
    wrong = [task for task in tasks if not 0 <= task < len(suite.tasks)]
    if wrong or not tasks:
        raise ValueError(f"suite {suite.name!r} has tasks 0 to {len(suite.tasks) - 1}, got task_ids={tasks}")


# For lerobot 0.4. A wrapper of gymnasium would hide `task_description`, and with it the instruction.
gym.register(GYM_ID, entry_point=f"{__name__}:SuiteEnvironment", order_enforce=False, disable_env_checker=True)
