"""What a task asks for, as data: a verb, an item and where it should go; when it holds, and its labels.

A task is one goal, or two in a row. Success, labels and experts are defined once per verb and shared by all suites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cogvla.envs.tabletop.arm import FINGER_OPEN
from cogvla.envs.tabletop.scene import PLATE_HEIGHT, TRAY_FLOOR, TRAY_WALL, Pose, Scene

VERBS = ("put", "push", "open", "press")
RELEASED_OPENING = 0.8 * FINGER_OPEN
"""A finger further out than this has let go."""
OPENED = 0.07
"""Metres of travel from which a drawer counts as open."""
PULL_TO = 0.09
RELEASE_GAP = 0.008
"""How far above its support an item may still be when the gripper lets go."""


@dataclass(frozen=True)
class Goal:
    """`put` item in, on or onto destination; `push` item to destination; `open` or `press` item."""

    verb: str
    item: str
    destination: str = ""

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise ValueError(f"unknown verb {self.verb!r}; one of {', '.join(VERBS)}")
        if bool(self.destination) != (self.verb in ("put", "push")):
            raise ValueError(f"goal {self!r}: put and push need a destination, open and press have none")


@dataclass(frozen=True)
class Layout:
    """One drawn scene: where the items stand, and the goals of every task that can be carried out in it."""

    poses: dict[str, Pose]
    goals: Mapping[int, tuple[Goal, ...]]


def destination_point(scene: Scene, goal: Goal) -> np.ndarray:
    """Where the item's centre should come to rest [3]; for open and press, where the handle or button ends."""
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
    """Whether the item is where it should be, held or not."""
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
    """Whether the goal is reached: in place and, for what was carried, let go. `fingers` [2], `gripper` centre [3]."""
    if not in_place(scene, goal):
        return False
    if goal.verb != "put":
        return True
    away = float(np.linalg.norm(gripper - scene.position(goal.item))) > 0.06
    return away or bool(fingers.min() > RELEASED_OPENING)


def labels(scene: Scene, goal: Goal) -> dict[str, np.ndarray]:
    """`target` float32 [3], what to manipulate, and `goal` float32 [3], where it should end, in the world frame."""
    return {
        "target": scene.contact_point(goal.item).astype(np.float32),
        "goal": destination_point(scene, goal).astype(np.float32),
    }
