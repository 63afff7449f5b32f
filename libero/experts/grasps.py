"""Choose a grasp for an object: around it if it is narrow enough, or else by its knob or rim.

All grasps point straight down. The footprint of the hand is two open fingers, with the palm above them; grasps where
it would hit something cost more.

Shape legend: P points, O obstacles, F points of a footprint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cogvla.libero.experts.view import Obstacles, SceneView

WIDEST = 0.072
"""Largest width in metres that fits between the fingers."""
_UNDER_TOP = 0.035
"""Metres from the top of an object down to the grasp. The palm is a little higher than this above the fingertips."""
_LOWEST = 0.012
"""Least height of a grasp above the ground in metres: the fingers reach 9 mm below their middle."""
_KNOB_DEPTH = 0.006
"""Metres from the top of an object down to the grasp of its knob; the fingertips stay above what is wider."""
_RIM_DEPTH = 0.018
_RIM_INWARD = (0.004, 0.016, 0.028)
"""Metres from the rim inwards to the middle of the hand. Larger values are for rims with little room outside; the
closing fingers then pull the rim in."""
_ABOVE, _BELOW = 0.012, 0.004
"""Metres above and below the grasp that the finger pads touch."""
_STRETCHED = 0.62
"""Metres from the shoulder to the wrist; beyond, the elbow comes near its stop and the arm gets stuck."""
_YAWS = 24
_PALM = np.array([(x, y) for x in np.linspace(-0.10, 0.10, 11) for y in (-0.03, 0.0, 0.03)])
_FINGERS = np.array([(s * x, y) for s in (-1, 1) for x in (0.040, 0.048, 0.056) for y in (-0.012, 0.0, 0.012)])
_PALM_HEIGHT, _FINGER_DEPTH = 0.03, 0.010
_SAFETY = 0.008


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


def candidates(view: SceneView, item: str, place: np.ndarray | None = None) -> list[tuple[float, Grasp]]:
    """Return all grasps of a thing in its present pose with their costs, the best first.

    Args:
        view: state of the simulation.
        item: name of the thing.
        place: where the thing goes [3], or None. A grasp costs more if the arm is stretched out at either end.
    """
    points_P3 = view.points(item)
    low, high = points_P3.min(0), points_P3.max(0)
    origin, frame = view.position(item), view.frame(item)
    obstacles = view.obstacles(item)
    height = max(high[2] - _UNDER_TOP, low[2] + _LOWEST)
    now = view.rotation[:, 0]
    found: list[tuple[float, Grasp]] = []

    def add(point: np.ndarray, closing: np.ndarray, cost: float, rim: bool) -> None:
        moved = np.zeros(3) if place is None else place - origin
        stretch = max(view.stretch(point), view.stretch(point + moved * (1.0, 1.0, 0.0)))
        turn = float(np.arccos(np.clip(abs(closing @ now), 0.0, 1.0)))
        blocked = _blocked(point, closing, obstacles)
        cost += 0.3 * turn + 2.0 * blocked + 10.0 * max(stretch - _STRETCHED, 0.0)
        found.append((cost, Grasp(frame.T @ (point - origin), frame.T @ closing, rim)))

    angles = np.arange(_YAWS) * (np.pi / _YAWS)
    knob = max(high[2] - _KNOB_DEPTH, low[2] + _LOWEST)
    for at, below in ((height, _BELOW), (knob, _FINGER_DEPTH)):
        if found:
            break  # a knob is for things that are too wide below
        around_P3 = view.points_between(item, at - below, at + _ABOVE)
        for angle in angles:
            closing = np.array([np.cos(angle), np.sin(angle), 0.0])
            across = np.array([-closing[1], closing[0], 0.0])
            along_P, aside_P = around_P3 @ closing, around_P3 @ across
            width = float(np.ptp(along_P))
            if width <= WIDEST:
                centre = closing * (along_P.max() + along_P.min()) / 2 + across * (aside_P.max() + aside_P.min()) / 2
                add(np.array([centre[0], centre[1], at]), closing, 10.0 * max(width - 0.06, 0.0), False)
    if not found:
        centre = (low + high) / 2
        top_P3 = points_P3[points_P3[:, 2] > high[2] - 0.01] - centre
        for angle in np.concatenate([angles, angles + np.pi]):
            out = np.array([np.cos(angle), np.sin(angle), 0.0])
            near_P = np.abs(top_P3 @ np.array([-out[1], out[0], 0.0])) < 0.02
            if near_P.any():
                for inward in _RIM_INWARD:
                    point = centre + (float((top_P3[near_P] @ out).max()) - inward) * out
                    add(
                        np.array([point[0], point[1], max(high[2] - _RIM_DEPTH, low[2] + _LOWEST)]),
                        out,
                        12.0 * inward,
                        True,
                    )
    assert found, f"no grasp for {item}"
    return sorted(found, key=lambda pair: pair[0])


def _blocked(point: np.ndarray, closing: np.ndarray, obstacles: Obstacles) -> float:
    """Return the share of the palm's footprint that hits obstacles, plus that of the fingers: between 0 and 2."""
    axes = np.array([closing[:2], (-closing[1], closing[0])])
    share = 0.0
    for footprint_F2, height in ((_PALM, point[2] + _PALM_HEIGHT), (_FINGERS, point[2] - _FINGER_DEPTH)):
        spots_F2 = point[:2] + footprint_F2 @ axes
        share += float((obstacles.under(spots_F2, _SAFETY) & (obstacles.top_G > height)).any(axis=1).mean())
    return share
