"""Let an operator take over with any teleoperator of `lerobot` (a leader arm, a gamepad, your own class).

    thread "teleoperator", at the control rate:
        teleop.connect, again until it works
        teleop.get_teleop_events --is_intervention--> bridge.take_over, or hand back
        teleop.get_action        -------------------> bridge.observe_teleop

The operator takes over with a key (`Teleoperation.toggle`), or with the device if it has lerobot's teleop events, as
the gamepad does: it drives while `is_intervention` is true.

Only this thread talks to the device, so a device that does not answer delays nothing. Whatever the device does wrong is
said once, and the arm holds while the operator drives: the control loop discards the last action after an error, and
ignores it once it is too old. The device is connected anew when the error lasts.

Shape legend: A action dimension.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import Bridge
from cogvla.real_robot.control.observations import TELEOP
from cogvla.real_robot.lerobot.robot import JOIN_S, device_config

if TYPE_CHECKING:
    from lerobot.robots import Robot
    from lerobot.teleoperators import Teleoperator

RECONNECT_S = 1.0
"""Pause between two attempts to connect, and time with errors after which the device is connected anew, in seconds."""
RELEASE_S = 0.5
"""Time without `is_intervention` that is a hand-back, in seconds; a key that repeats is not down all the time."""


@dataclass(frozen=True)
class TeleopSettings:
    """A teleoperator of lerobot. Ready-made ones: configs/teleop/*.yaml.

    Attributes:
        type: lerobot's name of the teleoperator type, e.g. so101_leader; None: no teleoperator.
        modules: Python modules that register the type; your own are possible.
        action: [A] keys of the teleoperator's action, one per entry of the embodiment's action, in its units. Empty:
            the names of the robot's own action, which must then be all keys of the teleoperator's.
        config: fields of lerobot's configuration of this type (id, port, ...), as for lerobot's commands.
    """

    type: str | None = None
    modules: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("modules", "action"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(set(self.action)) < len(self.action):
            raise ValueError(f"teleop.action names a key twice: {', '.join(self.action)}")

    def keys(self, teleop: Teleoperator, robot_keys: Sequence[str], embodiment: Embodiment) -> tuple[str, ...]:
        """Return the keys [A] of the teleoperator's action in the order of the robot's.

        Args:
            teleop: the teleoperator, connected or not.
            robot_keys: names of the entries of the robot's action; empty if they have none.
            embodiment: embodiment of the robot.

        Raises:
            ValueError: the actions do not fit.
        """
        there = _features(teleop)
        if not (self.action or robot_keys):
            raise ValueError(
                f"the action of {embodiment.name!r} has no names: teleop.action must name the key of {teleop.name}'s "
                f"action for each of its {embodiment.action_dim} entries; it has {', '.join(there)}"
            )
        if len(keys := self.action or tuple(robot_keys)) != embodiment.action_dim:
            raise ValueError(
                f"teleop.action names {len(keys)} keys, the action of {embodiment.name!r} has "
                f"{embodiment.action_dim} entries"
            )
        missing = [key for key in keys if key not in there]
        extra = [] if self.action else [key for key in there if key not in keys]
        if missing or extra:
            wrong = f"gives no {', '.join(missing)}" if missing else f"also gives {', '.join(extra)}"
            raise ValueError(
                f"{teleop.name} {wrong}; the robot's action is {', '.join(robot_keys) or 'without names'}, the "
                f"teleoperator's {', '.join(there)}: use another teleoperator, or name in teleop.action its key for "
                "each entry, in the same units"
            )
        return keys


def make_teleoperator(settings: TeleopSettings) -> Teleoperator:
    """Build the teleoperator without connecting it; ValueError if lerobot does not know it or refuses its config."""
    from lerobot.teleoperators import TeleoperatorConfig, make_teleoperator_from_config

    assert settings.type is not None, "there is a teleoperator"
    kind = settings.type
    config = device_config(TeleoperatorConfig, "teleoperator", "teleop", kind, settings.modules, settings.config)
    try:
        return make_teleoperator_from_config(config)
    except ImportError as error:
        raise ValueError(f"teleoperator {kind} cannot be used here: {error}") from error


def check_units(teleop: Teleoperator, robot: Robot) -> None:
    """Raise ValueError if two arms of lerobot count the same motor in other units, such as degrees and percent."""
    mine, other = (getattr(getattr(device, "bus", None), "motors", {}) for device in (teleop, robot))
    for name in mine:
        if name in other and mine[name].norm_mode != other[name].norm_mode:
            raise ValueError(
                f"{teleop.name} gives {name} as {mine[name].norm_mode.name}, {robot.name} takes "
                f"{other[name].norm_mode.name}: make teleop.config.use_degrees and lerobot.config.use_degrees equal"
            )


class Teleoperation:
    """Context manager that hands the actions of a teleoperator to a bridge, from its own thread.

    Args:
        teleop: the teleoperator, not connected; the thread connects and disconnects it.
        keys: [A] keys of its action, from `TeleopSettings.keys`.
        bridge: running bridge.
        say: called from the thread with one line whenever the device comes, goes or takes over.
    """

    def __init__(self, teleop: Teleoperator, keys: Sequence[str], bridge: Bridge, say: Callable[[str], None]) -> None:
        self._teleop, self._keys, self._bridge, self._say = teleop, tuple(keys), bridge, say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="teleoperator", daemon=True)
        self._intervened_at: float | None = None  # time of the last `is_intervention`, until it has been handed back
        self._failed_at = -math.inf  # time of the last error
        self._said = {""}  # kinds of errors since the device was ready last; one stands for the start

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(JOIN_S)  # a device that does not answer is left to the end of the process

    def toggle(self) -> tuple[bool, str]:
        """Take over, or hand back to the policy; returns like `Bridge.take_over`."""
        return self._bridge.take_over(not self._bridge.teleoperated)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._connect()
                except Exception as error:  # drivers raise anything
                    self._complain("cannot be connected", error)
                else:
                    self._poll_until_lost()
                self._disconnect()
                self._stop.wait(RECONNECT_S)
        except BaseException as error:  # `Bridge.wait` raises it
            self._bridge.fail(error)

    def _connect(self) -> None:
        """Connect without calibrating: nobody could answer its questions."""
        teleop = self._teleop
        if "calibrate" in inspect.signature(teleop.connect).parameters:
            teleop.connect(calibrate=False)
        else:
            teleop.connect()
        if teleop.is_calibrated is False:  # some devices return nothing, others a method
            raise ValueError("it is not calibrated; run `lerobot-calibrate` with the same type, id and port")

    def _disconnect(self) -> None:
        """Disconnect, or else make the device anew.

        lerobot's arms do not close a port that was unplugged, and of two arms not that of one alone; they refuse to be
        connected then, because they are already.
        """
        try:
            self._teleop.disconnect()
        except Exception:  # drivers raise anything
            with suppress(Exception):
                self._teleop = type(self._teleop)(self._teleop.config)

    def _poll_until_lost(self) -> None:
        """Hand over actions until the end, or until nothing but errors came for `RECONNECT_S`."""
        good = due = self._bridge.now()
        while not self._stop.wait(max(due - self._bridge.now(), 0.0)) and self._bridge.now() - good < RECONNECT_S:
            stamp = self._bridge.now()
            due = max(due + 1.0 / self._bridge.embodiment.control_hz, stamp)
            try:
                wanted = self._intervention()  # first: lerobot's keyboard forgets its keys in `get_action`
                action_A = self._action()
            except Exception as error:  # drivers raise anything
                self._complain("gives no action", error)
                continue
            refusal = self._bridge.observe_teleop(action_A, stamp)
            if refusal is not None:
                self._complain("gives no usable action", ValueError(refusal))
                continue
            good = stamp
            if self._said and stamp - self._failed_at >= RECONNECT_S:
                self._said.clear()
                self._say(f"teleoperator {self._teleop.name} is ready")
            self._follow(wanted, stamp)

    def _intervention(self) -> bool | None:
        """Return whether the device says that the operator drives; None if it does not say."""
        get_events = getattr(self._teleop, "get_teleop_events", None)
        if get_events is None:
            return None
        events = {str(getattr(key, "value", key)): value for key, value in get_events().items()}
        return bool(events.get("is_intervention", False))

    def _action(self) -> np.ndarray:
        """Return the device's action [A]; ValueError if a key is missing or no number."""
        action = self._teleop.get_action()
        missing = [key for key in self._keys if key not in action]
        if missing:
            raise ValueError(f"no {', '.join(missing)} in its action")
        values = {key: np.asarray(action[key]) for key in self._keys}
        for key, value in values.items():
            if value.size != 1 or value.dtype.kind not in "iuf":
                raise ValueError(f"{key} must be one number, got {action[key]!r}")
        return np.array([value.item() for value in values.values()], float)

    def _follow(self, wanted: bool | None, now: float) -> None:
        """Take over while the device says so, and hand back when it has not said so for `RELEASE_S`."""
        if wanted:
            self._intervened_at = now
            if not self._bridge.teleoperated and self._bridge.take_over()[0]:
                self._say(f"{self._teleop.name}: the operator drives")
        elif self._intervened_at is not None and now - self._intervened_at >= RELEASE_S:
            self._intervened_at = None
            if self._bridge.teleoperated:
                self._say(f"{self._teleop.name}: {self._bridge.take_over(False)[1]}")

    def _complain(self, what: str, error: Exception) -> None:
        """Tell the loop that there is no action, and the operator why, once for each kind until all is well again."""
        self._failed_at = self._bridge.now()
        name = type(error).__name__
        reason = " ".join(str(error).split())  # of drivers' messages over several lines
        self._bridge.refuse(TELEOP, "unreadable", f"{name}: {reason}")
        if f"{what} {name}" not in self._said:
            self._said.add(f"{what} {name}")
            self._say(f"teleoperator {self._teleop.name} {what}, so the arm holds while it drives: {name}: {reason}")


def _features(teleop: Teleoperator) -> list[str]:
    """Return the keys of the teleoperator's action; ValueError if it does not name them."""
    try:
        features = teleop.action_features
    except AttributeError as error:  # lerobot 0.4.4's `keyboard` is for robots that it does not know
        raise ValueError(f"{teleop.name} does not say what its actions are: {error}") from error
    return list(features["names"] if isinstance(features.get("names"), Mapping | Sequence) else features)
