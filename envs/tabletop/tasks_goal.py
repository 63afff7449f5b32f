"""Suite `tabletop_goal`: the table always holds the same items, and the instruction says what to do.

The items are two cubes, a puck, a plate, a tray, a green zone, a drawer and two buttons. The drawer and the buttons
stand at the robot's side of the table with small random offsets (the buttons swap places at random); everything else
stands anywhere in front of them. All ten tasks are possible in every scene.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cogvla.envs.suite import Task
from cogvla.envs.tabletop.family import Family
from cogvla.envs.tabletop.goals import LABELS, Goal, Layout, Shifts
from cogvla.envs.tabletop.placement import NoRoomError, Placer, until_drawn
from cogvla.envs.tabletop.scene import Item, Pose

CUBE = (0.023, 0.023, 0.023)
RED = Item("red_cube", "red cube", "cube", "0.9 0.08 0.08 1", CUBE)
BLUE = Item("blue_cube", "blue cube", "cube", "0.1 0.2 0.9 1", CUBE)
PUCK = Item("puck", "yellow puck", "puck", "0.98 0.88 0.08 1", (0.030, 0.030, 0.015))
PLATE = Item("plate", "plate", "plate", "0.35 0.85 0.95 1", (0.055, 0.055, 0.004))
TRAY = Item("tray", "tray", "tray", "0.42 0.25 0.1 1", (0.065, 0.065, 0.012))
ZONE = Item("green_zone", "green zone", "zone", "0.1 0.65 0.15 1", (0.050, 0.050, 0.001))
DRAWER = Item("drawer", "drawer", "drawer", "0.75 0.5 0.25 1", (0.055, 0.055, 0.028))
WHITE = Item("white_button", "white button", "button", "1 1 1 1", (0.023, 0.023, 0.017))
BLACK = Item("black_button", "black button", "button", "0.05 0.05 0.05 1", (0.023, 0.023, 0.017))
FURNITURE = ((DRAWER.name,), (WHITE.name, BLACK.name))
"""Fixed items at the robot's side of the table, in groups that stay together."""
ITEMS = (RED, BLUE, PUCK, PLATE, TRAY, ZONE, DRAWER, WHITE, BLACK)

REGION = np.array([[0.41, -0.21], [0.68, 0.21]])
PUSH_LENGTH = (0.09, 0.20)
_FURNITURE_RADIUS = {DRAWER.name: 0.080, WHITE.name: 0.033, BLACK.name: 0.033}
_RUN_UP = 0.075
"""Metres behind the puck that the pusher needs free."""

TASKS: tuple[tuple[Task, Goal], ...] = (
    (Task("red_on_plate", "put the red cube on the plate"), Goal("put", RED.name, PLATE.name)),
    (Task("blue_on_plate", "put the blue cube on the plate"), Goal("put", BLUE.name, PLATE.name)),
    (Task("red_in_tray", "put the red cube in the tray"), Goal("put", RED.name, TRAY.name)),
    (Task("blue_in_tray", "put the blue cube in the tray"), Goal("put", BLUE.name, TRAY.name)),
    (Task("red_on_blue", "stack the red cube on the blue cube"), Goal("put", RED.name, BLUE.name)),
    (Task("blue_on_red", "stack the blue cube on the red cube"), Goal("put", BLUE.name, RED.name)),
    (Task("push_puck", "push the yellow puck onto the green zone"), Goal("push", PUCK.name, ZONE.name)),
    (Task("open_drawer", "open the drawer"), Goal("open", DRAWER.name)),
    (Task("press_white", "press the white button"), Goal("press", WHITE.name)),
    (Task("press_black", "press the black button"), Goal("press", BLACK.name)),
)


def draw_layout(rng: np.random.Generator, moved: Shifts, goals: Mapping[int, tuple[Goal, ...]]) -> Layout:
    """Draw the poses of all items; `moved`: furniture -> how far it stands from where it would."""
    jitter = rng.uniform(-0.015, 0.015, (3, 2))
    fixtures = {DRAWER.name: Pose(0.275 + jitter[0, 0], -0.19 + jitter[0, 1])}
    for i, button in enumerate((WHITE, BLACK) if rng.random() < 0.5 else (BLACK, WHITE)):
        fixtures[button.name] = Pose(0.33 + jitter[1 + i, 0], 0.10 + 0.10 * i + jitter[1 + i, 1])

    for name, (dx, dy) in moved.items():
        fixtures[name] = Pose(fixtures[name].x + dx, fixtures[name].y + dy)

    def attempt() -> tuple[dict[str, Pose], Placer]:
        poses = dict(fixtures)
        placer = Placer(rng, REGION)
        handle = fixtures[DRAWER.name]
        for reach in (0.11, 0.17):  # the drawer opens into this space
            placer.add(handle.x + reach, handle.y, 0.045)
        poses[ZONE.name] = placer.draw(0.060, margin=0.01, turn=0.0)
        poses[PUCK.name] = _puck(placer, poses[ZONE.name])
        poses[TRAY.name] = placer.draw(0.078, margin=0.02, turn=0.0)
        poses[PLATE.name] = placer.draw(0.057, margin=0.01, turn=0.0)
        for cube in (RED, BLUE):
            poses[cube.name] = placer.draw(0.030)
        return poses, placer

    poses, placer = until_drawn(attempt)
    standing = tuple((pose.x, pose.y, _FURNITURE_RADIUS[name]) for name, pose in fixtures.items())
    return Layout(poses, goals, placer.occupied + standing)


def _puck(placer: Placer, zone: Pose) -> Pose:
    """Draw a place from where the puck can be pushed to the zone, and keep the path and the run-up free."""
    centre = np.array([zone.x, zone.y])
    points = placer.candidates()
    way = centre - points
    length = np.hypot(way[:, 0], way[:, 1])
    run_up = points - way / length[:, None] * _RUN_UP
    fits = (length > PUSH_LENGTH[0]) & (length < PUSH_LENGTH[1])
    fits &= ((run_up > REGION[0] - 0.03) & (run_up < REGION[1] + 0.03)).all(axis=1)
    if not fits.any():
        raise NoRoomError
    start = points[fits][0]
    placer.add(float(start[0]), float(start[1]), 0.035)
    for point, radius in ((run_up[fits][0], 0.015), ((start + centre) / 2, 0.030)):
        placer.add(float(point[0]), float(point[1]), radius)
    return Pose(float(start[0]), float(start[1]))


def draw(rng: np.random.Generator, task: int, moved: Shifts) -> Layout:
    """Draw one scene. The task does not matter, because all tasks are possible in every scene."""
    del task
    return draw_layout(rng, moved, {i: (goal,) for i, (_, goal) in enumerate(TASKS)})


def family() -> Family:
    """Return the suite's definition. The expert needs 23 steps on average and at most 37 (about 80 with noise)."""
    return Family("tabletop_goal", tuple(task for task, _ in TASKS), 120, 3, ITEMS, draw, FURNITURE, labels=LABELS)
