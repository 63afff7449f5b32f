"""Time between two messages of /clock, for a simulation that publishes it seldom. This file does not import ROS 2."""

from __future__ import annotations

LONGEST_S = 0.5
"""Longest period of /clock in seconds that is bridged; a longer step means that somebody set the clock."""


class SteppingClock:
    """ROS time that goes on between two steps of the simulation's clock, for at most one step.

    Samples that a simulation stamps between two messages of /clock would otherwise lie a period in the future, or less.
    All times are seconds; `at_s` is of this computer's monotonic clock.
    """

    def __init__(self) -> None:
        self._last: tuple[float, float, float] | None = None  # ROS time, when it came, length of the step

    def step(self, ros_s: float, at_s: float) -> None:
        """Take note that the clock has gone, or was set, to `ros_s`."""
        length_s = 0.0 if self._last is None else ros_s - self._last[0]
        self._last = ros_s, at_s, length_s if 0.0 < length_s <= LONGEST_S else 0.0

    def now(self, ros_s: float, at_s: float) -> float:
        """Return the time, given what the ROS clock shows."""
        last = self._last
        if last is None or last[0] != ros_s:  # the system's clock, or a step that has only just come
            return ros_s
        return ros_s + min(max(at_s - last[1], 0.0), last[2])
