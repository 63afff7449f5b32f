"""Compute where the LIBERO expert puts an object: the point for its lower end, and the tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cogvla.libero.experts.view import Joint, SceneView

_UP_THE_SLOPE, _ALONG_THE_RACK = 0.05, 0.05
"""Metres on a wine rack from the region's centre, away from the post in its middle."""
_BESIDE = 0.05
_INTO_DRAWER = 0.02
_INTO_DRAWER_DEPTH = 0.02
"""Metres below the upper end of a drawer's walls that the fingers may reach."""
_INTO_BOWL = 0.015
_BESIDE_DRAWER, _ENOUGH = 0.075, 0.055
"""Metres from what a drawer opens over to the middle of a thing that the hand takes beside it: aim, and what is enough.
Nearer, the hand, or the link above it, hits the drawer."""
_BEFORE_DRAWER = 0.12
_STILL_SHUT = 0.5
"""Fraction of a drawer's travel; from there on, it is too late to move things out of its way."""
_ROOM = 0.06
"""Metres from the middle of such a thing to the next one."""
_GRID = np.arange(-30, 31) * 0.01


@dataclass(frozen=True)
class Place:
    """A place to put an object.

    Attributes:
        point: aim for the middle of the object's lower end [3], in metres, world frame.
        tolerance: largest distance to the side, in metres.
        drop: largest height above the point to let go, in metres.
        walls: height of the walls around the place in metres, world frame; the fingers stay above them. None: no walls.
        fixture: name of the thing that carries or contains the place, or None.
    """

    point: np.ndarray
    tolerance: float
    drop: float
    walls: float | None = None
    fixture: str | None = None


def place_for(view: SceneView, name: str, side: int = 0) -> Place:
    """Return the place for a name in a goal: a region, or a thing to put something on.

    Args:
        view: state of the simulation.
        name: name of the region or thing.
        side: -1 or 1 if two objects go on the same surface, else 0.
    """
    if view.is_thing(name):
        low, high = view.box(name)
        centre = view.position(name)
        flat = high[2] - low[2] < 0.03
        point = np.array([centre[0], centre[1], low[2] + (0.009 if flat else 0.005)])
        return Place(point, 0.012, 0.012, walls=None if flat else high[2] - _INTO_BOWL, fixture=name)
    owner, centre = view.owner(name), view.position(name)
    if owner is None:
        return Place(centre, 0.015, 0.012)
    if "contain_region" in name:
        low, high = view.box(owner)
        return Place(np.array([centre[0], centre[1], low[2] + 0.03]), 0.02, 0.01, walls=high[2], fixture=owner)
    joint = view.joint(name)
    if joint is not None:
        low, high = view.box(view.joint_body(joint))
        point = centre + _INTO_DRAWER * joint.out
        point[2] = low[2] + 0.012
        return Place(point, 0.02, 0.03, walls=high[2] - _INTO_DRAWER_DEPTH, fixture=owner)
    frame = view.region_frame(name)
    if abs(frame[2, 2]) < 0.9:  # a slope; the region's third axis points up along it
        up = frame[:, 2] * np.sign(frame[2, 2])
        return Place(centre + _UP_THE_SLOPE * up + _ALONG_THE_RACK * frame[:, 0], 0.008, 0.004, fixture=owner)
    centre = centre + side * _BESIDE * frame[:, 0]
    top = view.top_at(owner, centre[:2])
    return Place(np.array([centre[0], centre[1], top]), 0.02, 0.01, fixture=owner)


def is_shut(view: SceneView, region: str) -> bool:
    """Return True for a drawer that is less than half open."""
    joint = view.joint(region)
    return joint is not None and joint.travel < _STILL_SHUT


def in_the_way(view: SceneView, item: str, region: str) -> bool:
    """Return True if a drawer opens over a thing, or so close to it that the hand could not take it there."""
    joint = view.joint(region)
    assert joint is not None
    return float(_beside(view, joint, view.position(item)[None, :2])[0]) < _ENOUGH


def place_beside(view: SceneView, item: str, region: str) -> Place:
    """Return the nearest free place on the table for a thing that a drawer would open over."""
    joint = view.joint(region)
    assert joint is not None
    now = view.position(item)
    spots_P2 = np.stack(np.meshgrid(_GRID, _GRID), -1).reshape(-1, 2) + now[:2].round(2)
    free_P = ~view.obstacles(item).under(spots_P2, _ROOM).any(axis=1)
    free_P &= _beside(view, joint, spots_P2) > _BESIDE_DRAWER
    if not free_P.any():
        free_P[:] = True
    nearest = spots_P2[free_P][np.linalg.norm(spots_P2[free_P] - now[:2], axis=1).argmin()]
    return Place(np.array([*nearest, view.table]), 0.015, 0.015)


def _beside(view: SceneView, joint: Joint, spots_P2: np.ndarray) -> np.ndarray:
    """Return the metres [P] to the side from what a drawer sweeps over to points [P,2]; inf far before it."""
    low, high = view.box(view.joint_body(joint))
    side = np.array([-joint.out[1], joint.out[0]])
    middle, half = (low + high)[:2] / 2, (high - low)[:2] / 2
    out = joint.out[:2]
    deep = float(np.abs(out) @ half)
    far_P = (spots_P2 - middle) @ out > 3 * deep + _BEFORE_DRAWER  # it opens by less than its depth
    aside_P = np.maximum(np.abs((spots_P2 - middle) @ side) - float(np.abs(side) @ half), 0.0)
    return np.where(far_P, np.inf, aside_P)
