"""The contract of a suite's environment, as protocols. Every environment is a `SuiteEnv`; the other parts are optional.

| part | needed to |
|---|---|
| `SuiteEnv` | evaluate, and roll out in training |
| `Labels`, and an `Expert` | record demonstrations, with labels for grounding |
| `Advisor`, of an expert | record corrections: a policy acts, and the expert says what should be done |
| `TargetMasks` | say in `analyse_routing` how much of the target a router keeps |
| `Cameras` | film episodes at the size of a video; otherwise videos show the observations |
| `Perturbable` | evaluate with another camera, light, background, layout or start (`envs/perturbation`) |
| `ImageSkipping` | save the time to render images that nobody looks at |

An environment implements a part by having its members, on the unwrapped environment; it need not inherit from it.
`tests/envs/test_contract.py` checks every registered suite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import gymnasium as gym
import numpy as np

from cogvla.envs.perturbation.perturbation import Perturbation
from cogvla.policy.interface import Embodiment

Part = TypeVar("Part")
CAMERAS = ("agentview", "wrist")
"""Images of every suite's observation."""
ACTION_DIM, GRIPPER, OPEN, CLOSED = 7, 6, -1.0, 1.0
"""Width of every suite's action, the index of its gripper, and the values that open and close it."""


def resting_action(gripper: float = OPEN) -> np.ndarray:
    """Return the action without motion, float32 [7], with the gripper open or as given."""
    action = np.zeros(ACTION_DIM, np.float32)
    action[GRIPPER] = gripper
    return action


class SuiteEnv(Protocol):
    """Play any task of a suite; a `gymnasium.Env`.

    Observation: `agentview` and `wrist` uint8 [H,W,3]; `state` float32 [8], whose first three numbers are the position
    of the gripper in metres, in the frame of `Labels`.
    Action: float32 [7] in [-1,1]; the last is the gripper, -1 opens and +1 closes. Values outside are clipped.
    `metadata["render_fps"]` is the control rate; 20 if it is missing.
    """

    metadata: Mapping[str, Any]
    observation_space: gym.spaces.Dict
    action_space: gym.spaces.Box

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Set up a scene. The same `options` give the same observation, whatever was played before.

        Args:
            seed: seeds what `options` leave open.
            options: `task` and `initial_state`, both int; `asked`, the index of another task that is possible in this
                scene, gives the instruction of that task instead.

        Returns:
            The observation, and info as `step` has it with `alternative_tasks`: the indices of the other tasks that are
            possible in this scene, mean something else and are not done yet. Without it, instructions cannot be
            swapped.

        Raises:
            ValueError: there is no such task or initial state, or `asked` is not possible here.
        """
        ...

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Carry out one control step.

        Returns:
            Observation, reward, terminated (True once the task is done), truncated (True at `Suite.max_steps`) and
            info: `success` (bool) and `instruction` (str) are those of the task that was asked for. If `asked` was
            given, `scene_task_success` (bool) is that of `task`.

        Raises:
            ValueError: the action has another shape, or is not finite.
        """
        ...

    def close(self) -> None:
        """Free the simulator."""
        ...


class ImageSkipping(Protocol):
    """Leave out rendering: while `skip_images` is True, observations may hold old images."""

    skip_images: bool


class Perturbable(Protocol):
    """Differ from training, for the robustness benchmark.

    Attributes:
        perturbations: how the next resets differ, at most one for each dimension; empty: not at all. They do not
            change what the clean scene is. The draws follow from task, initial state, dimension and level;
            `info["perturbation"]` of `reset` says them, as plain values.
    """

    perturbations: tuple[Perturbation, ...]


class Cameras(Protocol):
    """Render at any size."""

    def render_camera(self, name: str, height: int, width: int) -> np.ndarray:
        """Return the view of a camera of the observation now, uint8 [H,W,3]."""
        ...


