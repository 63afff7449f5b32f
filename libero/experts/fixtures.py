"""Skills of the LIBERO expert for drawers, doors, knobs and plates.

Shape legend: P points, G collision geoms.
"""

from __future__ import annotations

import numpy as np

from cogvla.envs.rotations import rotation_matrix, rotation_vector
from cogvla.libero.experts.grasps import PALM
from cogvla.libero.experts.hand import Hand
from cogvla.libero.experts.motion import CLOSE, DOWN, OPEN, Move, along, over, pointing, turn_left
from cogvla.libero.experts.places import place_for
from cogvla.libero.experts.view import Joint, SceneView

_UP = np.array([0.0, 0.0, 1.0])
_PULL = 0.07
"""Metres from the drawer's bar to the aim while the hand pulls."""
_TURN = 0.9
"""Radians from the hand's rotation to the aim while the hand turns a knob."""
_KNOB_DEPTH = 0.02
_BEFORE = 0.06
"""Metres in front of a drawer or door where a push starts."""
_DOOR_SIDE = 0.85
"""Point where a door is pushed, as a fraction of the way from its hinge to its far side."""
_LEAN = 0.4
"""Radians that a hand leans back which shuts a drawer."""
_PUSH = 0.06
_TILT = 0.5
"""Radians below the horizontal that the hand points which slides something in."""
_OVER_FLOOR, _BEFORE_DOOR = 0.010, 0.10
"""Metres over the floor of a fixture, and before the inside of it, where the item has to be in line."""
_TURNED, _TURNING = 0.2, 0.8
"""Radians that are left when a turn is done, and more that are left when it has only begun."""
_TURN_BEFORE, _TURN_ABOVE, _NEAR_TURN, _FAR_FROM_TURN = 0.10, 0.12, 0.05, 0.15
"""Metres before and above the handle where the hand turns; and beside that spot where it has turned, and starts to."""
_IN_LINE, _DEEP_ENOUGH = 0.012, 0.010
"""Metres beside the way in up to which an item goes in (from twice as far away, it goes back); and from its place."""
_RIM, _HANDLE = 0.01, 0.9
_PRESS_DEPTH = 0.006
_PLATE_DEPTH = 0.006
_ON_PLATE = 0.045
_STRIDE = 0.035
_AT_EASE, _HAND, _FARTHEST_LEAN = 0.62, 0.2, 0.5
"""Metres from shoulder to wrist, up to which the hand points down; from wrist to fingertips; radians at most."""
_PALM, _FINGERS = 0.15, 0.08
"""Metres from the middle of the hand to the end of its palm, and some more; and from the fingertips to the palm."""
_BESIDE, _INSIDE = 0.015, 0.012
"""Metres between a pushed thing and others, and from the border of the region to its middle."""


def open_drawer(hand: Hand, region: str) -> Move:
    """Grip the bar of a drawer from the front and pull."""
    view, joint = hand.view, _joint(hand, region)
    bar = view.outermost(view.joint_body(joint), joint.out)
    rotation = pointing(-joint.out, _UP, view.rotation)
    if hand.grips(region, bar, view.joint_body(joint)):
        return Move("pull", bar + _PULL * joint.out, rotation, CLOSE)
    return hand.grip(region, bar, rotation, along(view, bar, -joint.out, rotation))


def turn_on(hand: Hand, fixture: str) -> Move:
    """Grip a knob from above and turn it."""
    view, joint = hand.view, _joint(hand, fixture)
    knob = view.joint_body(joint)
    top = view.box(knob)[1][2]
    ridge_P3 = view.points_between(knob, top - _KNOB_DEPTH, top)
    axes = view.frame(knob)[:, :2].T
    closing = min(axes, key=lambda axis: float(np.ptp(ridge_P3 @ axis)))
    centre = (ridge_P3.min(0) + ridge_P3.max(0)) / 2
    point = np.array([centre[0], centre[1], top - _KNOB_DEPTH])
    rotation = pointing(DOWN, closing, view.rotation)
    if hand.grips(fixture, point, knob):
        return Move("turn", point, rotation_matrix(_TURN * joint.axis) @ hand.level(), CLOSE)
    return hand.grip(fixture, point, rotation, over(view, point, rotation, without=(fixture,)))


def close(hand: Hand, name: str) -> Move:
    """Push the bar of a drawer, or the far side of a door, with the fist.

    At a drawer the hand leans back, or the palm would hit the bars of the drawers above.
    """
    view, joint = hand.view, _joint(hand, name)
    body = view.joint_body(joint)
    rotation = hand.level()
    if view.is_thing(name):
        points_P3 = view.points(body)
        arms_P3 = (points_P3 - joint.pivot) * (1.0, 1.0, 0.0)
        arm = arms_P3[np.linalg.norm(arms_P3, axis=1).argmax()]
        bar = joint.pivot + _DOOR_SIDE * arm
        bar[2] = points_P3[:, 2].max() - _KNOB_DEPTH
        out = np.cross(joint.out, arm) / np.linalg.norm(arm)
    else:
        bar, out = view.outermost(body, joint.out), joint.out
        rotation = pointing(np.cos(_LEAN) * DOWN - np.sin(_LEAN) * out, np.cross(out, _UP), view.rotation)
    offset = view.gripper - bar
    ahead = float(offset @ out)
    aside = offset - ahead * out
    if 0.0 < ahead < _BEFORE + 0.03 and float(np.linalg.norm(aside)) < 0.025:
        return Move("push", bar - _PUSH * out, rotation, CLOSE)
    return Move("approach", over(view, bar + _BEFORE * out, rotation), rotation, hand.fist())


