"""What a perturbation changes in the tabletop: cameras, lights, the table, the start of the arm, and more items.

The numbers are frozen: docs/robustness.md repeats them. `agentview` orbits about the middle of the reachable table, so
that target and goal stay in view; left and right stay left and right.
"""

from __future__ import annotations

import math

import mujoco
import numpy as np

from cogvla.envs.perturbation.model import orbit, recolour, relight, shake
from cogvla.envs.perturbation.perturbation import Perturbation, away
from cogvla.envs.tabletop.family import Family
from cogvla.envs.tabletop.goals import Layout
from cogvla.envs.tabletop.placement import Placer, until_drawn
from cogvla.envs.tabletop.scene import Item, Pose

PIVOT = np.array([0.49, 0.0, 0.0])
DISTRACTORS = (
    Item("grey_brick", "grey brick", "cube", "0.3 0.34 0.4 1", (0.032, 0.016, 0.014)),
    Item("beige_brick", "beige brick", "cube", "0.8 0.72 0.55 1", (0.016, 0.034, 0.012)),
    Item("olive_disc", "olive disc", "cylinder", "0.35 0.38 0.12 1", (0.026, 0.026, 0.010)),
)
"""Items whose shape and colour no instruction names."""
DISTRACTOR_RADIUS = 0.032
DRAWS = 64
"""Draws of a camera, until instructions mean the same things as before."""
RADII = {"tray": 0.085, "plate": 0.057, "mat": 0.05, "zone": 0.06, "drawer": 0.075, "button": 0.035, "puck": 0.035}
"""Kind -> radius that its items need on the table, in metres."""
FREE_RADIUS = 0.030


def change_look(
    model: mujoco.MjModel, family: Family, layout: Layout, perturbation: Perturbation, rng: np.random.Generator
) -> None:
    """Change cameras, lights or the table's colour, from the nominal ones."""
    if perturbation.dimension == "camera":
        _move_agentview(model, family, layout, perturbation, rng)
        shift = _direction(rng) * perturbation.pick(0.003, 0.008, 0.015)
        shake(model, model.camera("wrist").id, shift, _direction(rng), np.deg2rad(perturbation.pick(1, 3, 6)))
    elif perturbation.dimension == "light":
        relight(model, perturbation, rng)
    elif perturbation.dimension == "background":
        named = np.array([[float(part) for part in item.rgba.split()[:3]] for item in family.items])
        table = model.geom("table").id
        recolour(model.geom_rgba[table : table + 1], perturbation, rng, named)


def other_start(
    position: np.ndarray, turn: np.ndarray, region: np.ndarray, perturbation: Perturbation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of the gripper, position and axis-angle [3]; dimension `robot` starts outside of `region`."""
    if perturbation.dimension != "robot":
        return position, turn
    low, high = region
    outside = rng.uniform(*((0.02, 0.04), (0.04, 0.07), (0.07, 0.10))[perturbation.level - 1])
    sides = [
        np.array([low[0] - outside, position[1], position[2]]),
        np.array([position[0], low[1] - outside, position[2]]),
    ]
    sides += [np.array([position[0], high[1] + outside, position[2]])]
    tilt, yaw = perturbation.pick(0.12, 0.2, 0.3), perturbation.pick(0.5, 0.7, 0.9)
    return sides[rng.integers(len(sides))], np.append(rng.uniform(-tilt, tilt, 2), rng.uniform(-yaw, yaw))


def crowd(layout: Layout, family: Family, perturbation: Perturbation, rng: np.random.Generator) -> dict[str, Pose]:
    """Draw places for items that stand by, as many as the level says and have room; none in other dimensions."""
    if perturbation.dimension != "layout":
        return {}
    kinds = {item.name: item.kind for item in family.items}
    chosen = [DISTRACTORS[i] for i in rng.permutation(len(DISTRACTORS))[: perturbation.level]]

    def attempt() -> dict[str, Pose]:
        placer = Placer(rng)
        for name, pose in layout.poses.items():
            placer.add(pose.x, pose.y, RADII.get(kinds[name], FREE_RADIUS))
            if kinds[name] == "drawer":
                for reach in (0.11, 0.17):  # it opens into this space
                    placer.add(pose.x + reach, pose.y, 0.045)
        for goal in (goal for goals in layout.goals.values() for goal in goals if goal.verb == "push"):
            _keep_free(placer, layout.poses[goal.item], layout.poses[goal.destination])
        return {item.name: placer.draw(DISTRACTOR_RADIUS) for item in chosen}

    while True:
        try:
            return until_drawn(attempt)
        except RuntimeError:  # a full table has room for fewer
            chosen = chosen[:-1]


def _move_agentview(
    model: mujoco.MjModel, family: Family, layout: Layout, perturbation: Perturbation, rng: np.random.Generator
) -> None:
    """Move the camera; where instructions name things by their place, left, right, near and far stay the same items."""
    level, camera = perturbation.level - 1, model.camera("agentview").id
    free = {item.name for item in family.items if item.free}
    places = np.array([(pose.x, pose.y, 0.02) for name, pose in layout.poses.items() if name in free])
    nominal = model.cam_pos[camera].copy(), model.cam_quat[camera].copy()
    before = _extremes(model, camera, places)
    for last in [False] * DRAWS + [True]:
        azimuth = away(rng, *((3, 8), (8, 18), (18, 30))[level])
        elevation = away(rng, *((2, 5), (5, 10), (10, 15))[level])
        distance = rng.uniform(1.0, perturbation.pick(1.1, 1.25, 1.5))
        roll = rng.uniform(-1, 1) * perturbation.pick(1, 3, 6)
        model.cam_pos[camera], model.cam_quat[camera] = nominal
        if last:  # a scene that leaves no room for a turn
            azimuth = roll = 0.0
        orbit(model, camera, PIVOT, math.radians(azimuth), math.radians(elevation), distance, math.radians(roll))
        if not family.by_place or _extremes(model, camera, places) == before:
            return


def _extremes(model: mujoco.MjModel, camera: int, places: np.ndarray) -> list[int]:
    """Return which of the places [n,3] are the leftmost, the lowest, the rightmost and the highest in the picture."""
    axes = np.zeros(9)
    mujoco.mju_quat2Mat(axes, model.cam_quat[camera])
    seen = (places - model.cam_pos[camera]) @ axes.reshape(3, 3)
    flat = seen[:, :2] / -seen[:, 2:]
    return [*flat.argmin(axis=0).tolist(), *flat.argmax(axis=0).tolist()]


def _keep_free(placer: Placer, start: Pose, end: Pose) -> None:
    """Keep the way free along which an item is pushed, and the run-up behind it."""
    way = np.array([end.x - start.x, end.y - start.y])
    for share in (-0.5, -0.25, 0.25, 0.5, 0.75):
        place = np.array([start.x, start.y]) + share * way
        placer.add(float(place[0]), float(place[1]), 0.03)


def _direction(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)
