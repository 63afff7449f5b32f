"""Disturb episodes, to measure whether a monitor notices it.

    frozen    a camera repeats one picture
    covered   a camera shows one dark colour, with a little noise
    moved     a camera is turned by a few degrees
    pushed    a thing that lies on the table, and not in the hand, is pushed

The first two change observations of any suite; the others change MuJoCo's model, for environments with a `scene`, as
the tabletop suites have it. When and what is drawn from the episode's task and initial state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mujoco
import numpy as np

from cogvla.envs.contract import CAMERAS
from cogvla.envs.rotations import rotation_matrix
from cogvla.envs.suite import Suite

DISTURBANCES = ("frozen", "covered", "moved", "pushed")
OF_THE_SCENE = ("moved", "pushed")
ONSET = (4, 20)
"""First and last control step before which a disturbance begins."""
DEGREES = 5.0
SPEED = 1.0
"""Speed in m/s that a pushed thing gets."""
CLEARANCE = 0.06
"""Distance in metres from the gripper beyond which a thing is not in the hand."""
DARK, NOISE = 20, 2


class Disturbed:
    """An environment in which something happens during each episode; everything else is that of the environment.

    Args:
        env: the environment.
        kind: one of `DISTURBANCES`.
    """

    def __init__(self, env: Any, kind: str) -> None:
        self._env, self._kind = env, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and draw what will happen; `info["perturbation"]` says it."""
        observation, info = self._env.reset(seed=seed, options=options)
        drawn = options or {}
        self._rng = np.random.default_rng(
            [DISTURBANCES.index(self._kind), drawn.get("task", 0), drawn.get("initial_state", 0)]
        )
        self._step, self._onset = 0, int(self._rng.integers(ONSET[0], ONSET[1] + 1))
        self._pushed = False
        self._camera = str(self._rng.choice(CAMERAS))
        self._last: np.ndarray = observation[self._camera]
        info["perturbation"] = {"disturbance": self._kind, "step": self._onset, "camera": self._camera}
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Make a step; the disturbance begins before step number `_onset`."""
        if self._step == self._onset and self._kind == "moved":
            self._turn_camera()
        if self._step >= self._onset and self._kind == "pushed" and not self._pushed:
            self._push()
        if self._step + 1 == self._onset:
            self._env.unwrapped.skip_images = False
        observation, reward, terminated, truncated, info = self._env.step(action)
        self._step += 1
        if self._step <= self._onset:
            self._last = observation[self._camera]
        elif self._kind == "frozen":
            observation[self._camera] = self._last.copy()
        elif self._kind == "covered":
            noise = self._rng.integers(-NOISE, NOISE + 1, self._last.shape)
            observation[self._camera] = (DARK + noise).astype(np.uint8)
        return observation, reward, terminated, truncated, info

    def _turn_camera(self) -> None:
        scene = self._env.unwrapped.scene
        camera = scene.model.camera(self._camera).id
        across = self._rng.normal(size=3)
        axis = across / np.linalg.norm(across)
        before = np.zeros(9)
        mujoco.mju_quat2Mat(before, scene.model.cam_quat[camera])
        turned = rotation_matrix(np.deg2rad(DEGREES) * axis) @ before.reshape(3, 3)
        mujoco.mju_mat2Quat(scene.model.cam_quat[camera], turned.flatten())

    def _push(self) -> None:
        """Push the first time that a thing lies outside of the hand."""
        scene, hand = self._env.unwrapped.scene, self._env.unwrapped.gripper_position
        free = [
            name
            for name in sorted(scene.placed)
            if scene.items[name].free and np.linalg.norm(scene.position(name) - hand) > CLEARANCE
        ]
        if not free:
            return
        body = scene.model.body(str(self._rng.choice(free)))
        velocity = scene.model.joint(int(body.jntadr[0])).dofadr[0]
        towards = np.array([0.5, 0.0]) - scene.data.xpos[body.id][:2]  # stays in the picture
        angle = np.arctan2(towards[1], towards[0]) + self._rng.uniform(-1, 1)
        scene.data.qvel[velocity : velocity + 2] = SPEED * np.array([np.cos(angle), np.sin(angle)])
        self._pushed = True


def _build(make: Callable[..., Any], kind: str, **settings: Any) -> Any:
    return Disturbed(make(**settings), kind)


def disturbed(suite: Suite, kind: str) -> Suite:
    """Return a suite in whose episodes something happens.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in DISTURBANCES:
        raise ValueError(f"unknown disturbance {kind!r}; one of {', '.join(DISTURBANCES)}")
    return replace(suite, make=partial(_build, suite.make, kind))


def check_disturbances(suite: Suite, kinds: Sequence[str]) -> None:
    """Raise a ValueError, before something slow, if one of these disturbances cannot happen in a suite."""
    of_the_scene = [kind for kind in kinds if kind in OF_THE_SCENE]
    if not of_the_scene:
        return
    env: Any = suite.make(render=False)
    try:
        env.reset(options={"task": 0, "initial_state": 0})
        if not hasattr(getattr(env.unwrapped, "scene", None), "placed"):
            raise ValueError(
                f"{', '.join(of_the_scene)} cannot happen in suite {suite.name!r}, which is no tabletop suite: give "
                f"disturbances=[{','.join(kind for kind in DISTURBANCES if kind not in OF_THE_SCENE)}]"
            )
    finally:
        env.close()
