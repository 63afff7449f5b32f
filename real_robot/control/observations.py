"""Buffer samples of sensors and teleoperator, check their age, and synchronise the sensors into one observation.

    agentview   --o-----o-----o-----o---->        common time: the newest stamp of the slowest sensor (here wrist);
    wrist       ----o-----o-----X------->         each other sensor gives its sample nearest to it (X),
    state       -o-o-o-o-o-o-o-oXo-o-o-o->        no further away than the tolerance

All times are seconds on the loop's clock. A front end converts a sensor's stamp to `now` minus its age, where the age
is the sensor's clock minus the stamp. After a step of the sensor's clock, stamps lie in the future or are stale, and
the sample is refused.

Shape legend: A action dimension, H, W image size, S state dimension.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.control.settings import LoopSettings

STATE = "state"
"""Sensor name of the joint state."""
TELEOP = "teleop"
"""Name of the teleoperator's actions, which belong to no observation."""
IMAGES_KEPT = 8
STATES_KEPT = 256
"""Enough for joint states at up to 1 kHz, matched with a camera image that is 0.2 s old."""


@dataclass(frozen=True, eq=False)
class Synchronised:
    """Synchronised samples of all sensors.

    Attributes:
        stamp: common time of the samples, in seconds.
        images: camera -> image, uint8 [H,W,3].
        state_S: joint state [S].
    """

    stamp: float
    images: dict[str, np.ndarray]
    state_S: np.ndarray


class _Sensor:
    """Newest samples of one sensor, in the order of their stamps."""

    def __init__(self, kept: int, age_s: float) -> None:
        self.age_s = age_s
        self.samples: deque[tuple[float, np.ndarray]] = deque(maxlen=kept)

    def refusal(self, stamp: float, now: float, future_s: float) -> tuple[str, str] | None:
        """Return why a stamp is refused, as a name to count and as text; None if it is accepted."""
        if not math.isfinite(stamp):
            return "bad_stamp", f"stamp {stamp} is not a finite time"
        if stamp > now + future_s:
            return "future", f"stamp lies {stamp - now:.3f} s in the future; are the clocks synchronised?"
        if stamp < now - self.age_s:
            return "stale", f"{now - stamp:.3f} s old on arrival, at most {self.age_s:g} s are allowed"
        if self.samples and stamp == self.samples[-1][0]:
            return "duplicate", "same stamp as the sample before"
        if self.samples and stamp < self.samples[-1][0]:
            return "out_of_order", f"{self.samples[-1][0] - stamp:.3f} s older than the sample before"
        return None

    def nearest(self, stamp: float) -> tuple[float, np.ndarray]:
        """Return the sample nearest to a time; the newer one of two equally near samples."""
        best = self.samples[-1]
        for sample in reversed(self.samples):
            if abs(sample[0] - stamp) < abs(best[0] - stamp):
                best = sample
            elif sample[0] < stamp:
                break
        return best


