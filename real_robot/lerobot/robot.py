"""Drive any robot of `lerobot` (SO-101, Koch, ALOHA, ...): a `FrontEnd` in lerobot's own units.

    bridge, every tick --send--> newest command --+
                                                  v
                     thread "robot":  robot.send_action, or else  robot.get_observation --> bridge.observe_*

Only one thread talks to the robot, because a motor bus carries one message at a time. Commands go before observations.
The thread drops a command that is older than a control period (the robot was busy), or if the bridge has stopped. So
after an e-stop, at most the message that is being written at that moment reaches the motors.

An image has the time at which lerobot's camera took the newest image before the reading, whatever lerobot returns; a
camera that does not tell it, and the state, the time before the reading. So no sample is older than its stamp says. The
same image again is left out, so that a camera that stalls becomes stale.

Shape legend: A action dimension, S state dimension.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import Bridge
from cogvla.real_robot.control.control_loop import State
from cogvla.real_robot.control.observations import STATE
from cogvla.real_robot.control.settings import SafetyLimits

if TYPE_CHECKING:
    from lerobot.robots import Robot

_log = logging.getLogger(__name__)
MOVING = (State.HOLDING, State.RUNNING)
JOIN_S = 5.0


@dataclass(frozen=True)
class LeRobotSettings:
    """A robot of lerobot, and the mapping of its features to the embodiment. Ready-made ones: configs/lerobot/*.yaml.

    Attributes:
        type: lerobot's name of the robot type, e.g. so101_follower.
        modules: Python modules that register the types of the robot and its cameras; your own are possible.
        cameras: camera of the embodiment -> key in the robot's observation.
        state: [S] keys in the robot's observation, one per entry of the embodiment's state.
        action: [A] keys of the robot's action, one per entry of the embodiment's action.
        config: fields of lerobot's configuration of this type (id, port, cameras, ...), as for lerobot's commands.
    """

    type: str
    modules: tuple[str, ...]
    cameras: Mapping[str, str]
    state: tuple[str, ...]
    action: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("modules", "state", "action"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, keys in (("cameras", self.cameras.values()), ("state", self.state), ("action", self.action)):
            if len(set(keys)) < len(keys):
                raise ValueError(f"lerobot.{name} names a key twice: {', '.join(keys)}")

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Names of the numbers in a recording's features."""
        return {"observation.state": self.state, "action": self.action}

    def check(self, embodiment: Embodiment, limits: SafetyLimits) -> None:
        """Raise ValueError if the cameras, state or action keys do not match the embodiment or `state_index`."""
        if set(self.cameras) != set(embodiment.camera_names):
            raise ValueError(
                f"lerobot.cameras has {sorted(self.cameras)}, embodiment {embodiment.name!r} has "
                f"{sorted(embodiment.camera_names)}: name a camera of the robot for each"
            )
        for name, size in (("state", embodiment.state_dim), ("action", embodiment.action_dim)):
            if len(getattr(self, name)) != size:
                raise ValueError(
                    f"lerobot.{name} names {len(getattr(self, name))} features, the {name} of {embodiment.name!r} "
                    f"has {size} entries"
                )
        limits.check_names(embodiment, self.state, self.action)

    def check_robot(self, robot: Robot, embodiment: Embodiment) -> None:
        """Raise ValueError if the robot lacks one of these features or sends images of another size."""
        there, wanted = robot.observation_features, robot.action_features
        missing = [key for key in (*self.cameras.values(), *self.state) if key not in there]
        if missing:
            raise ValueError(f"{robot.name} observes no {', '.join(missing)}; it observes {', '.join(there)}")
        if images := [key for key in self.state if isinstance(there[key], Sequence)]:
            raise ValueError(f"lerobot.state names {', '.join(images)}, of which {robot.name} gives images")
        if set(wanted) != set(self.action):
            raise ValueError(f"lerobot.action must name all keys of the robot's action: {', '.join(wanted)}")
        for camera in embodiment.cameras:
            shape = there[self.cameras[camera.name]]
            if not isinstance(shape, Sequence) or tuple(shape) != (camera.height, camera.width, 3):
                raise ValueError(
                    f"camera {self.cameras[camera.name]!r} of {robot.name} gives {shape}, embodiment "
                    f"{embodiment.name!r} has {camera.height}x{camera.width} for {camera.name!r}: change one of them"
                )


def make_robot(settings: LeRobotSettings) -> Robot:
    """Build the robot without connecting it; ValueError if lerobot does not know the type or refuses its config."""
    from lerobot.robots import RobotConfig, make_robot_from_config

    config = device_config(RobotConfig, "robot", "lerobot", settings.type, settings.modules, settings.config)
    return make_robot_from_config(config)


def device_config(
    registry: Any, device: str, group: str, kind: str, modules: Sequence[str], values: Mapping[str, Any]
) -> Any:
    """Return lerobot's configuration of a device.

    Args:
        registry: lerobot's base class of such configurations.
        device: what it is, for messages.
        group: group of our configuration with `type`, `modules` and `config`, for messages.
        kind: lerobot's name of the type.
        modules: modules that register types.
        values: fields of the configuration.

    Raises:
        ValueError: a module cannot be imported, the type is unknown, or the values are not for it.
    """
    import draccus

    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{group}.modules names {module}, which needs {error.name}: install it") from error
    known = registry.get_known_choices()
    if kind not in known:
        raise ValueError(
            f"lerobot knows no {device} {kind!r}, only {', '.join(sorted(known)) or 'none'}: "
            f"{group}.modules must name the module that registers it"
        )
    try:
        return draccus.decode(known[kind], dict(values))
    except draccus.utils.DecodingError as error:
        raise ValueError(f"{group}.config is not for {kind}: {error}") from error


@contextmanager
def connected(robot: Robot) -> Iterator[Robot]:
    """Connect the robot without calibrating it, and disconnect it at the end.

    Raises:
        ValueError: the robot has not been calibrated.
        ConnectionError: the robot cannot be reached.
    """
    robot.connect(calibrate=False)
    try:
        if not robot.is_calibrated:
            raise ValueError(f"{robot} is not calibrated: run `lerobot-calibrate` with the same type, id and port")
        yield robot
    finally:
        try:
            robot.disconnect()
        except Exception as error:  # what ended the session says more, and this does not undo what it has made
            kind = type(error).__name__
            _log.warning("%s was not disconnected, so its motors may go on to hold: %s: %s", robot, kind, error)


def capture_times(robot: Robot) -> dict[str, float]:
    """Return when each camera took its newest image, on the clock of `time.perf_counter`, by the observation's key.

    Cameras that do not know it are missing: those without `latest_timestamp`, and all before their first image.
    """
    devices = dict(getattr(robot, "cameras", None) or {})
    for side in ("left", "right"):  # robots with two arms put the side before the keys of each arm
        arm_cameras = getattr(getattr(robot, f"{side}_arm", None), "cameras", None) or {}
        devices |= {f"{side}_{key}": camera for key, camera in arm_cameras.items()}
    times = {key: getattr(camera, "latest_timestamp", None) for key, camera in devices.items()}
    return {key: taken for key, taken in times.items() if taken is not None}


class LeRobotFrontEnd:
    """Front end of a lerobot robot.

    Args:
        robot: connected robot; the caller disconnects it.
        settings: mapping of its features; the constructor checks it against robot and embodiment.
        embodiment: embodiment of the bridge.
        limits: limits of the bridge.

    Raises:
        ValueError: robot, settings, embodiment and limits do not match.
    """

    ahead = False

    def __init__(self, robot: Robot, settings: LeRobotSettings, embodiment: Embodiment, limits: SafetyLimits) -> None:
        settings.check(embodiment, limits)
        settings.check_robot(robot, embodiment)
        self._robot, self._settings = robot, settings
        self._period_s = 1.0 / embodiment.control_hz
        self._now: Callable[[], float] = lambda: 0.0
        self._command: tuple[np.ndarray, float] | None = None
        self._counts: Counter[str] = Counter()
        self._taken: dict[str, float] = {}
        self._condition = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, bridge: Bridge) -> None:
        """See `FrontEnd.start`."""
        self._now, self._counts = bridge.now, bridge.measurements.counts
        self._thread = threading.Thread(target=self._run, args=(bridge,), name="robot", daemon=True)
        self._thread.start()

    def send(self, action_A: np.ndarray, coming_NA: np.ndarray | None, dry_run: bool) -> None:
        """See `FrontEnd.send`."""
        if not dry_run:
            with self._condition:
                self._counts["unsent"] += self._command is not None
                self._command = action_A, self._now()
                self._condition.notify()

    def stop(self, dry_run: bool) -> None:
        """Do nothing: motors come to rest at the last command, and one that waits is dropped."""

    def show(self, diagnostics: Mapping[str, Any]) -> None:
        """Do nothing: the program that runs the bridge prints the diagnostics."""

    def close(self) -> None:
        """See `FrontEnd.close`."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(JOIN_S)

    def _run(self, bridge: Bridge) -> None:
        due = self._now()
        try:
            while True:
                with self._condition:
                    while not self._closed and self._command is None and self._now() < due:
                        self._condition.wait(max(due - self._now(), 1e-4))
                    if self._closed:
                        return
                    command, self._command = self._command, None
                if command is not None:
                    self._act(bridge, *command)
                else:
                    self._observe(bridge)
                    due = max(due + self._period_s, self._now() - self._period_s)
        except BaseException as error:  # `Bridge.wait` raises it
            bridge.fail(error)

    def _act(self, bridge: Bridge, action_A: np.ndarray, wanted: float) -> None:
        if self._now() - wanted <= self._period_s and bridge.state in MOVING:
            values = map(float, action_A)
            try:
                self._robot.send_action(dict(zip(self._settings.action, values, strict=True)))
            except Exception as error:  # drivers raise anything
                kind = type(error).__name__
                raise ConnectionError(f"{self._robot.name} takes no command: {kind}: {error}") from error

    def _observe(self, bridge: Bridge) -> None:
        """Read the sensors and hand them to the bridge.

        A failed read is no error: it may work a moment later, and until then the sensor becomes stale.
        """
        taken = capture_times(self._robot)
        stamp = self._now()
        clocks = stamp - time.perf_counter()
        try:
            seen = self._robot.get_observation()
        except Exception as error:  # drivers raise anything: a port that is unplugged raises termios.error
            for sensor in (*self._settings.cameras, STATE):
                bridge.refuse(sensor, "unreadable", f"{type(error).__name__}: {error}")
            return
        missing = [key for key in self._settings.state if key not in seen]
        if missing:
            bridge.refuse(STATE, "unreadable", f"no {', '.join(missing)}")
        else:
            bridge.observe_state(np.array([seen[key] for key in self._settings.state], float), stamp)
        for camera, key in self._settings.cameras.items():
            if key not in seen:
                bridge.refuse(camera, "missing", f"the robot gave no {key!r}")
            elif key not in taken:
                bridge.observe_image(camera, np.asarray(seen[key]), stamp)
            elif taken[key] != self._taken.get(camera):
                self._taken[camera] = taken[key]
                bridge.observe_image(camera, np.asarray(seen[key]), min(stamp, taken[key] + clocks))
