"""Suite `tabletop_spatial`: all cubes look the same, and the instruction names one by its place.

Every scene holds four grey cubes, three of them on coloured mats, and a plate. An instruction names a cube by its mat
or by a relation: leftmost or rightmost as seen in `agentview` (left is smaller y), nearest to or farthest from the
robot. In every scene each relation is clear by at least `MARGIN`, so all four relations and three mats are possible.
"""

from __future__ import annotations

import numpy as np

from cogvla.envs.suite import Task
from cogvla.envs.tabletop.family import Family
from cogvla.envs.tabletop.goals import Goal, Layout, Shifts
from cogvla.envs.tabletop.placement import NoRoomError, Placer, until_drawn
from cogvla.envs.tabletop.scene import Item, Pose

CUBE_HALF = 0.023
CUBES = tuple(Item(f"cube_{i}", "cube", "cube", "0.78 0.78 0.8 1", (CUBE_HALF,) * 3) for i in range(4))
MAT_HALF = (0.042, 0.042, 0.001)
MATS = (
    Item("red_mat", "red mat", "mat", "0.9 0.08 0.08 1", MAT_HALF),
    Item("green_mat", "green mat", "mat", "0.1 0.65 0.15 1", MAT_HALF),
    Item("blue_mat", "blue mat", "mat", "0.1 0.2 0.9 1", MAT_HALF),
    Item("yellow_mat", "yellow mat", "mat", "0.98 0.88 0.08 1", MAT_HALF),
    Item("purple_mat", "purple mat", "mat", "0.5 0.1 0.65 1", MAT_HALF),
    Item("orange_mat", "orange mat", "mat", "1 0.45 0.02 1", MAT_HALF),
)
PLATE = Item("plate", "plate", "plate", "1 1 1 1", (0.065, 0.065, 0.004))
RELATIONS = ("leftmost", "rightmost", "nearest to the robot", "farthest from the robot")
MARGIN = 0.03
"""Least distance in metres between the extreme cube of a relation and the next cube."""
MATS_IN_SCENE = 3
CUBE_RADIUS, MAT_RADIUS, PLATE_RADIUS = 0.030, 0.052, 0.068


def extremes(points: np.ndarray) -> list[int]:
    """Return the index of the cube for each of `RELATIONS`, from the cubes' positions [N,2].

    Nearest and farthest must be the same along the table (x) and by the distance from the robot's base.

    Raises:
        NoRoomError: a relation is not clear.
    """
    named = []
    distance = np.hypot(points[:, 0], points[:, 1])
    for measures in ((points[:, 1],), (-points[:, 1],), (points[:, 0], distance), (-points[:, 0], -distance)):
        firsts = set()
        for values in measures:
            order = np.argsort(values)
            if values[order[1]] - values[order[0]] < MARGIN:
                raise NoRoomError
            firsts.add(int(order[0]))
        if len(firsts) > 1:
            raise NoRoomError
        named.append(firsts.pop())
    return named


def draw(rng: np.random.Generator, task: int, moved: Shifts) -> Layout:
    """Draw one scene: four cubes, three mats (with that of the task) and the plate. There is no furniture."""
    del moved
    others = [int(i) for i in rng.permutation(len(MATS)) if i != task]
    mats = [task, *others][:MATS_IN_SCENE] if task < len(MATS) else others[:MATS_IN_SCENE]

    def attempt() -> tuple[dict[str, Pose], list[int], Placer]:
        placer = Placer(rng)
        places = [placer.draw(MAT_RADIUS) for _ in mats]
        places += [placer.draw(CUBE_RADIUS) for _ in CUBES[len(mats) :]]
        named = extremes(np.array([(place.x, place.y) for place in places]))
        poses = {PLATE.name: placer.draw(PLATE_RADIUS, margin=0.02, turn=0.0)}
        for mat, place in zip(mats, places, strict=False):
            poses[MATS[mat].name] = Pose(place.x, place.y)
        for cube, place in zip(CUBES, places, strict=True):
            poses[cube.name] = place
        return poses, named, placer

    poses, named, placer = until_drawn(attempt)
    goals = {mat: (Goal("put", cube.name, PLATE.name),) for mat, cube in zip(mats, CUBES, strict=False)}
    for relation, cube in enumerate(named):
        goals[len(MATS) + relation] = (Goal("put", CUBES[cube].name, PLATE.name),)
    return Layout(poses, goals, placer.occupied)


def family() -> Family:
    """Return the suite's definition. The expert needs 28 steps on average and at most 35 (about 90 with noise)."""
    tasks = [Task(f"cube_on_{mat.name}", f"put the cube on the {mat.phrase} on the plate") for mat in MATS]
    tasks += [Task(f"{r.split()[0]}_cube", f"put the {_relative(r)} on the plate") for r in RELATIONS]
    sides = {len(MATS): -1, len(MATS) + 1: 1}
    return Family("tabletop_spatial", tuple(tasks), 100, 2, (*CUBES, *MATS, PLATE), draw, sides=sides)


def _relative(relation: str) -> str:
    first, *rest = relation.split(" ", 1)
    return " ".join([first, "cube", *rest]) if not rest else f"cube {relation}"