class Observations:
    """Sample buffers of all cameras, the joint state and the teleoperator.

    Attributes:
        refusals: number of refused samples by "sensor: kind".
        last_refusal: sensor -> reason why its last sample was refused; no entry if it was accepted.
    """

    def __init__(self, embodiment: Embodiment, settings: LoopSettings) -> None:
        self._shapes = {c.name: (c.height, c.width, 3) for c in embodiment.cameras}
        self._state_dim, self._action_dim = embodiment.state_dim, embodiment.action_dim
        self._settings = settings
        self._sensors = {name: _Sensor(IMAGES_KEPT, settings.image_age_s) for name in self._shapes}
        self._sensors[STATE] = _Sensor(STATES_KEPT, settings.state_age_s)
        self._teleop = _Sensor(1, settings.teleop_age_s)
        self._same_since: dict[str, tuple[float, np.ndarray | None]] = {}
        self.refusals: Counter[str] = Counter()
        self.last_refusal: dict[str, str] = {}

    @property
    def newest_state(self) -> np.ndarray | None:
        """Newest joint state [S], or None."""
        samples = self._sensors[STATE].samples
        return samples[-1][1] if samples else None

    @property
    def newest_images(self) -> dict[str, np.ndarray]:
        """Newest image of each camera that has sent one, uint8 [H,W,3]."""
        return {name: s.samples[-1][1] for name, s in self._sensors.items() if s.samples and name != STATE}

    def clear(self) -> None:
        """Forget all samples. Call it after a jump of the clock, which makes their stamps meaningless."""
        for sensor in self._sensors.values():
            sensor.samples.clear()
        self._teleop.samples.clear()
        self._same_since.clear()
        self.last_refusal.clear()

    def add_image(self, camera: str, image_HW3: np.ndarray, stamp: float, now: float) -> str | None:
        """Add an image, uint8 [H,W,3], without copying it. Return the reason if it is refused, else None."""
        shape = self._shapes.get(camera)
        if shape is None:
            return self.refuse(camera, "unknown", f"no such camera; the cameras are {', '.join(self._shapes)}")
        if not isinstance(image_HW3, np.ndarray) or image_HW3.dtype != np.uint8 or image_HW3.shape != shape:
            is_array = isinstance(image_HW3, np.ndarray)
            found = f"{image_HW3.dtype} {image_HW3.shape}" if is_array else type(image_HW3).__name__
            return self.refuse(camera, "wrong_image", f"expected uint8 {shape}, got {found}; convert in the front end")
        return self._add(camera, image_HW3, stamp, now)

    def add_state(self, state_S: np.ndarray, stamp: float, now: float) -> str | None:
        """Add a copy of a joint state [S]. Return the reason if it is refused, else None."""
        copy_S = self._finite(STATE, state_S, self._state_dim)
        return copy_S if isinstance(copy_S, str) else self._add(STATE, copy_S, stamp, now)

    def add_teleop(self, action_A: np.ndarray, stamp: float, now: float) -> str | None:
        """Add a copy of an action [A] of the teleoperator. Return the reason if it is refused, else None."""
        copy_A = self._finite(TELEOP, action_A, self._action_dim)
        if isinstance(copy_A, str):
            return copy_A
        refusal = self._teleop.refusal(stamp, now, self._settings.future_tolerance_s)
        if refusal is not None:
            return self.refuse(TELEOP, *refusal)
        self._teleop.samples.append((stamp, copy_A))
        self.last_refusal.pop(TELEOP, None)
        return None

    def teleop(self, now: float) -> np.ndarray | str:
        """Return the teleoperator's action [A], or the reason why there is none."""
        if not self._teleop.samples:
            return self.last_refusal.get(TELEOP, f"{TELEOP}: nothing received yet")
        stamp, action_A = self._teleop.samples[-1]
        age, allowed = now - stamp, self._teleop.age_s
        return action_A if age <= allowed else f"{TELEOP}: {age:.3f} s old, at most {allowed:g} s are allowed"

    def _finite(self, name: str, values: np.ndarray, size: int) -> np.ndarray | str:
        """Return a copy of `size` numbers, float64, or the reason why they are refused."""
        try:
            copy = np.array(values, dtype=np.float64)
        except (TypeError, ValueError):
            return self.refuse(name, f"wrong_{name}", f"{type(values).__name__} is not {size} numbers")
        if copy.shape != (size,):
            return self.refuse(name, f"wrong_{name}", f"expected shape {(size,)}, got {copy.shape}")
        if not np.isfinite(copy).all():
            return self.refuse(name, "not_finite", f"NaN or infinite at {np.flatnonzero(~np.isfinite(copy))}")
        return copy

    def _add(self, name: str, value: np.ndarray, stamp: float, now: float) -> str | None:
        sensor = self._sensors[name]
        refusal = sensor.refusal(stamp, now, self._settings.future_tolerance_s)
        if refusal is not None:
            return self.refuse(name, *refusal)
        if self._settings.frozen_after_s is not None:
            self._compare(name, value, stamp)
        sensor.samples.append((stamp, value))
        self.last_refusal.pop(name, None)
        return None

    def _compare(self, name: str, value: np.ndarray, stamp: float) -> None:
        """Track since when a camera sends the same image, and the joint state at that time."""
        if name == STATE:
            for camera, (since, then_S) in self._same_since.items():
                if then_S is None and stamp >= since:
                    self._same_since[camera] = (since, value)
            return
        samples, states = self._sensors[name].samples, self._sensors[STATE]
        if name not in self._same_since or not np.array_equal(samples[-1][1], value):
            known = bool(states.samples) and states.samples[-1][0] >= stamp
            self._same_since[name] = (stamp, states.nearest(stamp)[1] if known else None)

    def refuse(self, name: str, kind: str, reason: str) -> str:
        """Count a refused sample and return the reason with the sensor's name.

        A refusal of the teleoperator's sample also discards the one before: the arm must not go on with it.
        """
        if name == TELEOP:
            self._teleop.samples.clear()
        self.refusals[f"{name}: {kind}"] += 1
        self.last_refusal[name] = f"{name}: {reason}"
        return self.last_refusal[name]

    def ages(self, now: float) -> dict[str, float | None]:
        """Return the age of each sensor's newest sample in seconds; None before the first sample."""
        return {name: now - s.samples[-1][0] if s.samples else None for name, s in self._sensors.items()}

    def stale(self, now: float) -> str | None:
        """Return which sensor is missing, too old or frozen, and why if it is known, as text; None if all are fresh."""
        for name, sensor in self._sensors.items():
            if not sensor.samples:
                return self.last_refusal.get(name, f"{name}: nothing received yet")
            age = now - sensor.samples[-1][0]
            if age > sensor.age_s:
                why = self.last_refusal.get(name, "").removeprefix(f"{name}: ")
                return f"{name}: {age:.3f} s old, at most {sensor.age_s:g} s are allowed" + (f"; {why}" if why else "")
        return self._frozen() if self._same_since else None

    def _frozen(self) -> str | None:
        state_S, limit = self.newest_state, self._settings.frozen_after_s
        assert limit is not None, "images are compared only with a limit"
        assert state_S is not None, "all sensors have a sample"
        for name, (since, then_S) in self._same_since.items():
            shown = self._sensors[name].samples[-1][0] - since
            moved = then_S is not None and float(np.abs(state_S - then_S).max()) > self._settings.frozen_motion
            if shown > limit and moved:
                return f"{name}: the same image for {shown:.3f} s although the robot moved; is the camera frozen?"
        return None

    def synchronised(self) -> Synchronised | str:
        """Return the newest synchronised samples, or the reason why there are none. `stale` checks their age."""
        missing = [name for name, sensor in self._sensors.items() if not sensor.samples]
        if missing:
            return f"nothing received yet from {', '.join(missing)}"
        common = min(sensor.samples[-1][0] for sensor in self._sensors.values())
        values = {}
        for name, sensor in self._sensors.items():
            stamp, values[name] = sensor.nearest(common)
            if abs(stamp - common) > self._settings.sync_tolerance_s:
                return (
                    f"{name}: nearest sample is {abs(stamp - common):.3f} s from the others, "
                    f"at most {self._settings.sync_tolerance_s:g} s are allowed"
                )
        state_S = values.pop(STATE)
        return Synchronised(common, values, state_S)