def insert(hand: Hand, item: str, region: str) -> Move:
    """Take an item by its handle, from the front, and slide it into a fixture that is open at one side only."""
    view = hand.view
    inward, middle = _inside(view, item, region)
    handle = _handle(view, item)
    way_in, opens = np.cos(_TILT) * inward + np.sin(_TILT) * DOWN, np.cross(_UP, inward)
    rotation = np.column_stack([opens, np.cross(way_in, opens), way_in])  # always this one: both may be equally near
    low, high = view.box(item)
    way = middle - np.array([*(low + high)[:2] / 2, low[2] - _OVER_FLOOR])
    deep = float(way @ inward)
    aside = way - deep * inward
    if deep < _DEEP_ENOUGH:
        leaving = hand.leave()
        return Move("release", view.gripper, view.rotation, OPEN) if leaving is None else leaving
    if not hand.grips(item, handle, item):
        return hand.grip(item, handle, *_to_handle(hand, handle, inward, rotation))
    before = deep - float(np.abs(inward) @ view.region_half(region)) - _BEFORE_DOOR
    in_line = float(np.clip(2.0 - np.linalg.norm(aside) / _IN_LINE, 0.0, 1.0))
    ahead = in_line * min(deep, _STRIDE) + (1.0 - in_line) * float(np.clip(before, -_STRIDE, _STRIDE))
    return Move("transport" if before > 0.0 else "lower", view.gripper + aside + ahead * inward, rotation, CLOSE)


def _to_handle(
    hand: Hand, handle: np.ndarray, inward: np.ndarray, rotation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the next rotation [3,3] and position [3] of the hand on its way to a `handle` [3], from the front.

    The hand turns above and before the handle, with room for the palm beside an open door. The closer it is to that
    spot, the further it turns, and the further it has turned, the closer it comes: without steps that nobody can see.

    Args:
        hand: the hand.
        handle: middle of the handle [3].
        inward: way into the fixture [3] (unit vector).
        rotation: rotation of the hand [3,3] at the handle.
    """
    view = hand.view
    aim = along(view, handle, rotation[:, 2], rotation)
    if hand.closing:
        return rotation, aim
    before = float(np.clip((handle - view.gripper) @ inward, 0.0, _TURN_BEFORE))
    beside = float(np.hypot(*(handle - before * inward - view.gripper)[:2]))
    near = float(np.clip((_FAR_FROM_TURN - beside) / (_FAR_FROM_TURN - _NEAR_TURN), 0.0, 1.0))
    level = hand.level()
    partly = rotation_matrix(near * rotation_vector(rotation @ level.T)) @ level
    spot = over(view, handle - _TURN_BEFORE * inward + _TURN_ABOVE * _UP, partly)
    left = float(np.clip((np.linalg.norm(turn_left(view, rotation)) - _TURNED) / _TURNING, 0.0, 1.0))
    return partly, left * spot + (1.0 - left) * aim


def _inside(view: SceneView, item: str, region: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the way into a fixture from its open side [3], and the point for an item on the floor inside [3].

    That is the middle, or beside it while a door that is not wide open would meet the palm where the hand is now.
    """
    owner, centre = view.owner(region), view.position(region)
    assert owner is not None, f"{region} belongs to a thing"
    axes = view.region_frame(region)[:, :2].T
    sides = [sign * axis for axis in axes for sign in (-1.0, 1.0)]
    inward = -max(sides, key=lambda side: view.room(owner, centre, side))
    across = np.cross(inward, _UP)
    left, right = (view.room(owner, centre, side) for side in (across, -across))
    point = centre + (left - right) / 2 * across
    point[2] = centre[2] - view.room(owner, centre, DOWN)
    joint = view.joint(owner)
    if joint is not None:
        low, high = view.box(item)
        room = (left + right - float(np.abs(across) @ (high - low))) / 2 - _INSIDE
        door_P3 = view.points(view.joint_body(joint))
        nearest = door_P3[np.abs((door_P3 - point) @ across).argmin()]
        depth = float((view.gripper - nearest) @ inward) / max(float((joint.pivot - nearest) @ inward), 1e-3)
        door = float((nearest + np.clip(depth, 0.0, 1.0) * (joint.pivot - nearest) - point) @ across)
        point -= np.sign(door) * np.clip(float(PALM[:, 0].max()) + _BESIDE - abs(door), 0.0, max(room, 0.0)) * across
    return inward, point


def _handle(view: SceneView, item: str) -> np.ndarray:
    """Return the middle [3] of what sticks out most from an upright item."""
    points_P3 = view.points(item)
    rim_P3 = points_P3[points_P3[:, 2] > points_P3[:, 2].max() - _RIM]
    out_P = np.linalg.norm((points_P3 - (rim_P3.min(0) + rim_P3.max(0)) / 2)[:, :2], axis=1)
    far_P3 = points_P3[out_P > _HANDLE * out_P.max()]
    return (far_P3.min(0) + far_P3.max(0)) / 2


def push(hand: Hand, item: str, where: str) -> Move:
    """Press the fist lightly onto a plate and drag it to a place. Pressed hard, the plate would stick to the table."""
    view = hand.view
    way = _around(view, item, _clear_point(view, item, where) - view.position(item)[:2])
    left = float(np.hypot(*way))
    grip = hand.fist()
    surface = view.position(item) + np.array([*_aside_of_tall(view, item), _PLATE_DEPTH])
    rotation = _reaching(view, view.stretch(surface))
    offset = surface - view.gripper
    if float(np.hypot(offset[0], offset[1])) < _ON_PLATE and -offset[2] < 0.02:
        ahead = min(left + 0.01, _STRIDE) * way / max(left, 1e-6)
        return Move("push", np.array([*(view.gripper[:2] + ahead), surface[2] - _PRESS_DEPTH]), rotation, CLOSE)
    return Move("approach", over(view, surface, rotation, without=(item,), tolerance=0.01), rotation, grip)


def _reaching(view: SceneView, stretch: float) -> np.ndarray:
    """Return the rotation [3,3] of a fist at a far aim: it leans outward, so that the wrist stays nearer."""
    outward = view.reach * (1.0, 1.0, 0.0) / np.hypot(*view.reach[:2])
    lean = float(np.clip((stretch - _AT_EASE) / _HAND, 0.0, _FARTHEST_LEAN))
    return pointing(np.cos(lean) * DOWN + np.sin(lean) * outward, np.cross(outward, _UP), view.rotation)


def _clear_point(view: SceneView, item: str, where: str) -> np.ndarray:
    """Return the point [2] of a region with the most room around it; its middle if there is room."""
    if view.is_thing(where):
        return place_for(view, where).point[:2]
    half = np.maximum(view.region_half(where)[:2] - _INSIDE, 0.0)
    steps = np.linspace(-1.0, 1.0, 7)
    spots_P2 = view.position(where)[:2] + np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) * half
    radius = _radius(view, item)
    room_P = np.array([min(_gaps(view, item, spot)[1], default=np.inf) for spot in spots_P2])
    lacking_P = np.maximum(radius + _BESIDE - room_P, 0.0)
    return spots_P2[(10.0 * lacking_P + np.linalg.norm(spots_P2 - view.position(where)[:2], axis=1)).argmin()]


