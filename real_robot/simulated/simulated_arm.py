"""Simulate the tabletop arm in real time: displacements in, joints at 100 Hz and cameras at 20 Hz out.

    command  |--- control step, 50 ms ---|  next command, or a pause
    joints   ^   ^   ^   ^   ^                 measured every 10 ms
    cameras                              ^     rendered at the end of each step

The arm executes a command for one control step, starting when it arrives. It executes commands that arrive close
together one after the other. Without a command it keeps its pose, like a robot that has lost its bridge.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogvla.envs.suite import Suite
from cogvla.envs.tabletop.env import CAMERAS, TabletopEnv

STATE_NAMES = ("tcp_x", "tcp_y", "tcp_z", "tcp_rx", "tcp_ry", "tcp_rz", "finger_left", "finger_right")
"""Joint names of the state entries."""
GRIPPER = 6
WAITING = 4
"""Largest number of waiting commands; the oldest are dropped, as on a real robot."""


@dataclass(frozen=True)
class SceneStart:
    """Request for a scene. `number` identifies it in `SceneStatus`; the other fields are those of `EpisodeSpec`."""

    number: int
    task: int
    initial_state: int
    seed: int = 0
    asked: int | None = None

    def options(self) -> dict[str, Any]:
        """Return the options of the environment's `reset`."""
        options = {"task": self.task, "initial_state": self.initial_state}
        return options if self.asked is None else options | {"asked": self.asked}


@dataclass(frozen=True)
class SceneStatus:
    """Progress of a scene.

    Attributes:
        number: number of its `SceneStart`.
        instruction: instruction of the task that is asked for.
        steps: number of control steps since the first command.
        success: True once the task that is asked for is done.
        scene_task_success: True once the scene's own task is done.
        over: True after success, or when no step is left.
    """

    number: int
    instruction: str
    steps: int = 0
    success: bool = False
    scene_task_success: bool = False
    over: bool = False


class SimulatedArm:
    """Simulated arm. Call `step` in a loop from one thread; any thread may call the other methods.

    Args:
        suite: a tabletop suite.
        image_size: width and height of the images in pixels.
        max_steps: number of control steps after which a scene is over, including pauses.
        on_joints: callback with joint name -> position in m or rad.
        on_images: callback with camera -> image, uint8 [H,W,3], and the age of the images in seconds.
        on_status: callback with every new `SceneStatus`.
        clock: monotonic clock in seconds.
        sleep: function that waits for a number of seconds.

    Raises:
        ValueError: `suite` is no tabletop suite.
    """

    def __init__(
        self,
        suite: Suite,
        image_size: int,
        max_steps: int,
        on_joints: Callable[[Mapping[str, float]], None],
        on_images: Callable[[Mapping[str, np.ndarray], float], None],
        on_status: Callable[[SceneStatus], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        env = suite.make(image_size=image_size)
        if not isinstance(env, TabletopEnv):
            raise ValueError(f"suite {suite.name!r} has no arm that runs in real time; give a tabletop suite")
        self._env, self._max_steps, self._tasks = env, max_steps, len(suite.tasks)
        self._period = 1.0 / env.metadata["render_fps"]
        self._on_joints, self._on_images, self._on_status = on_joints, on_images, on_status
        self._clock, self._sleep = clock, sleep
        self._condition = threading.Condition()
        self._commands: deque[np.ndarray] = deque(maxlen=WAITING)
        self._start: SceneStart | None = SceneStart(0, 0, 0)
        self._gripper = -1.0
        self._due = self._measured = 0.0
        self._followed = False  # True if the last step had a command, so that the next one will come soon
        self._arm_joints = [(f"joint{i}", int(env.scene.model.joint(f"joint{i}").qposadr[0])) for i in range(1, 8)]
        self._env.watch = self._watch
        self.status = SceneStatus(0, "")

    def command(self, action_A: np.ndarray) -> None:
        """Queue a command [7], displacement [6] and gripper as in the environment; ValueError if it is invalid."""
        action_A = np.asarray(action_A, float)
        if action_A.shape != self._env.action_space.shape or not np.isfinite(action_A).all():
            raise ValueError(f"a command is {self._env.action_space.shape[0]} finite numbers, got {action_A}")
        with self._condition:
            self._commands.append(action_A)
            self._condition.notify()

    def set_scene(self, start: SceneStart) -> None:
        """Set up another scene with the arm at its start, and drop waiting commands; ValueError without such a task."""
        if not 0 <= start.task < self._tasks or start.initial_state < 0:
            raise ValueError(f"there are tasks 0 to {self._tasks - 1} and initial states from 0, got {start}")
        with self._condition:
            self._start = start
            self._commands.clear()
            self._condition.notify()

    def step(self) -> None:
        """Run one control step in real time: wait a short time for a command, then move, measure and render."""
        with self._condition:
            patience = 0.5 * self._period if self._followed else 0.0
            waited = not self._commands
            while not self._commands and self._start is None and self._clock() < self._due + patience:
                self._condition.wait(max(self._due + patience - self._clock(), 1e-4))
            start, self._start = self._start, None
            action_A = self._commands.popleft() if self._commands and start is None else None
        if start is not None:
            self._reset(start)
            return
        self._followed = action_A is not None
        if action_A is None:
            action_A = np.zeros(GRIPPER + 1)
            action_A[GRIPPER] = self._gripper
        self._gripper = float(action_A[GRIPPER])
        now = self._clock()
        if (self._followed and waited) or not now - self._period < self._due <= now:
            self._due = now  # otherwise keep the schedule, which makes up for the time that rendering took
        observation, *_, info = self._env.step(action_A)
        self._on_images({name: observation[name] for name in CAMERAS}, self._clock() - self._measured)
        self._count(info)

    def render(self, height: int, width: int) -> np.ndarray:
        """Render the first camera in another size, uint8 [H,W,3]. Call it only between steps."""
        return self._env.render_camera(CAMERAS[0], height, width)

    def close(self) -> None:
        self._env.close()

    def _reset(self, start: SceneStart) -> None:
        observation, info = self._env.reset(seed=start.seed, options=start.options())
        self._gripper, self._followed = -1.0, False
        self._due = self._clock()
        self._publish_joints()
        self._on_images({name: observation[name] for name in CAMERAS}, 0.0)
        self.status = SceneStatus(start.number, str(info["instruction"]))
        self._on_status(self.status)

    def _watch(self) -> None:
        """Publish the joints every 10 ms of a control step, in real time; faster if commands wait."""
        self._due += 0.01
        left = self._due - self._clock()
        if left > 0 and not self._commands:
            self._sleep(left)
        self._publish_joints()

    def _publish_joints(self) -> None:
        self._measured = self._clock()
        values = dict(zip(STATE_NAMES, map(float, self._env.state), strict=True))
        arm = {name: float(self._env.scene.data.qpos[address]) for name, address in self._arm_joints}
        self._on_joints(arm | values)

    def _count(self, info: Mapping[str, Any]) -> None:
        before = self.status
        if before.over or (before.steps == 0 and not self._followed):
            return
        steps, success = before.steps + 1, before.success or bool(info["success"])
        self.status = SceneStatus(
            before.number,
            before.instruction,
            steps,
            success,
            before.scene_task_success or bool(info["scene_task_success"]),
            success or steps >= self._max_steps,
        )
        if self.status.over:
            self._on_status(self.status)
