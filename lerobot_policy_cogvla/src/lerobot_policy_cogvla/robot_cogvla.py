"""The simulated tabletop arm as a robot of lerobot's commands: `--robot.type=cogvla_tabletop`.

It runs in real time in a thread of its own, whether commands come or not. Its features end in `.pos` and `.vel`:
`lerobot-rollout` leaves out all others without a word.

Shape legend: A action dimension.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from cogvla.envs.contract import CAMERAS
from cogvla.envs.suite import get_suite
from cogvla.real_robot.simulated.simulated_arm import STATE_NAMES, SceneStart, SceneStatus, SimulatedArm

STATE = tuple(f"{name}.pos" for name in STATE_NAMES)
"""Keys of the observation: pose of the hand in m and rad, and the fingers in m."""
ACTION = (*(f"{name}.vel" for name in STATE_NAMES[:6]), "gripper.pos")
"""Keys of an action: displacement of the hand per control step, and the gripper, as in the suites (-1 to 1)."""
START_S = 120.0


@RobotConfig.register_subclass("cogvla_tabletop")
@dataclass(kw_only=True)
class TabletopArmConfig(RobotConfig):
    """Options `--robot.NAME=` of lerobot's commands.

    Attributes:
        suite: name of a tabletop suite.
        task_index: index of the task whose scene is set up.
        initial_state: first initial state; each new scene has the next one.
        image_size: height and width of the images in pixels.
        idle_s: seconds without a command after which a new scene is set up, as a person does it between two episodes.
    """

    suite: str = "tabletop_object"
    task_index: int = 0
    initial_state: int = 0
    image_size: int = 128
    idle_s: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.idle_s > 0:
            raise ValueError(f"robot.idle_s must be positive, got {self.idle_s}")


class TabletopArm(Robot):
    """The simulated arm. It prints each scene's instruction and outcome.

    Args:
        config: configuration.
    """

    config_class = TabletopArmConfig
    name = "cogvla_tabletop"

    def __init__(self, config: TabletopArmConfig) -> None:
        super().__init__(config)
        self.config = config
        self.cameras = dict.fromkeys(CAMERAS)
        self._thread: threading.Thread | None = None
        self._stop, self._changed = threading.Event(), threading.Condition()
        self._arm: SimulatedArm | None = None
        self._joints: dict[str, float] = {}
        self._images: dict[str, np.ndarray] = {}
        self._commanded: float | None = None
        self._failure: BaseException | None = None

    @property
    def observation_features(self) -> dict[str, Any]:
        size = self.config.image_size
        return {**dict.fromkeys(STATE, float), **dict.fromkeys(CAMERAS, (size, size, 3))}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(ACTION, float)

    @property
    def is_connected(self) -> bool:
        return self._thread is not None

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """Do nothing."""

    def configure(self) -> None:
        """Do nothing."""

    def connect(self, calibrate: bool = True) -> None:
        """Set up the first scene, and wait for its images.

        Raises:
            ValueError: there is no such suite, task or initial state.
            ConnectionError: the arm is connected already, or the simulation cannot be started.
        """
        if self.is_connected:
            raise ConnectionError(f"{self} is connected already")
        get_suite(self.config.suite)
        self._stop.clear()
        self._images, self._commanded, self._failure = {}, None, None
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()
        with self._changed:
            started = self._changed.wait_for(lambda: self._images or self._failure, START_S)
        if not started or self._failure is not None:
            failure = self._failure or TimeoutError(f"no image came within {START_S:g} s")
            self.disconnect()
            if isinstance(failure, ValueError):
                raise failure
            raise ConnectionError(f"{self} cannot be started: {failure}") from failure

    def get_observation(self) -> dict[str, Any]:
        """Return the newest images and joints; ConnectionError if the simulation has ended."""
        self._check()
        with self._changed:
            return {**{key: self._joints[name] for key, name in zip(STATE, STATE_NAMES, strict=True)}, **self._images}

    def send_action(self, action: Mapping[str, Any]) -> dict[str, Any]:
        """Execute an action for one control step.

        Raises:
            ValueError: its keys are others, or its numbers are not finite.
            ConnectionError: the simulation has ended.
        """
        self._check()
        if set(action) != set(ACTION):
            raise ValueError(
                f"an action of {self.name} has {', '.join(ACTION)}, got {', '.join(action)}: this arm takes no poses; "
                "give --return_to_initial_position=false and --strategy.reset_to_initial_position=false"
            )
        assert self._arm is not None
        self._arm.command(np.array([float(action[key]) for key in ACTION]))
        self._commanded = time.monotonic()
        return dict(action)

    def disconnect(self) -> None:
        """End the simulation."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(START_S)
        self._thread = None

    def _check(self) -> None:
        if not self.is_connected or self._failure is not None:
            raise ConnectionError(f"{self} is not connected" if self._failure is None else f"{self}: {self._failure}")

    def _run(self) -> None:
        """Simulate until `disconnect`: OpenGL belongs to one thread."""
        config = self.config
        try:
            suite = get_suite(config.suite)
            arm = SimulatedArm(
                suite, config.image_size, 2 * suite.max_steps, self._take_joints, self._take_images, self._show
            )
            self._arm = arm
            try:
                start = SceneStart(0, config.task_index, config.initial_state)
                arm.set_scene(start)
                while not self._stop.is_set():
                    if self._commanded is not None and time.monotonic() - self._commanded > config.idle_s:
                        self._commanded = None
                        start = SceneStart(start.number + 1, start.task, start.initial_state + 1)
                        arm.set_scene(start)
                    arm.step()
            finally:
                arm.close()
        except BaseException as error:  # the next call of lerobot's thread says it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _take_joints(self, joints: Mapping[str, float]) -> None:
        with self._changed:
            self._joints = dict(joints)

    def _take_images(self, images: Mapping[str, np.ndarray], age_s: float) -> None:
        with self._changed:
            self._images = {name: np.array(image) for name, image in images.items()}
            self._changed.notify_all()

    def _show(self, status: SceneStatus) -> None:
        outcome = "success" if status.success else "no success"
        done = f"{outcome} after {status.steps} steps" if status.over else "begins"
        state = self.config.initial_state + status.number
        print(f"{self.name}: initial state {state}, {status.instruction!r}: {done}", flush=True)
