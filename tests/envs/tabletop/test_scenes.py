"""Scenes and tasks of every tabletop suite, beyond the contract of tests/envs/test_contract.py."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest

from cogvla.envs import TABLETOP_SUITES
from cogvla.envs.suite import get_suite, suite_names
from cogvla.envs.tabletop.env import TabletopEnv
from cogvla.envs.tabletop.expert import Expert
from cogvla.tests.support.tabletop import tabletop

SIZE = 32


@pytest.fixture(scope="module", params=TABLETOP_SUITES)
def env(request: pytest.FixtureRequest) -> Iterator[TabletopEnv]:
    built = tabletop(request.param, image_size=SIZE)
    yield built
    built.close()


def test_suites_are_registered_with_gymnasium() -> None:
    assert set(TABLETOP_SUITES) <= set(suite_names())
    env = gym.make("cogvla/tabletop_object-v0", image_size=SIZE, render=False)
    observation, info = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert info["instruction"].startswith("put the ")
    env.close()


def test_ten_tasks_with_distinct_instructions(env: TabletopEnv) -> None:
    tasks = env.family.tasks
    assert len(tasks) == 10
    assert len({task.instruction for task in tasks}) == len({task.name for task in tasks}) == 10


def test_step_before_reset_is_refused() -> None:
    with pytest.raises(ValueError, match="reset"):
        get_suite("tabletop_object").make(render=False).step(np.zeros(7))


def test_scene_is_at_rest(env: TabletopEnv) -> None:
    scene = env.scene
    for state in range(3):
        env.reset(options={"task": state, "initial_state": state})
        free = [name for name in scene.items if scene.items[name].free]  # the parked ones too
        before = {name: scene.position(name) for name in free}
        for _ in range(20):
            env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        for name in free:
            assert np.linalg.norm(scene.position(name) - before[name]) < 1e-3, name


def test_every_scene_leaves_the_instruction_to_decide(env: TabletopEnv) -> None:
    for task in range(10):
        _, info = env.reset(options={"task": task, "initial_state": task})
        assert not info["success"]
        assert len(info["alternatives"]) >= 4
        assert info["instruction"] not in info["alternatives"]
        own = env.goals_for(task)
        assert all(env.goals_for(i) != own for i in info["alternative_tasks"])
        assert not any(env.task_success(i) for i in info["alternative_tasks"])


def test_asked_swaps_the_instruction_but_not_the_scene(env: TabletopEnv) -> None:
    plain, info = env.reset(options={"task": 1, "initial_state": 7})
    other = info["alternative_tasks"][0]
    swapped, swapped_info = env.reset(options={"task": 1, "initial_state": 7, "asked": other})
    assert np.array_equal(plain["agentview"], swapped["agentview"])
    assert swapped_info["instruction"] == env.family.tasks[other].instruction == info["alternatives"][0]
    expert = Expert(env, np.random.default_rng(0))
    done = False
    while not done:
        _, _, done, truncated, step_info = env.step(expert.act())
        assert not truncated
    assert step_info["success"]
    assert not step_info["scene_task_success"]


def test_impossible_task_is_refused() -> None:
    env = tabletop("tabletop_object", render=False)
    _, info = env.reset(options={"task": 0, "initial_state": 0})
    absent = next(i for i in range(10) if i not in (0, *info["alternative_tasks"]))
    with pytest.raises(ValueError, match="cannot be carried out"):
        env.reset(options={"task": 0, "initial_state": 0, "asked": absent})


def test_labels_follow_the_goal(env: TabletopEnv) -> None:
    inner = env
    _, info = env.reset(options={"task": 3, "initial_state": 2})
    for task in (3, *info["alternative_tasks"]):
        label = inner.labels_for(task)
        goal = inner.goals_for(task)[0]
        assert label["target"].dtype == label["goal"].dtype == np.float32
        if goal.verb == "push":  # behind the item, on the line to its destination, clear of the item
            item, destination = (inner.scene.position(name)[:2] for name in (goal.item, goal.destination))
            back, ahead = item - label["target"][:2], destination - item
            assert back @ ahead > 0.98 * np.linalg.norm(back) * np.linalg.norm(ahead)
            assert 0.02 < np.linalg.norm(back) - inner.scene.items[goal.item].half[0] < 0.06
        else:
            assert np.allclose(label["target"], inner.scene.contact_point(goal.item), atol=1e-6)
        if goal.destination:
            assert np.allclose(label["goal"][:2], inner.scene.position(goal.destination)[:2], atol=1e-6)
    assert np.array_equal(inner.labels()["target"], inner.labels_for(3)["target"])
