"""The scripted experts and the controller under them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cogvla.envs import TABLETOP_SUITES
from cogvla.envs.perturbation.perturbation import CrowdedSceneError
from cogvla.envs.rotations import rotation_matrix, rotation_vector
from cogvla.envs.suite import get_suite
from cogvla.envs.tabletop.control import POSITION_SCALE
from cogvla.envs.tabletop.expert import CLOSE, PHASES, Expert
from cogvla.envs.tabletop.goals import destination_point, push_start
from cogvla.scripts.command import compose
from cogvla.scripts.expert_table import play, run
from cogvla.tests.support import toy_suite
from cogvla.tests.support.tabletop import tabletop


@pytest.mark.parametrize("name", TABLETOP_SUITES)
def test_expert_solves_every_task(name: str) -> None:
    suite = get_suite(name)
    for task in range(len(suite.tasks)):
        row = play(suite, task, (0, 1000 + task), noise=0.0)
        assert not row.failed, f"{name}: {row}"
        assert max(row.steps) < 0.7 * suite.max_steps


@pytest.mark.parametrize("name", TABLETOP_SUITES)
def test_expert_recovers_from_its_noise(name: str) -> None:
    suite = get_suite(name)
    rows = [play(suite, task, (2000 + task,), noise=1.0) for task in range(len(suite.tasks))]
    assert sum(len(row.failed) for row in rows) <= 1


def test_expert_picks_up_what_was_taken_from_it() -> None:
    env = tabletop("tabletop_object", render=False)
    env.reset(options={"task": 0, "initial_state": 0})
    expert = Expert(env, np.random.default_rng(0))
    phases, taken, done = [], False, False
    start = env.scene.position("red_cube")
    while not done:
        action = expert.act()
        phases.append(PHASES[expert.phase])
        if not taken and phases[-1] == "transport" and env.gripper_position[2] > 0.1:
            env.scene.move("red_cube", start)
            taken = True
        *_, done, truncated, _ = env.step(action)
        assert not truncated
    assert taken
    assert phases.count("grasp") >= 2
    assert (phases[0], phases[-1]) == ("approach", "release")


def test_a_push_before_another_goal_goes_on_well_inside_the_zone() -> None:
    env = tabletop("tabletop_long", render=False)
    for state in range(4):
        env.reset(options={"task": 6, "initial_state": state})
        expert, push, pushed = Expert(env, np.random.default_rng(0)), env.goals[0], False
        while not pushed or PHASES[expert.phase] == "push":
            action = expert.act()
            if PHASES[expert.phase] == "push":
                pushed = True
                assert np.allclose(env.labels()["target"], push_start(env.scene, push)[0], atol=1e-6), "labels push on"
            left = destination_point(env.scene, push) - env.scene.position(push.item)
            assert not env.step(action)[3], "too late"
        assert np.hypot(*left[:2]) < 0.025, "it is in place from 0.038 on"
        assert action[6] == CLOSE, "to open beside the puck would push it again"


def test_action_depends_on_the_state_alone() -> None:
    env = tabletop("tabletop_object", render=False)
    env.reset(options={"task": 2, "initial_state": 0})
    old = Expert(env, np.random.default_rng(0))
    for _ in range(25):
        env.step(old.act())
    assert np.array_equal(old.act(), Expert(env, np.random.default_rng(1)).act())


def test_noise_changes_what_is_executed_not_the_label() -> None:
    env = tabletop("tabletop_object", render=False)
    env.reset(options={"task": 0, "initial_state": 0})
    expert = Expert(env, np.random.default_rng(0), noise=1.0)
    clean = expert.act()
    executed = expert.noisy(clean)
    assert not np.array_equal(clean, executed)
    assert np.abs(executed).max() <= 1.0
    assert np.array_equal(clean, expert.act())
    assert np.array_equal(Expert(env, np.random.default_rng(0)).noisy(clean), clean)
    with pytest.raises(ValueError, match="noise"):
        Expert(env, np.random.default_rng(0), noise=-1.0)


def test_open_loop_chunk_ends_where_its_deltas_add_up() -> None:
    env = tabletop("tabletop_object", render=False)
    env.reset(options={"task": 0, "initial_state": 3})
    start = env.gripper_position
    deltas = np.random.default_rng(0).uniform(-0.6, 0.6, (8, 3)) * (0.3, 0.3, 0.3)
    for delta in deltas:
        env.step(np.array([*delta, 0, 0, 0, -1.0]))
        lag = env._arm.position - env.gripper_position
        assert np.linalg.norm(lag) < 0.6 * POSITION_SCALE * np.linalg.norm(delta) + 0.002
    env.step(np.zeros(7))
    moved = env.gripper_position - start
    assert np.allclose(moved, POSITION_SCALE * deltas.sum(axis=0), atol=0.002)


def test_rotation_vectors() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        vector = rng.uniform(-1.5, 1.5, 3)
        assert np.allclose(rotation_vector(rotation_matrix(vector)), vector, atol=1e-9)
    assert np.allclose(rotation_matrix(np.zeros(3)), np.eye(3))


def test_expert_refuses_other_environments() -> None:
    with pytest.raises(ValueError, match="tabletop"):
        Expert(toy_suite.ToyEnv(), np.random.default_rng(0))


def test_expert_table_prints_and_checks_its_input(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose("expert_table", ["states=1", "tasks=[8]", "suite=tabletop_goal"])
    (row,) = run(config)
    assert row.rate == 1.0
    assert "press the white button" in capsys.readouterr().out
    for wrong in ("[10]", "[]", "[0.5]", "x"):
        with pytest.raises(ValueError, match="tasks 0 to 9, got tasks="):
            run(compose("expert_table", [f"tasks={wrong}"]))
    for wrong in ("required=.nan", "required=95", "noise=.nan", "noise=-1", "states=2.5", "states=0", "first_state=-1"):
        with pytest.raises(ValueError, match=f"{wrong.partition('=')[0]} must be a"):
            run(compose("expert_table", [wrong]))
    with pytest.raises(ValueError, match="unknown suite"):
        run(compose("expert_table", ["suite=tabletop_nothing"]))


class Crowded(toy_suite.ToyEnv):
    """Has no room in the initial state 1."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if options and options["initial_state"] == 1:
            raise CrowdedSceneError("no room for the brown ball")
        return super().reset(seed=seed, options=options)


def test_expert_table_goes_on_where_a_scene_has_no_room() -> None:
    suite = replace(toy_suite.suite(), make=Crowded)
    row = play(suite, 0, range(3), 0.0)
    assert (row.states, row.rate, len(row.steps), row.crowded) == (2, 1.0, 2, (1,))
    assert str(row).endswith("no room: [1]")
    assert play(suite, 0, [1], 0.0).rate == 0.0


def test_expert_table_plays_a_cell_of_the_robustness_benchmark() -> None:
    chosen = ["states=2", "tasks=[0]", "suite=tabletop_goal"]
    (clean,) = run(compose("expert_table", chosen))
    (changed,) = run(compose("expert_table", [*chosen, "perturbation=robot", "level=3"]))
    assert changed.rate == 1.0
    assert changed.steps != clean.steps
    for wrong in ("level=1", "perturbation=robot", "perturbation=sensor level=1", "perturbation=x level=1"):
        with pytest.raises(ValueError, match="perturbation="):
            run(compose("expert_table", [*chosen, *wrong.split()]))
    with pytest.raises(ValueError, match="level must be 1, 2 or 3"):
        run(compose("expert_table", [*chosen, "perturbation=robot", "level=4"]))
