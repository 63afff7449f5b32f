"""Drawing collision-free places on the table.

`Placer` holds what is already there as ellipses (wider along y, the direction in which the fingers open) and draws
further places by vectorised rejection: one batch of candidates per item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from cogvla.envs.tabletop.scene import Pose

Drawn = TypeVar("Drawn")

REGION = np.array([[0.36, -0.21], [0.66, 0.21]])
"""Lowest and highest (x, y) of an item's centre: what the arm reaches and `agentview` shows."""
CLEARANCE = (0.012, 0.040)
"""Free space between two items along x and y that an open gripper needs around the one that it takes."""
_BATCH = 64
_TRIES = 300


class NoRoomError(Exception):
    """A batch of candidates held no valid place; the caller draws the scene again."""


class Placer:
    """Draws places inside `region` [2,2] that keep clear of all earlier ones."""

    def __init__(self, rng: np.random.Generator, region: np.ndarray = REGION) -> None:
        self._rng = rng
        self._region = region
        self._places: list[tuple[float, float, float]] = []

    def add(self, x: float, y: float, radius: float) -> None:
        """Occupy a disc."""
        self._places.append((x, y, radius))

    def free(self, candidates: np.ndarray, radius: float) -> np.ndarray:
        """Mask [N] of the candidate centres [N,2] at which a disc of this radius keeps clear of everything."""
        mask = np.ones(len(candidates), dtype=bool)
        for x, y, other in self._places:
            reach = radius + other
            dx = (candidates[:, 0] - x) / (reach + CLEARANCE[0])
            dy = (candidates[:, 1] - y) / (reach + CLEARANCE[1])
            mask &= dx * dx + dy * dy > 1.0
        return mask

    def candidates(self, margin: float = 0.0) -> np.ndarray:
        """Uniform points [N,2] in the region, `margin` inside its border."""
        low, high = self._region[0] + margin, self._region[1] - margin
        return self._rng.uniform(low, high, (_BATCH, 2))

    def draw(self, radius: float, *, margin: float = 0.0, turn: float = np.pi, also: np.ndarray | None = None) -> Pose:
        """A free place with a yaw in [-turn, turn]; `also` [N,2] replaces the candidates. Raises `NoRoomError`."""
        points = self.candidates(margin) if also is None else also
        valid = np.flatnonzero(self.free(points, radius))
        if not len(valid):
            raise NoRoomError
        x, y = points[valid[0]]
        self.add(float(x), float(y), radius)
        return Pose(float(x), float(y), float(self._rng.uniform(-turn, turn)) if turn else 0.0)


def until_drawn(draw: Callable[[], Drawn]) -> Drawn:
    """Call `draw` until it finds room."""
    for _ in range(_TRIES):
        try:
            return draw()
        except NoRoomError:
            continue
    raise RuntimeError(f"no valid layout in {_TRIES} draws; the items do not fit the region")
