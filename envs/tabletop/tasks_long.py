"""Suite `tabletop_long`: two goals of `tabletop_goal` in a row, in the same scenes. Both must hold at the same time."""

from __future__ import annotations

import numpy as np

from cogvla.envs.suite import Task
from cogvla.envs.tabletop.family import Family
from cogvla.envs.tabletop.goals import Layout, Shifts
from cogvla.envs.tabletop.tasks_goal import FURNITURE, ITEMS, TASKS, draw_layout

LABELS = 3
"""Meaning of the labels; in 2, the next goal began as soon as the puck was in place, at the edge of the zone."""
PAIRS = (
    ("red_on_plate", "blue_in_tray"),
    ("blue_on_plate", "red_in_tray"),
    ("red_in_tray", "open_drawer"),
    ("blue_on_plate", "press_white"),
    ("red_on_blue", "press_black"),
    ("blue_on_red", "press_white"),
    ("push_puck", "red_on_plate"),
    ("open_drawer", "press_black"),
    ("open_drawer", "blue_in_tray"),
    ("press_white", "press_black"),
)
_BY_NAME = {task.name: (task, goal) for task, goal in TASKS}


def draw(rng: np.random.Generator, task: int, moved: Shifts) -> Layout:
    """Draw one scene. The task does not matter, because all tasks are possible in every scene."""
    del task
    goals = {i: tuple(_BY_NAME[name][1] for name in pair) for i, pair in enumerate(PAIRS)}
    return draw_layout(rng, moved, goals)


def family() -> Family:
    """Return the suite's definition. The expert needs 45 steps on average and at most 71 (about 160 with noise)."""
    tasks = tuple(
        Task(f"{first}_then_{second}", f"{_BY_NAME[first][0].instruction}, then {_BY_NAME[second][0].instruction}")
        for first, second in PAIRS
    )
    return Family("tabletop_long", tasks, 200, 4, ITEMS, draw, FURNITURE, labels=LABELS)
