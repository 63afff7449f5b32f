"""Inject sensor faults into the simulated robot, for tests and rehearsals."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cogvla.real_robot.control.observations import STATE

FAULTS = ("none", "silent", "frozen", "small", "late", "out_of_order", "clock")
IMAGES, SHIFTS = ("frozen", "small"), ("late", "out_of_order", "clock")
"""Faults of cameras only, and those of stamps."""


@dataclass
class SensorFaults:
    """The active fault.

    Attributes:
        fault: one of
            none: no fault;
            silent: the sensor sends nothing; frozen: a camera repeats its last image with new stamps;
            small: a camera sends images of half the size; late: stamps are `seconds` in the past;
            out_of_order: every other stamp is `seconds` in the past; clock: like late, for all sensors.
        sensor: a camera or "state"; None for all sensors.
        seconds: shift of the stamps in seconds; negative for a clock that is ahead.
    """

    fault: str = "none"
    sensor: str | None = None
    seconds: float = 0.0
    _last: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(FAULTS)}, got {self.fault!r}")
        if not isinstance(self.seconds, int | float) or (self.fault in SHIFTS) != bool(self.seconds):
            raise ValueError(f"the faults {', '.join(SHIFTS)} shift stamps by `seconds`, others do not: {self}")
        if self.sensor == STATE and self.fault in IMAGES:
            raise ValueError(f"the fault {self.fault} is one of cameras")

    @staticmethod
    def from_json(text: str, cameras: Collection[str]) -> SensorFaults:
        """Read a fault from JSON such as `{"fault": "silent", "sensor": "wrist"}`; ValueError if it would not occur."""
        try:
            fault = SensorFaults(**json.loads(text))
        except TypeError as error:
            raise ValueError(f"a fault is a map of fault, sensor and seconds: {error}") from error
        if fault.sensor not in (None, STATE, *cameras):
            raise ValueError(f"sensor must be {', '.join(cameras)}, {STATE} or null for all, got {fault.sensor!r}")
        return fault

    def image(self, camera: str, image_HW3: np.ndarray, stamp: float, send: Callable[[np.ndarray, float], Any]) -> None:
        """Send an image, changed by the fault."""
        if self._hits(camera):
            if self.fault == "frozen":
                image_HW3 = self._last.setdefault(camera, image_HW3)
            elif self.fault == "small":
                image_HW3 = np.ascontiguousarray(image_HW3[::2, ::2])
        self._send(camera, image_HW3, stamp, send)

    def state(self, value: Any, stamp: float, send: Callable[[Any, float], Any]) -> None:
        """Send a joint state, changed by the fault."""
        self._send(STATE, value, stamp, send)

    def _send(self, sensor: str, value: Any, stamp: float, send: Callable[[Any, float], Any]) -> None:
        if self._hits(sensor):
            self._count += 1
            if self.fault == "silent":
                return
            if self.fault in ("late", "clock") or (self.fault == "out_of_order" and self._count % 2):
                stamp -= self.seconds
        send(value, stamp)

    def _hits(self, sensor: str) -> bool:
        return self.sensor is None or self.sensor == sensor
