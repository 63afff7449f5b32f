"""A joint trajectory controller like that of ros2_control: straight lines between points, until the next trajectory."""

from __future__ import annotations

from typing import Any

import numpy as np


class TrajectoryController:
    """Follows trajectories [N,D] of (time from the start, position); a new one begins at the desired position.

    Attributes:
        received: number of trajectories.
    """

    def __init__(self, start_D: np.ndarray) -> None:
        self._times: np.ndarray = np.zeros(1)
        self._points_ND: np.ndarray = np.asarray(start_D, float)[None]
        self.received = 0

    def take(self, times_s: Any, points_ND: np.ndarray, now: float) -> None:
        """Follow a trajectory from now on; it has at least one point, at increasing times."""
        times = np.asarray(times_s, float)
        assert len(times), "a controller refuses empty trajectories"
        assert (np.diff(times, prepend=0.0) > 0).all(), "a controller refuses points that are not in order"
        self._points_ND = np.concatenate([self.desired(now)[None], points_ND])
        self._times = np.concatenate([[now], now + times])
        self.received += 1

    def desired(self, now: float) -> np.ndarray:
        """Where the joints [D] are to be; after the last point, there."""
        return np.array([np.interp(now, self._times, column) for column in self._points_ND.T])