def _around(view: SceneView, item: str, way: np.ndarray) -> np.ndarray:
    """Return a way [2] of the same length past things that a pushed one would hit: it slides along them."""
    radius, length = _radius(view, item), float(np.hypot(*way))
    toward_G2, gap_G = _gaps(view, item, view.position(item)[:2])
    turned = way.copy()
    for toward, gap in sorted(zip(toward_G2, gap_G, strict=True), key=lambda pair: -pair[1]):
        into = float(turned @ toward)
        if gap < radius + _BESIDE and gap < length and into > 0.0:
            turned = turned - into * toward * (1.0 if gap > radius else 1.2)
    size = float(np.hypot(*turned))
    return way if size < 0.1 * length else turned * length / size


def _aside_of_tall(view: SceneView, item: str) -> np.ndarray:
    """Return the way [2] from a thing's middle to where a fist comes down whose palm clears the nearest tall thing."""
    toward_G2, gap_G = _gaps(view, item, view.position(item)[:2], above=_FINGERS)
    near = min(gap_G, default=np.inf)
    return -min(_PALM - near, _ON_PLATE / 2) * toward_G2[gap_G.argmin()] if near < _PALM else np.zeros(2)


def _gaps(view: SceneView, item: str, spot: np.ndarray, above: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the directions [G,2] and distances [G] from a point [2] to the things beside one, or so far above it."""
    obstacles = view.obstacles(item)
    height = view.box(item)[1][2] + above
    low_G = (obstacles.bottom_G < height) & ((obstacles.top_G > height) if above else True)
    reach_G2 = np.einsum("gij,gj->gi", np.abs(obstacles.rotation_G33), obstacles.half_G3)[low_G, :2]
    centre_G2 = obstacles.centre_G3[low_G, :2]
    offset_G2 = np.clip(spot, centre_G2 - reach_G2, centre_G2 + reach_G2) - spot
    gap_G = np.linalg.norm(offset_G2, axis=1)
    return offset_G2 / np.maximum(gap_G, 1e-6)[:, None], gap_G


def _radius(view: SceneView, item: str) -> float:
    low, high = view.box(item)
    return float((high - low)[:2].max()) / 2


def _joint(hand: Hand, name: str) -> Joint:
    joint = hand.view.joint(name)
    assert joint is not None, f"{name} has no joint"
    return joint
