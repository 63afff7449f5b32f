"""Suite `tabletop_object`: the skill and the destination are always the same, and the instruction names the object.

Every scene holds the target, five of the other nine objects, and a tray, anywhere on the reachable table.
"""

from __future__ import annotations

import numpy as np

from cogvla.envs.suite import Task
from cogvla.envs.tabletop.family import Family
from cogvla.envs.tabletop.goals import Goal, Layout, Shifts
from cogvla.envs.tabletop.placement import Placer, until_drawn
from cogvla.envs.tabletop.scene import Item, Pose

CUBE = (0.023, 0.023, 0.023)
ROUND = (0.024, 0.024, 0.023)
BALL = (0.025, 0.025, 0.025)
OBJECTS = (
    Item("red_cube", "red cube", "cube", "0.9 0.08 0.08 1", CUBE),
    Item("green_cube", "green cube", "cube", "0.1 0.65 0.15 1", CUBE),
    Item("blue_cylinder", "blue cylinder", "cylinder", "0.1 0.2 0.9 1", ROUND),
    Item("yellow_cube", "yellow cube", "cube", "0.98 0.88 0.08 1", CUBE),
    Item("purple_cylinder", "purple cylinder", "cylinder", "0.5 0.1 0.65 1", ROUND),
    Item("orange_ball", "orange ball", "ball", "1 0.45 0.02 1", BALL),
    Item("white_cube", "white cube", "cube", "1 1 1 1", CUBE),
    Item("black_cylinder", "black cylinder", "cylinder", "0.05 0.05 0.05 1", ROUND),
    Item("cyan_cube", "cyan cube", "cube", "0.05 0.85 0.9 1", CUBE),
    Item("pink_ball", "pink ball", "ball", "1 0.45 0.7 1", BALL),
)
TRAY = Item("tray", "tray", "tray", "0.42 0.25 0.1 1", (0.070, 0.070, 0.012))
OTHERS = 5
OBJECT_RADIUS = 0.030
TRAY_RADIUS = 0.085


def draw(rng: np.random.Generator, task: int, moved: Shifts) -> Layout:
    """Draw one scene: the target, `OTHERS` distractors and the tray. There is no furniture."""
    del moved
    others = rng.permutation([i for i in range(len(OBJECTS)) if i != task])[:OTHERS]
    present = [task, *(int(i) for i in others)]

    def attempt() -> tuple[dict[str, Pose], Placer]:
        placer = Placer(rng)
        poses = {TRAY.name: placer.draw(TRAY_RADIUS, margin=0.03, turn=0.0)}
        for i in present:
            poses[OBJECTS[i].name] = placer.draw(OBJECT_RADIUS)
        return poses, placer

    goals = {i: (Goal("put", OBJECTS[i].name, TRAY.name),) for i in present}
    poses, placer = until_drawn(attempt)
    return Layout(poses, goals, placer.occupied)


def family() -> Family:
    """Return the suite's definition. The expert needs 28 steps on average and at most 35 (about 75 with noise)."""
    tasks = tuple(Task(f"{item.name}_in_tray", f"put the {item.phrase} in the tray") for item in OBJECTS)
    return Family("tabletop_object", tasks, 100, 1, (*OBJECTS, TRAY), draw)
