"""The perturbations of the tabletop suites: magnitudes of each level, and changes of scene, looks and start.

`docs/robustness.md` lists and shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from cogvla.envs.perturbation.appearance import (
    Appearance,
    draw_camera,
    draw_jolt,
    draw_light,
    draw_pale,
    draw_pattern,
    far_from,
)
from cogvla.envs.perturbation.perturbation import (
    BACKGROUND,
    CAMERA,
    LAYOUT,
    LIGHT,
    ROBOT,
    CrowdedSceneError,
    Values,
    by_level,
    signed,
    within,
)
from cogvla.envs.suite import EVERYWHERE
from cogvla.envs.tabletop.family import Family
from cogvla.envs.tabletop.goals import Layout, Shifts
from cogvla.envs.tabletop.placement import REGION, NoRoomError, Placer
from cogvla.envs.tabletop.scene import SPARE, SPARE_SIZE, Item, Pose

PIVOT = (0.49, 0.0, 0.0)
"""Point on the table, in metres, that `agentview` looks at."""
TABLE = ("table",)
PERTURBATIONS: Mapping[str, Sequence[Values]] = MappingProxyType(
    {
        **EVERYWHERE,
        # of `agentview`: degrees either way, factors of the distance (times or divided by) and of the width that is
        # seen (times); of `wrist`: shift and turn in its mount
        CAMERA: by_level(
            azimuth=([3, 8], [8, 18], [18, 35]),
            elevation=([2, 5], [5, 10], [10, 15]),
            roll=([0.3, 1], [1, 3], [3, 6]),
            distance=([1, 1.1], [1.1, 1.25], [1.25, 1.5]),
            width=([1, 1.03], [1.03, 1.1], [1.1, 1.25]),
            wrist_mm=([1, 3], [3, 8], [8, 15]),
            wrist_degrees=([0.3, 1], [1, 3], [3, 6]),
        ),
        # factors of the brightness (one of both), turn of the light's direction, relative change of its colours
        LIGHT: by_level(
            dark=([0.85, 0.95], [0.73, 0.85], [0.6, 0.73]),
            bright=([1.03, 1.1], [1.1, 1.2], [1.2, 1.3]),
            degrees=([10, 25], [25, 40], [40, 55]),
            tint=([0.03, 0.08], [0.08, 0.2], [0.2, 0.3]),
            shadows=(False, True, True),
        ),
        # of the table, in RGB of [0,1]: brighter or darker, colour, difference of a pattern's two brightnesses
        BACKGROUND: by_level(
            lightness=([0.04, 0.08], [0, 0.08], [0, 0.12]),
            saturation=([0, 0], [0.12, 0.25], [0.15, 0.35]),
            contrast=([0, 0], [0, 0], [0.08, 0.2]),
        ),
        # things that no instruction names; sizes of free items, relative, one of both; shift of drawer and buttons
        LAYOUT: by_level(
            distractors=(1, 2, 3),
            smaller=([0.05, 0.1], [0.1, 0.17], [0.17, 0.25]),
            larger=([0.02, 0.05], [0.05, 0.08], [0.08, 0.12]),
            furniture_mm=([5, 12], [12, 20], [20, 30]),
        ),
        # of the gripper: distance from the box of all starts, radians about the vertical and off it; of the arm's base
        ROBOT: by_level(
            outside_mm=([20, 40], [40, 70], [70, 100]),
            yaw=([0.3, 0.4], [0.4, 0.55], [0.55, 0.7]),
            tilt=([0.08, 0.12], [0.12, 0.2], [0.2, 0.3]),
            base_mm=([5, 15], [15, 30], [30, 50]),
        ),
    }
)
"""Dimension -> ranges of the levels 1, 2 and 3."""

DISTRACTORS = (
    Item("spare_0", "teal cylinder", "cylinder", "0.05 0.42 0.40 1", (0.022, 0.022, 0.026)),
    Item("spare_1", "brown ball", "ball", "0.36 0.20 0.10 1", (0.023, 0.023, 0.023)),
    Item("spare_2", "lilac puck", "puck", "0.72 0.60 0.88 1", (0.026, 0.026, 0.013)),
)
"""Shapes and colours that no instruction names."""
_AROUND = np.array([[0.30, -0.25], [0.72, 0.25]])
"""Where distractors go if there is no room between the other things."""
_TRIES = 60
_APART = 0.25
"""Least distance of the table's colour from that of any item, in RGB of [0,1]."""
_SHRINK = (1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.0)
Drawn = dict[str, Any]


# --- cameras, lights, surfaces -------------------------------------------------------------------------------------


def move_wrist_camera(appearance: Appearance, rng: np.random.Generator, values: Values) -> Drawn:
    """Move the wrist's camera in its mount, and return what was drawn."""
    shift, turn = draw_jolt(rng, values)
    appearance.jolt("wrist", shift, turn)
    sizes = np.linalg.norm(shift), np.linalg.norm(turn)
    return {"wrist_mm": 1000 * float(sizes[0]), "wrist_degrees": float(np.rad2deg(sizes[1]))}


def agentview_orbits(rng: np.random.Generator, values: Values) -> list[Drawn]:
    """Draw how `agentview` moves: the arguments of `Appearance.orbit`; then others that turn the other way, or less.

    The first that keeps what the instruction calls left and right is right for the episode.
    """
    drawn = draw_camera(rng, values)
    less = [{"azimuth": share * drawn["azimuth"], "roll": abs(share) * drawn["roll"]} for share in _SHRINK]
    return [{**drawn, **turn} for turn in less]


