"""Move the hand of the LIBERO expert: through a funnel above its aim, and over everything in its way.

The higher the hand is above its aim, the further beside it it may be. While it is too low, it rises before it moves
sideways. A wrong rotation counts like a distance: the hand comes down when it is turned the right way.

Shape legend: G collision geoms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cogvla.envs.rotations import rotation_vector
from cogvla.libero.experts.grasps import PALM, PALM_HEIGHT, spots
from cogvla.libero.experts.view import SceneView

OPEN, CLOSE = -1.0, 1.0
DOWN = np.array([0.0, 0.0, -1.0])
_SLOPE = 5.0
_HOVER = 0.10
_STAND_OFF = 0.08
_ASIDE, _SLIGHTLY = 0.05, 0.01
_CLEARANCE = 0.025
_REACH = 0.055
"""Metres from the middle of the open hand to its side, at the height of the fingers."""
_FINGERTIP = 0.010
_OVER_AIM = 0.035
"""Metres around the aim where obstacles are ignored: the aim stands among them."""
_TURN_WEIGHT = 0.08
"""Metres beside the aim that count as much as one radian of wrong rotation."""


@dataclass(frozen=True)
class Move:
    """The next pose of the hand.

    Attributes:
        phase: one of `skills.PHASES`.
        position: position of the gripper [3], in metres, world frame.
        rotation: rotation of the hand [3,3], columns as in `SceneView.rotation`.
        gripper: `OPEN` or `CLOSE`.
    """

    phase: str
    position: np.ndarray
    rotation: np.ndarray
    gripper: float


def pointing(way: np.ndarray, closing: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Return the rotation [3,3] of a hand that points along `way` and closes along `closing` or its opposite.

    Of the two rotations, it is the one that is nearer to `now`.

    Args:
        way: unit vector [3].
        closing: unit vector [3], perpendicular to `way`.
        now: present rotation of the hand [3,3].
    """
    both = [np.column_stack([opens, np.cross(way, opens), way]) for opens in (closing, -closing)]
    return max(both, key=lambda rotation: float(np.trace(rotation @ now.T)))


def turn_left(view: SceneView, rotation: np.ndarray) -> np.ndarray:
    """Return the rotation that the hand still has to make to reach `rotation`: a rotation vector [3], world frame."""
    return rotation_vector(rotation @ view.rotation.T)


def over(
    view: SceneView,
    point: np.ndarray,
    rotation: np.ndarray,
    *,
    without: tuple[str, ...] = (),
    carried: str | None = None,
    tolerance: float = 0.006,
) -> np.ndarray:
    """Return the next position [3] of the hand on its way to `point`, from above.

    Args:
        view: state of the simulation.
        point: aim of the gripper [3].
        rotation: rotation of the hand at the aim [3,3].
        without: names of things that are not obstacles.
        carried: name of the thing in the hand, or None.
        tolerance: distance beside the aim in metres below which the hand may come down all the way.
    """
    hand = view.gripper
    offset = point - hand
    distance = float(np.hypot(offset[0], offset[1]))
    beside = distance + _TURN_WEIGHT * max(float(np.linalg.norm(turn_left(view, rotation))) - 0.1, 0.0)
    hang, reach = _FINGERTIP, _REACH
    if carried is not None:
        low, high = view.box(carried)
        if distance > _OVER_AIM and (away := _from_below(view, carried, low, high)) is not None:
            return hand + away
        hang = max(hang, hand[2] - low[2])
        reach = max(reach, float((high - low)[:2].max()) / 2)
    height = point[2] + float(np.clip(_SLOPE * (beside - tolerance), 0.0, _HOVER))
    if distance > _OVER_AIM:
        height = max(height, _tallest(view, hand, point, reach, (*without, *([carried] if carried else ()))) + hang)
    if carried is not None and distance > tolerance / 2:
        over_it = _highest_under_palm(view, carried, hand, point) - PALM_HEIGHT + _SLIGHTLY
        height = max(height, min(over_it, hand[2] + _SLIGHTLY))  # below it, the hand rises as it moves sideways
    sideways = float(np.clip(1.0 - (height - hand[2] - 0.01) / 0.04, 0.0, 1.0))
    return np.array([*(hand[:2] + sideways * offset[:2]), height])


def along(view: SceneView, point: np.ndarray, way: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Return the next position [3] of the hand on its way to `point`, along the direction `way` [3] (unit vector).

    The closer the hand is to that line, the closer it may come to the point.
    """
    offset = point - view.gripper
    aside = float(np.linalg.norm(offset - (offset @ way) * way))
    aside += _TURN_WEIGHT * max(float(np.linalg.norm(turn_left(view, rotation))) - 0.1, 0.0)
    return point - float(np.clip(_SLOPE * (aside - 0.008), 0.0, _STAND_OFF)) * way


def _from_below(view: SceneView, carried: str, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """Return the step [3] sideways for a carried thing under an open drawer; None if nothing is above the thing."""
    obstacles = view.obstacles(carried)
    middle = (low + high) / 2
    over_G = obstacles.under(middle[None, :2], float((high - low)[:2].max()) / 2)[0] & (obstacles.bottom_G > high[2])
    if not over_G.any():
        return None
    way = middle - obstacles.centre_G3[over_G].mean(0)
    way[2] = 0.0
    return _ASIDE * way / max(float(np.linalg.norm(way)), 1e-6) + np.array([0.0, 0.0, _SLIGHTLY])


def _highest_under_palm(view: SceneView, carried: str, hand: np.ndarray, point: np.ndarray) -> float:
    """Return the top, in metres, of what the palm would hit on its way down where the hand is, and not over a point."""
    obstacles = view.obstacles(carried)
    here_G, there_G = (obstacles.under(spots(PALM, at, view.rotation[:, 0])).any(axis=0) for at in (hand, point))
    hit_G = here_G & ~there_G & (obstacles.top_G > point[2] + PALM_HEIGHT)
    return float(obstacles.top_G[hit_G].max(initial=-np.inf))


def _tallest(view: SceneView, hand: np.ndarray, point: np.ndarray, reach: float, without: tuple[str, ...]) -> float:
    """Return the height in metres that the lowest part of the hand needs to pass over all obstacles on the way."""
    obstacles = view.obstacles(*without)
    way = point[:2] - hand[:2]
    length = float(np.hypot(*way))
    steps = np.linspace(0.0, 1.0 - _OVER_AIM / length, max(int(length / 0.03), 2))
    spots = hand[:2] + steps[:, None] * way
    tops = obstacles.top_G[obstacles.under(spots, reach).any(axis=0)]
    return float(tops.max()) + _CLEARANCE if len(tops) else -np.inf
