"""Choose a grasp for an object: around it if it is narrow enough, or else by its knob or rim.

All grasps point straight down. The footprint of the hand is two open fingers, with the palm above them; grasps where
it would hit something cost more. What a direction costs in other states of the task counts more than what it costs in
the present one: an expert that takes a thing at another side in every scene cannot be imitated.

Shape legend: P points, G collision geoms, F points of a footprint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cogvla.libero.experts.places import Place
from cogvla.libero.experts.view import Obstacles, SceneView

WIDEST = 0.072
"""Largest width in metres that fits between the fingers."""
_UNDER_TOP = 0.035
"""Metres from the top of an object down to the grasp. The palm is a little higher than this above the fingertips."""
_LOWEST = 0.012
"""Least height of a grasp above the ground in metres: the fingers reach 9 mm below their middle."""
_KNOB_DEPTH = 0.006
"""Metres from the top of an object down to the grasp of its knob; the fingertips stay above what is wider."""
_UPRIGHT = 0.99
"""Least cosine of the angle between the vertical and an axis of a thing that stands upright."""
_RIM_DEPTH = 0.018
_RIM_INWARD = (0.004, 0.016, 0.028)
"""Metres from the rim inwards to the middle of the hand. Larger values are for rims with little room outside; the
closing fingers then pull the rim in."""
_ABOVE, _BELOW = 0.012, 0.004
"""Metres above and below the grasp that the finger pads touch."""
_STRETCHED = 0.62
"""Metres from the shoulder to the wrist; beyond, the elbow comes near its stop and the arm gets stuck."""
_YAWS = 24
PALM = np.array([(x, y) for x in np.linspace(-0.10, 0.10, 11) for y in (-0.03, 0.0, 0.03)])
_FINGERS = np.array([(s * x, y) for s in (-1, 1) for x in (0.040, 0.048, 0.056) for y in (-0.012, 0.0, 0.012)])
_HAND_REACH = float(np.linalg.norm(PALM, axis=1).max()) + 0.001
PALM_HEIGHT, _FINGER_DEPTH = 0.03, 0.010
_SAFETY = 0.008
_HIT = 1.0
"""Cost of hitting anything at all: a hand that stands on something does not get down to its grasp."""
_PRESENT = 0.02
"""Weight of the effort in the present state beside the mean cost in other states of the task."""
_MISSING = 1.0
"""Cost of a direction in a state where the thing is too wide in it."""

Where = Callable[[SceneView], Place]
"""Where a thing goes, in a state of the simulation."""
Direction = tuple[bool, int]
"""By the rim or around the thing, and the number of the angle in the world at which the fingers close."""


@dataclass(frozen=True)
class Grasp:
    """A grasp of a thing, in the frame of the thing's body.

    Attributes:
        offset: vector from the body's origin to the point between the fingertips [3], in metres.
        closing: unit vector along which the fingers close [3].
        rim: True if the hand takes the thing by its rim.
    """

    offset: np.ndarray
    closing: np.ndarray
    rim: bool


def candidates(view: SceneView, item: str, where: Where, usual: Sequence[SceneView] = ()) -> list[tuple[float, Grasp]]:
    """Return all grasps of a thing in its present pose with their costs, the best first.

    Args:
        view: state of the simulation.
        item: name of the thing.
        where: place that the thing goes to. A grasp costs more if the hand hits something or the arm is stretched out,
            at either end.
        usual: other states of the same task. A grasp costs more if its direction is a costly one there.
    """
    elsewhere = [_by_direction(other, item, where) for other in usual]
    found = []
    for direction, hits, effort, grasp in _scored(view, item, where):
        if elsewhere:
            effort = _PRESENT * effort + float(np.mean([costs.get(direction, _MISSING) for costs in elsewhere]))
        found.append((hits + effort, grasp))
    assert found, f"no grasp for {item}"
    return sorted(found, key=lambda pair: pair[0])


def _by_direction(view: SceneView, item: str, where: Where) -> dict[Direction, float]:
    """Return the least cost of each direction."""
    costs: dict[Direction, float] = {}
    for direction, hits, effort, _ in _scored(view, item, where):
        costs[direction] = min(hits + effort, costs.get(direction, np.inf))
    return costs


def _scored(view: SceneView, item: str, where: Where) -> Iterator[tuple[Direction, float, float, Grasp]]:
    """Give all grasps of a thing, with what they cost because the hand hits something, and because of the effort."""
    points_P3 = view.points(item)
    low, high = points_P3.min(0), points_P3.max(0)
    origin, frame = view.position(item), view.frame(item)
    obstacles, place = view.obstacles(item), where(view)
    now = view.rotation[:, 0]

    def scored(point: np.ndarray, closing: np.ndarray, effort: float, rim: bool) -> tuple[float, float, Grasp]:
        end = point + place.point - (origin[0], origin[1], low[2])
        if place.walls is not None:
            end[2] = max(end[2], place.walls)
        stretch = max(view.stretch(point), view.stretch(np.array([end[0], end[1], point[2]])))
        turn = float(np.arccos(np.clip(abs(closing @ now), 0.0, 1.0)))
        blocked, blocked_there = _blocked(point, closing, obstacles), _blocked(end, closing, obstacles)
        hits = 2.0 * blocked + (_HIT if blocked else 0.0)
        effort += 0.3 * turn + blocked_there + 10.0 * max(stretch - _STRETCHED, 0.0)
        return hits, effort, Grasp(frame.T @ (point - origin), frame.T @ closing, rim)

    angles = np.arange(2 * _YAWS) * (np.pi / _YAWS)
    narrow = False
    levels = [(max(high[2] - _UNDER_TOP, low[2] + _LOWEST), _BELOW)]
    if np.abs(frame[2]).max() > _UPRIGHT:  # what is narrow at the top of a tilted thing is no knob, but its rim
        levels.append((max(high[2] - _KNOB_DEPTH, low[2] + _LOWEST), _FINGER_DEPTH))
    for at, below in levels:
        if narrow:
            return  # a knob is for things that are too wide below
        around_P3 = view.points_between(item, at - below, at + _ABOVE)
        for number, angle in enumerate(angles[:_YAWS]):
            closing = np.array([np.cos(angle), np.sin(angle), 0.0])
            across = np.array([-closing[1], closing[0], 0.0])
            along_P, aside_P = around_P3 @ closing, around_P3 @ across
            width = float(np.ptp(along_P))
            if width <= WIDEST:
                narrow = True
                centre = closing * (along_P.max() + along_P.min()) / 2 + across * (aside_P.max() + aside_P.min()) / 2
                point = np.array([centre[0], centre[1], at])
                yield (False, number), *scored(point, closing, 10.0 * max(width - 0.06, 0.0), rim=False)
    if narrow:
        return
    centre = (low + high) / 2
    top_P3 = points_P3[points_P3[:, 2] > high[2] - 0.01] - centre
    for number, angle in enumerate(angles):
        out = np.array([np.cos(angle), np.sin(angle), 0.0])
        near_P = np.abs(top_P3 @ np.array([-out[1], out[0], 0.0])) < 0.02
        if near_P.any():
            for inward in _RIM_INWARD:
                point = centre + (float((top_P3[near_P] @ out).max()) - inward) * out
                point[2] = max(high[2] - _RIM_DEPTH, low[2] + _LOWEST)
                yield (True, number), *scored(point, out, 12.0 * inward, rim=True)


def spots(footprint_F2: np.ndarray, point: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Return where a footprint is, [F,2], of a hand over a point [3] that closes along a direction [3]."""
    return point[:2] + footprint_F2 @ np.array([closing[:2], (-closing[1], closing[0])])


def _blocked(point: np.ndarray, closing: np.ndarray, obstacles: Obstacles) -> float:
    """Return the share of the palm's footprint that hits obstacles, plus that of the fingers: between 0 and 2."""
    obstacles = obstacles.near(point - (0.0, 0.0, _FINGER_DEPTH), _HAND_REACH, _SAFETY)
    if not len(obstacles.top_G):
        return 0.0
    share = 0.0
    for footprint_F2, height in ((PALM, point[2] + PALM_HEIGHT), (_FINGERS, point[2] - _FINGER_DEPTH)):
        under_FG = obstacles.under(spots(footprint_F2, point, closing), _SAFETY)
        share += float((under_FG & (obstacles.top_G > height)).any(axis=1).mean())
    return share
