"""Goals of tabletop tasks as data: a verb, an item and its destination, with their success test and labels.

A task has one goal, or two in a row. Success, labels and skills are defined once for each verb, for all suites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cogvla.envs.tabletop.arm import FINGER_OPEN
from cogvla.envs.tabletop.scene import PLATE_HEIGHT, TRAY_FLOOR, TRAY_WALL, Pose, Scene

Shifts = Mapping[str, tuple[float, float]]
"""Item -> shift along x and y in metres."""
LABELS = 2
"""Meaning of the labels of suites with pushing, see `Suite.labels`; in 1, `target` was the centre of what is pushed."""
PUSH_FROM = 0.028
"""Metres behind the point of touch where the hand comes down to push."""
PUSH_HEIGHT = 0.016
"""Height of the gripper centre in metres while it pushes."""
PUSH_UNTIL = 0.016
"""Metres from the destination up to which the hand pushes, although the item is in place much earlier."""
_PUSHER = 0.0115
"""Half the width of the closed fingers in metres."""
VERBS = ("put", "push", "open", "press")
RELEASED_OPENING = 0.8 * FINGER_OPEN
"""Metres of finger position: a finger above this has let go."""
OPENED = 0.07
"""Metres of travel beyond which a drawer counts as open."""
PULL_TO = 0.09
RELEASE_GAP = 0.008
"""Largest gap in metres between an item and its support when the gripper lets go."""


@dataclass(frozen=True)
class Goal:
    """One goal: `put` item in or on destination, `push` item to destination, `open` item, or `press` item."""

    verb: str
    item: str
    destination: str = ""

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise ValueError(f"unknown verb {self.verb!r}; one of {', '.join(VERBS)}")
        if bool(self.destination) != (self.verb in ("put", "push")):
            raise ValueError(f"goal {self!r}: put and push need a destination, open and press must have none")


@dataclass(frozen=True)
class Layout:
    """One drawn scene.

    Attributes:
        poses: item -> pose.
        goals: task -> goals, for every task that is possible in it.
        occupied: discs (x, y, radius) in metres that items and the ways to them need.
    """

    poses: dict[str, Pose]
    goals: Mapping[int, tuple[Goal, ...]]
    occupied: tuple[tuple[float, float, float], ...]


def destination_point(scene: Scene, goal: Goal) -> np.ndarray:
    """Return the final position [3] of the item's centre; for `open` and `press`, of the handle or button."""
    if goal.verb == "open":
        return scene.contact_point(goal.item) + np.array([PULL_TO - scene.travel(goal.item), 0.0, 0.0])
    if goal.verb == "press":
        return scene.contact_point(goal.item)
    item, destination = scene.items[goal.item], scene.items[goal.destination]
    support = {
        "tray": TRAY_FLOOR,
        "plate": PLATE_HEIGHT,
        "cube": 2 * destination.half[2],
    }.get(destination.kind, 0.0)
    base = scene.position(goal.destination)
    if destination.free:
        base[2] -= destination.half[2]
    return base + np.array([0.0, 0.0, support + item.half[2]])


def in_place(scene: Scene, goal: Goal) -> bool:
    """Return True if the item is at its goal, even if the gripper still holds it."""
    if goal.verb == "open":
        return scene.travel(goal.item) > OPENED
    if goal.verb == "press":
        return goal.item in scene.latched
    item, destination = scene.items[goal.item], scene.items[goal.destination]
    offset = scene.position(goal.item) - destination_point(scene, goal)
    if abs(offset[2]) > RELEASE_GAP + 0.004:
        return False
    across = np.abs(offset[:2])
    if destination.kind == "tray":
        return bool((across < np.array(destination.half[:2]) - TRAY_WALL - 0.7 * item.half[0]).all())
    distance = float(np.hypot(*across))
    if destination.kind == "cube":
        return distance < 0.8 * destination.half[0]
    return distance < destination.half[0] - 0.4 * item.half[0]


def holds(scene: Scene, goal: Goal, fingers: np.ndarray, gripper: np.ndarray) -> bool:
    """Return True if the goal is reached: the item is in place and, for `put`, the gripper has let go.

    `fingers` [2]: finger positions; `gripper` [3]: gripper centre; both in metres.
    """
    if not in_place(scene, goal):
        return False
    if goal.verb != "put":
        return True
    away = float(np.linalg.norm(gripper - scene.position(goal.item))) > 0.06
    return away or bool(fingers.min() > RELEASED_OPENING)


def push_start(scene: Scene, goal: Goal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how to push an item: where the closed hand comes down [3], where it touches the item [3], the way [2].

    The closed fingers are a small square block behind the round item. They touch it with a face if the way is along an
    axis, and with a corner if it is oblique. The way is a unit vector; at the destination it is zero.
    """
    item = scene.position(goal.item)
    way = (scene.position(goal.destination) - item)[:2]
    ahead = way / max(float(np.hypot(*way)), 1e-6)
    reach = scene.items[goal.item].half[0] * ahead + _PUSHER * np.clip(ahead / 0.15, -1.0, 1.0)
    touch = np.array([*(item[:2] - reach), item[2]])
    return touch - PUSH_FROM * np.array([*ahead, 0.0]), touch, ahead


def push_offset(scene: Scene, goal: Goal, gripper: np.ndarray) -> float | None:
    """Return by how many metres the hand is beside the way of the item to push; None: it is not low behind the item."""
    _, touch, ahead = push_start(scene, goal)
    offset = gripper[:2] - touch[:2]
    behind, off = -float(offset @ ahead), float(offset @ np.array([-ahead[1], ahead[0]]))
    pushing = gripper[2] < PUSH_HEIGHT + 0.01 and abs(off) < 0.02 and -0.015 < behind < 0.05
    return off if pushing else None


def pushes_on(scene: Scene, goal: Goal, gripper: np.ndarray) -> bool:
    """Return True while the hand, still behind an item to push, has not brought it to the middle of its destination.

    Where another goal follows, a policy that has learned to leave as soon as the item is in place leaves a little
    earlier, too, and then stays between both goals (docs/learning.md).
    """
    if goal.verb != "push" or push_offset(scene, goal, gripper) is None:
        return False
    left = scene.position(goal.destination) - scene.position(goal.item)
    return float(np.hypot(left[0], left[1])) > PUSH_UNTIL


def labels(scene: Scene, goal: Goal) -> dict[str, np.ndarray]:
    """Return `target`, the point to manipulate, and `goal`, its final point: float32 [3], metres, world frame.

    For `push`, the target is where the hand comes down behind the item. A policy goes to its target: with the item's
    centre, or the point of touch, it comes down on the item (docs/learning.md).
    """
    target = push_start(scene, goal)[0] if goal.verb == "push" else scene.contact_point(goal.item)
    return {
        "target": target.astype(np.float32),
        "goal": destination_point(scene, goal).astype(np.float32),
    }
