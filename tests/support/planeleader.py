"""A teleoperator of lerobot without hardware, for the robot of `planearm.py`; lerobot finds it as it finds that one."""

from __future__ import annotations

import termios
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lerobot.motors import MotorNormMode
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from lerobot.teleoperators.utils import TeleopEvents
from lerobot.utils.errors import DeviceNotConnectedError

from cogvla.real_robot.lerobot.teleoperator import TeleopSettings
from cogvla.tests.support.planearm import JOINTS

LEADER = TeleopSettings(type="plane_leader", modules=("cogvla.tests.support.planeleader",), config={"id": "test"})


@TeleoperatorConfig.register_subclass("plane_leader")
@dataclass
class PlaneLeaderConfig(TeleoperatorConfig):
    """What is different about it, if anything; `keys`: those of its action, "a b c"."""

    calibrated: bool = True
    keys: str = " ".join(JOINTS)
    nested: bool = False
    unnamed: bool = False
    degrees: bool = True


class PlaneLeader(Teleoperator):
    """See the module docstring.

    Attributes:
        action: its action from now on.
        unplugged: it can be neither connected nor read.
        stuck: it cannot be disconnected, as an arm of lerobot whose port was unplugged.
        intervenes: what its event `is_intervention` is.
        answers: cleared, it does not answer until it is set.
        connections: number of times that it was connected.
    """

    config_class = PlaneLeaderConfig
    name = "plane_leader"

    def __init__(self, config: PlaneLeaderConfig) -> None:
        super().__init__(config)
        self.config = config
        self.action: dict[str, Any] = dict.fromkeys(config.keys.split(), 0.0)
        self.unplugged = self.stuck = self.intervenes = False
        self.answers = threading.Event()
        self.answers.set()
        self.connections = 0
        mode = MotorNormMode.DEGREES if config.degrees else MotorNormMode.RANGE_M100_100
        self.bus = SimpleNamespace(motors={"shoulder": SimpleNamespace(norm_mode=mode)})
        self._connected = False

    @property
    def action_features(self) -> dict[str, Any]:
        if self.config.unnamed:
            raise AttributeError("'PlaneLeader' object has no attribute 'arm'")
        keys = self.config.keys.split()
        return {"dtype": "float32", "names": list(keys)} if self.config.nested else dict.fromkeys(keys, float)

    @property
    def feedback_features(self) -> dict[str, Any]:
        return {}

    @property
    def is_connected(self) -> bool:
        return self._connected

    def connect(self, calibrate: bool = True) -> None:
        assert not calibrate, "nobody is there to calibrate"
        assert not self._connected
        if self.unplugged:
            raise ConnectionError("no such port")
        self.connections += 1
        self._connected = True

    @property
    def is_calibrated(self) -> bool:
        return self.config.calibrated

    def calibrate(self) -> None:
        raise AssertionError("nobody is there to calibrate")

    def configure(self) -> None:
        """Nothing to configure."""

    def get_action(self) -> dict[str, Any]:
        self.answers.wait()
        if self.unplugged or not self._connected:
            raise DeviceNotConnectedError("it is unplugged")
        return dict(self.action)

    def get_teleop_events(self) -> dict[TeleopEvents, Any]:
        return {TeleopEvents.IS_INTERVENTION: self.intervenes}

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        raise NotImplementedError

    def disconnect(self) -> None:
        if self.stuck:
            raise termios.error(5, "Input/output error")
        self._connected = False
