"""Draw collision-free places on the table.

`Placer` keeps the occupied places as ellipses (wider along y, where the fingers open) and draws new places by
vectorised rejection, with one batch of candidates for each item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from cogvla.envs.tabletop.scene import Pose

Drawn = TypeVar("Drawn")

REGION = np.array([[0.36, -0.21], [0.66, 0.21]])
"""Lowest and highest (x, y) of an item's centre in metres: the arm reaches this region, and `agentview` shows it."""
CLEARANCE = (0.012, 0.040)
"""Free space in metres along x and y that an open gripper needs around an item."""
_BATCH = 64
_TRIES = 300


class NoRoomError(Exception):
    """No candidate in a batch is a valid place; the caller draws the scene again."""


class Placer:
    """Draws places inside `region` [2,2] that are clear of all earlier places."""

    def __init__(
        self,
        rng: np.random.Generator,
        region: np.ndarray = REGION,
        occupied: Iterable[tuple[float, float, float]] = (),
    ) -> None:
        self._rng = rng
        self._region = region
        self._places = list(occupied)

    @property
    def occupied(self) -> tuple[tuple[float, float, float], ...]:
        """All occupied discs: x, y and radius in metres."""
        return tuple(self._places)

    def add(self, x: float, y: float, radius: float) -> None:
        """Occupy a disc."""
        self._places.append((x, y, radius))

    def free(self, candidates: np.ndarray, radius: float) -> np.ndarray:
        """Return bool [N]: a disc of this radius at the candidate centre [N,2] is clear of all occupied places."""
        mask = np.ones(len(candidates), dtype=bool)
        for x, y, other in self._places:
            reach = radius + other
            dx = (candidates[:, 0] - x) / (reach + CLEARANCE[0])
            dy = (candidates[:, 1] - y) / (reach + CLEARANCE[1])
            mask &= dx * dx + dy * dy > 1.0
        return mask

    def candidates(self, margin: float = 0.0) -> np.ndarray:
        """Draw uniform points [N,2] in the region, at least `margin` metres inside its border."""
        low, high = self._region[0] + margin, self._region[1] - margin
        return self._rng.uniform(low, high, (_BATCH, 2))

    def draw(self, radius: float, *, margin: float = 0.0, turn: float = np.pi, also: np.ndarray | None = None) -> Pose:
        """Draw and occupy a free place with a yaw in [-turn, turn] radians.

        Args:
            radius: radius of the item in metres.
            margin: least distance from the region's border in metres.
            turn: largest yaw in radians.
            also: candidates [N,2] to use instead of uniform ones.

        Raises:
            NoRoomError: no candidate is free.
        """
        points = self.candidates(margin) if also is None else also
        valid = np.flatnonzero(self.free(points, radius))
        if not len(valid):
            raise NoRoomError
        x, y = points[valid[0]]
        self.add(float(x), float(y), radius)
        return Pose(float(x), float(y), float(self._rng.uniform(-turn, turn)) if turn else 0.0)


def until_drawn(draw: Callable[[], Drawn]) -> Drawn:
    """Call `draw` until it finds room; RuntimeError after `_TRIES` calls."""
    for _ in range(_TRIES):
        try:
            return draw()
        except NoRoomError:
            continue
    raise RuntimeError(f"no valid layout in {_TRIES} draws: the items do not fit into the region")