def change_light(appearance: Appearance, rng: np.random.Generator, values: Values) -> Drawn:
    """Change the lights, and return what was drawn."""
    drawn = draw_light(rng, values)
    appearance.light(PIVOT, **drawn)
    return {"gain": drawn["gain"], "degrees": drawn["angle"], "tint": drawn["tint"].tolist()}


def change_table(
    appearance: Appearance, rng: np.random.Generator, values: Values, table: np.ndarray, items: Sequence[Item]
) -> Drawn:
    """Change the surface of the table, whose colour is `table` [3], unlike any of the items; return what was drawn."""
    if not any(values["saturation"]):
        shift = signed(rng, values["lightness"])
        appearance.colour(TABLE, table + shift)
        return {"lightness": shift}
    known = [np.array(item.rgba.split()[:3], float) for item in items]
    contrast = signed(rng, values["contrast"])
    pairs = []
    for _ in range(_TRIES):
        shift = signed(rng, values["lightness"])
        pairs.append([draw_pale(rng, values["saturation"], table.mean() + each) for each in (shift, shift + contrast)])
    apart = [min(far_from(rgb, known) for rgb in pair) for pair in pairs]
    found = next((i for i, distance in enumerate(apart) if distance > _APART), int(np.argmax(apart)))
    first, second = pairs[found]
    if not contrast:
        appearance.colour(TABLE, first)
        return {"rgb": first.tolist()}
    pattern, pixels = draw_pattern(rng, SPARE_SIZE, first, second)
    appearance.cover(TABLE, SPARE, pixels)
    return {"rgb": first.tolist(), "pattern": pattern, "contrast": contrast}


# --- things and the arm --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crowd:
    """A scene with other things in it.

    Attributes:
        items: all items of the suite, with other sizes, and the distractors.
        layout: the layout with the distractors.
        drawn: what was drawn.
    """

    items: tuple[Item, ...]
    layout: Layout
    drawn: Drawn


def move_furniture(family: Family, rng: np.random.Generator, values: Values) -> Shifts:
    """Draw how far furniture stands from where it would: item -> shift along x and y in metres."""
    moved: dict[str, tuple[float, float]] = {}
    for group in family.furniture:
        angle, far = rng.uniform(-np.pi, np.pi), within(rng, values["furniture_mm"]) / 1000
        moved |= dict.fromkeys(group, (float(far * np.cos(angle)), float(far * np.sin(angle))))
    return moved


def crowd(family: Family, layout: Layout, moved: Shifts, rng: np.random.Generator, values: Values) -> Crowd:
    """Change the sizes of free items, and add distractors where nothing is in the way of the tasks."""
    sizes = {item.name: _size(rng, values) for item in family.items if item.free}
    items = [_scaled(item, sizes.get(item.name, 1.0)) for item in family.items]
    poses, occupied = dict(layout.poses), layout.occupied
    others = [DISTRACTORS[int(i)] for i in rng.permutation(len(DISTRACTORS))][: values["distractors"]]
    for item in others:
        poses[item.name], occupied = _place(rng, item, occupied)
    drawn = {
        "distractors": [item.phrase for item in others],
        "sizes": [sizes[name] for name in layout.poses if name in sizes],
        "furniture_mm": [1000 * float(np.hypot(*shift)) for shift in moved.values()],
    }
    return Crowd((*items, *others), replace(layout, poses=poses, occupied=occupied), drawn)


def _size(rng: np.random.Generator, values: Values) -> float:
    larger = bool(rng.random() < 0.5)
    smaller, larger_by = within(rng, values["smaller"]), within(rng, values["larger"])
    return 1 + larger_by if larger else 1 - smaller


def _scaled(item: Item, size: float) -> Item:
    x, y, z = item.half
    return replace(item, half=(size * x, size * y, size * z))


def _place(
    rng: np.random.Generator, item: Item, occupied: tuple[tuple[float, float, float], ...]
) -> tuple[Pose, tuple[tuple[float, float, float], ...]]:
    """Return a free place for an item, and all places that are then occupied."""
    for region in (REGION, _AROUND):
        placer = Placer(rng, region, occupied)
        for _ in range(_TRIES):
            try:
                return placer.draw(item.half[0] + 0.005), placer.occupied
            except NoRoomError:
                continue
    raise CrowdedSceneError(f"no room for the {item.phrase}")


@dataclass(frozen=True)
class Start:
    """Start of the arm.

    Attributes:
        base: position of the arm's base [3] in metres.
        position: the gripper centre [3] in metres.
        turn: axis-angle [3] of the gripper, from the nominal grasp pose.
    """

    base: np.ndarray
    position: np.ndarray
    turn: np.ndarray


def move_start(
    position: np.ndarray, region: np.ndarray, rng: np.random.Generator, values: Values
) -> tuple[Start, Drawn]:
    """Draw a start outside of the box of all starts, `region` [2,3], beside or above the start in it."""
    position = position.copy()
    side = int(rng.integers(5))  # nearer, farther, left, right or higher
    axis, end = ((0, 0), (0, 1), (1, 0), (1, 1), (2, 1))[side]
    outside = within(rng, values["outside_mm"]) / 1000
    position[axis] = region[end, axis] + (outside if end else -outside)
    angle = rng.uniform(-np.pi, np.pi)
    tilt, yaw = within(rng, values["tilt"]), signed(rng, values["yaw"])
    turn = np.array([tilt * np.cos(angle), tilt * np.sin(angle), yaw])
    around, far = rng.uniform(-np.pi, np.pi), within(rng, values["base_mm"]) / 1000
    base = far * np.array([np.cos(around), np.sin(around), 0.0])
    drawn = {"outside_mm": 1000 * outside, "tilt": tilt, "yaw": yaw, "base_mm": 1000 * far}
    return Start(base, position, turn), drawn
