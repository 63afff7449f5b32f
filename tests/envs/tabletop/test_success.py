"""Success predicates against known answers: items moved by hand, not by the expert."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
import pytest

from cogvla.envs.tabletop.env import TabletopEnv
from cogvla.envs.tabletop.goals import Goal
from cogvla.envs.tabletop.scene import BUTTON_TRAVEL
from cogvla.tests.support.tabletop import tabletop

OPEN, CLOSED = np.array([0, 0, 0, 0, 0, 0, -1.0]), np.array([0, 0, 0, 0, 0, 0, 1.0])


@pytest.fixture(scope="module")
def goal_env() -> TabletopEnv:
    return tabletop("tabletop_goal", render=False)


def settle(env: TabletopEnv, action: np.ndarray = OPEN, steps: int = 4) -> dict[str, Any]:
    for _ in range(steps):
        *_, info = env.step(action)
    return info


def test_object_counts_only_inside_the_tray() -> None:
    env = tabletop("tabletop_object", render=False)
    env.reset(options={"task": 0, "initial_state": 0})
    tray = env.scene.position("tray")
    env.scene.move("red_cube", tray + np.array((0.10, 0.0, 0.023)))
    assert not settle(env)["success"]
    env.scene.move("red_cube", tray + np.array((0.02, -0.02, 0.030)))
    assert settle(env)["success"]
    env.scene.move("red_cube", tray + np.array((0.0, 0.0, 0.20)))
    assert not settle(env, steps=1)["success"]


def test_a_held_object_does_not_count() -> None:
    env = tabletop("tabletop_object", render=False)
    env.reset(options={"task": 0, "initial_state": 0})
    goal = env.goals[0]
    assert goal == Goal("put", "red_cube", "tray")
    for _ in range(12):
        env.step(CLOSED)
    # Bring tray and cube to the closed gripper: in place, not let go.
    gripper = env.gripper_position
    env.scene.move("tray", (gripper[0], gripper[1], gripper[2] - 0.027))
    env.scene.move("red_cube", gripper)
    mujoco.mj_forward(env.scene.model, env.scene.data)
    assert not env.task_success(0)
    env.scene.data.qpos[7:9] = 0.04
    mujoco.mj_forward(env.scene.model, env.scene.data)
    assert env.task_success(0)


def test_other_object_in_the_tray_is_the_other_task() -> None:
    env = tabletop("tabletop_object", render=False)
    _, info = env.reset(options={"task": 0, "initial_state": 1})
    other = info["alternative_tasks"][0]
    env.scene.move(env.goals_for(other)[0].item, env.scene.position("tray") + np.array((0, 0, 0.03)))
    assert not settle(env)["success"]
    assert env.task_success(other)


@pytest.mark.parametrize(
    ("task", "item", "destination", "height"), [(0, "red_cube", "plate", 0.032), (5, "blue_cube", "red_cube", 0.047)]
)
def test_plate_and_stack(goal_env: TabletopEnv, task: int, item: str, destination: str, height: float) -> None:
    goal_env.reset(options={"task": task, "initial_state": 3})
    base = goal_env.scene.position(destination)
    goal_env.scene.move(item, base + np.array((0.0, 0.09, height)))
    assert not settle(goal_env)["success"]
    goal_env.scene.move(item, base + np.array((0.004, 0.0, height)))
    assert settle(goal_env)["success"]


def test_puck_drawer_and_buttons(goal_env: TabletopEnv) -> None:
    scene = goal_env.scene
    goal_env.reset(options={"task": 6, "initial_state": 4})
    scene.move("puck", scene.position("green_zone") + np.array((0.01, 0.0, 0.015)))
    assert settle(goal_env)["success"]
    goal_env.reset(options={"task": 7, "initial_state": 4})
    scene.set_travel("drawer", 0.05)
    assert not settle(goal_env)["success"]
    scene.set_travel("drawer", 0.09)
    assert settle(goal_env)["success"]
    goal_env.reset(options={"task": 8, "initial_state": 4})
    scene.set_travel("white_button", BUTTON_TRAVEL)
    scene.latch_buttons()
    info = settle(goal_env, steps=10)
    assert info["success"]
    assert scene.travel("white_button") < 0.002  # springs back, stays pressed
    assert not goal_env.task_success(9)
    goal_env.reset(options={"task": 8, "initial_state": 4})
    assert not goal_env.task_success(8)  # a new episode forgets


def test_long_needs_both_and_labels_move_on() -> None:
    env = tabletop("tabletop_long", render=False)
    env.reset(options={"task": 0, "initial_state": 0})
    red, blue = env.goals
    assert np.allclose(env.labels()["target"], env.scene.position(red.item), atol=1e-5)
    env.scene.move(red.item, env.scene.position("plate") + np.array((0, 0, 0.033)))
    assert not settle(env)["success"]
    assert np.allclose(env.labels()["target"], env.scene.position(blue.item), atol=1e-5)
    env.scene.move(blue.item, env.scene.position("tray") + np.array((0, 0, 0.030)))
    assert settle(env)["success"]


def test_spatial_names_the_right_cubes() -> None:
    env = tabletop("tabletop_spatial", render=False)
    for state in range(10):
        env.reset(options={"task": state, "initial_state": state})
        cubes = {name: env.scene.position(name) for name in env.scene.placed if name.startswith("cube_")}
        named = [env.goals_for(task)[0].item for task in (6, 7, 8, 9)]
        by_y = sorted(cubes, key=lambda name: cubes[name][1])
        by_x = sorted(cubes, key=lambda name: cubes[name][0])
        assert named == [by_y[0], by_y[-1], by_x[0], by_x[-1]]
        for task in range(6):
            if task in env._current_layout().goals:
                mat = env.scene.position(env.family.items[4 + task].name)
                assert np.linalg.norm(cubes[env.goals_for(task)[0].item][:2] - mat[:2]) < 1e-6
