"""A robot of lerobot without hardware: two joints that go where they are told, a gripper, two cameras that show them.

lerobot 0.4.4 is installed without its mock robot; this one is made as users make theirs. lerobot finds the class of a
`PlaneArmConfig` in a module of the same name.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig
from omegaconf import DictConfig, OmegaConf

from cogvla.policy.interface import Camera, Embodiment
from cogvla.real_robot.control.settings import LoopSettings, SafetyLimits
from cogvla.real_robot.control.settings import RobotConfig as Limits
from cogvla.real_robot.lerobot.robot import LeRobotSettings

JOINTS = ("shoulder.pos", "elbow.pos", "gripper.pos")
PLANE = Embodiment(
    name="plane_arm",
    cameras=(Camera("front", 8, 12), Camera("wrist", 8, 8)),
    state_dim=3,
    action_dim=3,
    chunk=8,
    control_hz=20.0,
    gripper_index=2,
    gripper_open=100.0,
    gripper_close=0.0,
)
SETTINGS = LeRobotSettings(
    type="plane_arm",
    modules=("cogvla.tests.support.planearm",),
    cameras={"front": "top", "wrist": "hand"},
    state=JOINTS,
    action=JOINTS,
)
LOOP = LoopSettings(image_age_s=2.0, state_age_s=2.0, deadline_s=5.0, hold_limit_s=60.0, clock_gap_s=30.0)
"""A busy machine is no fault here."""
LIMITS = Limits(
    "plane_arm",
    SafetyLimits(
        kind="absolute", state_index=(0, 1), position_low=(-90, -90), position_high=(90, 90), velocity=(100, 100)
    ),
    LOOP,
)


@RobotConfig.register_subclass("plane_arm")
@dataclass
class PlaneArmConfig(RobotConfig):
    """What goes wrong with it, if anything; `attended`: somebody could calibrate it."""

    calibrated: bool = True
    no_camera: bool = False
    high: bool = False
    attended: bool = False


class PlaneArm(Robot):
    """See the module docstring.

    Attributes:
        sent: (time, action) of every command.
        unreadable, unwritable, stuck: what reading, sending and disconnecting raise from now on.
        silent: its observations lack this key.
        cameras: devices that know when they took their newest image, as lerobot's do; none unless a test adds them.
    """

    config_class = PlaneArmConfig
    name = "plane_arm"

    def __init__(self, config: PlaneArmConfig) -> None:
        super().__init__(config)
        self.config = config
        self.position = dict.fromkeys(JOINTS, 0.0)
        self.sent: list[tuple[float, dict[str, float]]] = []
        self.unreadable: Exception | None = None
        self.unwritable: Exception | None = None
        self.stuck: Exception | None = None
        self.silent: str | None = None
        self.cameras: dict[str, Any] = {}
        self._connected = False

    @property
    def observation_features(self) -> dict[str, Any]:
        cameras = {"top": (16 if self.config.high else 8, 12, 3), "hand": (8, 8, 3)}
        if self.config.no_camera:
            del cameras["hand"]
        return {**dict.fromkeys(JOINTS, float), **cameras}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(JOINTS, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    def connect(self, calibrate: bool = True) -> None:
        assert self.config.attended or not calibrate, "nobody is there to calibrate"
        self._connected = True

    @property
    def is_calibrated(self) -> bool:
        return self.config.calibrated

    def calibrate(self) -> None:
        raise AssertionError("nobody is there to calibrate")

    def configure(self) -> None:
        """Nothing to configure."""

    def get_observation(self) -> dict[str, Any]:
        assert self._connected
        if self.unreadable is not None:
            raise self.unreadable
        shapes = {key: shape for key, shape in self.observation_features.items() if isinstance(shape, tuple)}
        level = int(100 + self.position["shoulder.pos"])
        seen = {**self.position, **{key: np.full(shape, level, np.uint8) for key, shape in shapes.items()}}
        if self.silent is not None:
            seen.pop(self.silent, None)
        return seen

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        assert self._connected
        assert set(action) == set(JOINTS)
        if self.unwritable is not None:
            raise self.unwritable
        self.sent.append((time.monotonic(), dict(action)))
        self.position = dict(action)
        return action

    def disconnect(self) -> None:
        if self.stuck is not None:
            raise self.stuck
        self._connected = False


def configured(config: DictConfig) -> DictConfig:
    """The configuration of a command, for this robot."""
    OmegaConf.set_struct(config, False)
    for group, value in (("embodiment", PLANE), ("robot", LIMITS), ("lerobot", SETTINGS)):
        config[group] = OmegaConf.create(asdict(value))
    config.lerobot.config = {"id": "test"}
    return config