class Labels(Protocol):
    """Say where to act."""

    def labels(self) -> Mapping[str, np.ndarray]:
        """Return `target` and `goal` of the task asked for, float32 [3] each, in world coordinates (m)."""
        ...

    def labels_for(self, task: int) -> Mapping[str, np.ndarray]:
        """Return the same for any task that is possible in this scene."""
        ...

    def camera_projection(self, name: str) -> np.ndarray:
        """Return float32 [3,4], which maps homogeneous world points to `(u*d, v*d, d)`.

        u (right) and v (down) are in [0,1] over the square image, d is the depth in metres.
        """
        ...


class TargetMasks(Protocol):
    """Say which pixels show the target."""

    def target_mask(self, name: str, height: int, width: int) -> np.ndarray:
        """Return True where a camera of the observation sees the thing to be handled now, bool [H,W]."""
        ...


class Expert(Protocol):
    """Solve the task that the environment was reset to, from the simulator's state."""

    phase: int
    """Number of the phase that the last action belongs to; the numbers are the expert's own."""

    def act(self) -> np.ndarray:
        """Return the clean action for the current state, float32 [7]; it is what demonstrations teach."""
        ...

    def noisy(self, action: np.ndarray, /) -> np.ndarray:
        """Return what to execute instead, float32 [7]; without noise, the action itself."""
        ...


class Advisor(Protocol):
    """An expert that says in every state what to do, although someone else acts."""

    def follow(self, executed: np.ndarray) -> None:
        """Take note that someone else chose the last action, float32 [7]; called when it has been carried out.

        After it, `act` returns what to do in the state that was reached. What the expert remembers may hold only what
        was done, not what it had said: an expert without a memory does nothing here.
        """
        ...


def check_gripper(robot: Embodiment, suite: str) -> None:
    """Raise a ValueError if a policy of this robot, when it opens its gripper, does something else in a suite."""
    if robot.grippers and (robot.gripper_open, robot.gripper_close) != (OPEN, CLOSED):
        raise ValueError(
            f"the policy opens its gripper with {robot.gripper_open:g} and closes it with {robot.gripper_close:g}, "
            f"suite {suite!r} with {OPEN:g} and {CLOSED:g}"
        )
    if robot.grippers not in ((), (GRIPPER,)):
        raise ValueError(
            f"the policy moves grippers by action {', '.join(map(str, robot.grippers))}, suite {suite!r} by {GRIPPER}"
        )


class ContractError(ValueError):
    """An environment or expert lacks members that it needs."""


def picture(observation: Mapping[str, Any], name: str) -> np.ndarray:
    """Return an image of an observation, uint8 [H,W,3]; ContractError if it is none."""
    image_HWC = np.asarray(observation[name])
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        got = f"{image_HWC.dtype} {list(image_HWC.shape)}"
        raise ContractError(f"the image {name!r} of an observation must be uint8 [H,W,3] (envs/contract.py), got {got}")
    return image_HWC


def offered(thing: object, part: type[Part]) -> Part | None:
    """Return the unwrapped environment (or the expert) as this part, or None if it has no member of it.

    Raises:
        ContractError: it has some members but not all.
    """
    inner: object = getattr(thing, "unwrapped", thing)
    members = _members(part)
    missing = [name for name in members if not hasattr(inner, name)]
    if len(missing) == len(members):
        return None
    if missing:
        raise ContractError(f"{type(inner).__name__} lacks {', '.join(missing)} of {part.__name__} (envs/contract.py)")
    return inner  # type: ignore[return-value]


def required(thing: object, part: type[Part], purpose: str) -> Part:
    """Return what `offered` does; ContractError if that is None."""
    found = offered(thing, part)
    if found is None:
        lacking = ", ".join(_members(part))
        raise ContractError(
            f"{purpose} needs {part.__name__} (envs/contract.py); {type(thing).__name__} lacks {lacking}"
        )
    return found


def _members(part: type[Any]) -> list[str]:
    names = {*part.__annotations__, *vars(part)}
    return sorted(name for name in names if not name.startswith("_"))
