"""Perturbed tabletop scenes: more with each level, still solvable, and with names that are still true."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from cogvla.envs import TABLETOP_SUITES
from cogvla.envs.perturbation.perturbation import LEVELS, OF_THE_PLAYER, OF_THE_SCENE, Perturbation
from cogvla.envs.suite import get_suite
from cogvla.envs.tabletop.env import CAMERAS, SIDE_MARGIN, START_REGION, TabletopEnv
from cogvla.envs.tabletop.perturbations import PERTURBATIONS, PIVOT
from cogvla.libero.perturbations import PERTURBATIONS as LIBERO
from cogvla.tests.support.paths import ROOT
from cogvla.tests.support.tabletop import tabletop

SIZE = 48
EPISODES = [(task, state) for task in (0, 3, 6, 9) for state in (0, 1)]


@pytest.fixture(scope="module", params=TABLETOP_SUITES)
def env(request: pytest.FixtureRequest) -> Iterator[TabletopEnv]:
    built = tabletop(request.param, image_size=SIZE)
    yield built
    built.close()


def start(env: TabletopEnv, task: int, state: int, dimension: str = "", level: int = 0) -> dict[str, np.ndarray]:
    env.perturbations = (Perturbation(dimension, level),) if level else ()
    return env.reset(options={"task": task, "initial_state": state})[0]


@pytest.mark.parametrize(
    "dimension", [dimension for dimension in PERTURBATIONS if dimension not in (*OF_THE_PLAYER, "robot")]
)
def test_images_differ_more_with_each_level(env: TabletopEnv, dimension: str) -> None:
    differences = np.zeros((len(EPISODES), 1 + len(LEVELS)))
    for row, (task, state) in enumerate(EPISODES):
        clean = start(env, task, state)
        for level in LEVELS:
            seen = start(env, task, state, dimension, level)
            changes = [np.abs(seen[camera].astype(float) - clean[camera]).mean() for camera in CAMERAS]
            assert max(changes) > 0, (task, state, level)
            differences[row, level] = np.mean(changes)
    means = differences.mean(axis=0)
    assert (np.diff(means) > 0).all(), means


def test_the_arm_starts_farther_outside_with_each_level(env: TabletopEnv) -> None:
    for task, state in EPISODES:
        start(env, task, state)
        joints, outside = env.scene.data.qpos[:7].copy(), []
        for level in LEVELS:
            position = start(env, task, state, "robot", level)["state"][:3]
            outside.append(float(np.maximum(START_REGION[0] - position, position - START_REGION[1]).max()))
            assert np.abs(env.scene.data.qpos[:7] - joints).max() > 0.05
            assert np.allclose(position, env.gripper_position)
        assert 0.019 < outside[0] < outside[1] < outside[2] < 0.101


@pytest.mark.parametrize("dimension", ["camera", "light", "background"])
def test_what_only_looks_different_plays_the_same(env: TabletopEnv, dimension: str) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 7))
    states = []
    for level in (0, 3):
        start(env, 2, 5, dimension, level)
        states.append([env.step(action)[0]["state"] for action in actions])
    assert np.array_equal(states[0], states[1])


def test_the_point_that_the_camera_moves_around_stays_in_place(env: TabletopEnv) -> None:
    for level in (0, *LEVELS):
        start(env, 1, 1, "camera", level)
        u, v, depth = env.camera_projection("agentview") @ np.append(PIVOT, 1.0)
        assert np.allclose([u / depth, v / depth], 0.5, atol=0.01)


def test_target_and_goal_stay_in_view_and_masks_agree_with_labels(env: TabletopEnv) -> None:
    for dimension in ("camera", "layout", "robot"):
        for level in LEVELS:
            for task, state in EPISODES:
                start(env, task, state, dimension, level)
                matrix = env.camera_projection("agentview")
                for point in env.labels().values():
                    u, v, depth = matrix @ np.append(point, 1.0)
                    assert (np.abs(np.array([u, v]) / depth - 0.5) < 0.48).all(), (dimension, level, task, state)
            mask = env.target_mask("agentview", 96, 96)
            if mask.sum() > 30:  # the arm may stand in front of it
                rows, columns = np.nonzero(mask)
                u, v, depth = matrix @ np.append(env.labels()["target"], 1.0)
                box = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]) / 96
                inside = (box[0] - 0.03 < np.array([u, v]) / depth) & (np.array([u, v]) / depth < box[1] + 0.03)
                assert inside.all(), (dimension, level)


def test_leftmost_and_rightmost_stay_so() -> None:
    env = tabletop("tabletop_spatial", image_size=16, render=False)
    turned = []
    for level in LEVELS:
        for state in range(25):
            for task, side in env.family.sides.items():
                env.perturbations = (Perturbation("camera", level),)
                _, info = env.reset(options={"task": task, "initial_state": state})
                matrix = env.camera_projection("agentview")
                cubes = [name for name in env.scene.placed if name.startswith("cube")]
                points = {name: matrix @ np.append(env.scene.position(name), 1.0) for name in cubes}
                along = {name: side * point[0] / point[2] for name, point in points.items()}
                named = env.goals[0].item
                others = max(value for name, value in along.items() if name != named)
                assert along[named] > others + SIDE_MARGIN, (task, state, level)
                turned.append(abs(info["perturbation"]["azimuth"]))
    assert np.mean(np.array(turned) > 3) > 0.9, "few cameras turn less than their level says"


def test_scenes_with_distractors_are_at_rest(env: TabletopEnv) -> None:
    for level in LEVELS:
        start(env, level, level, "layout", level)
        assert sum(name.startswith("spare") for name in env.scene.placed) == level
        before = {name: env.scene.position(name) for name in env.scene.items}
        for _ in range(15):
            env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        for name, position in before.items():
            assert np.linalg.norm(env.scene.position(name) - position) < 1e-3, name


def test_the_documentation_has_the_magnitudes() -> None:
    tabletop, _, libero = (ROOT / "docs" / "robustness.md").read_text().partition("### LIBERO\n")
    for text, suite in ((tabletop, PERTURBATIONS), (libero, LIBERO)):
        rows = re.findall(r"^\| `(\w+)`[^|]*((?:\|[^|\n]*){3})\|$", text, re.M)
        documented = {name: [cell.strip() for cell in cells.split("|")[1:]] for name, cells in rows}
        for dimension, levels in suite.items():
            for name in levels[0] if dimension != "wording" and (suite, dimension) != (LIBERO, "sensor") else ():
                assert documented[name] == [_written(values[name]) for values in levels], (dimension, name)


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " to ".join(f"{end:g}" for end in (value if isinstance(value, list) else [value]))


def wins(env: TabletopEnv, dimension: str, level: int, states: int) -> int:
    suite, won = get_suite(env.family.name), 0
    assert suite.expert is not None
    env.skip_images = True
    for task in range(10):
        for state in range(states):
            start(env, task, state, dimension, level)
            expert = suite.expert(env, np.random.default_rng(0))
            for _ in range(suite.max_steps):
                if env.step(expert.act())[2]:
                    won += 1
                    break
    env.skip_images = False
    return won


@pytest.mark.parametrize("states", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dimension", ["layout", "robot"])
def test_the_expert_keeps_its_success(env: TabletopEnv, dimension: str, states: int) -> None:
    """It sees the true state, so it says whether scenes are solvable; the other dimensions leave physics as it is."""
    clean = wins(env, "", 0, states)
    for level in LEVELS:
        assert wins(env, dimension, level, states) >= 0.95 * clean, level


def test_what_the_rollout_carries_out_is_refused_by_the_environment(env: TabletopEnv) -> None:
    for dimension in OF_THE_PLAYER:
        with pytest.raises(ValueError, match=f"a rollout carries out the perturbation '{dimension}'"):
            start(env, 0, 0, dimension, 1)
    for wrong in ("camera", ("camera", 1), (None,)):
        env.perturbations = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match="must be of the class Perturbation, got"):
            env.reset(options={"task": 0, "initial_state": 0})
    env.perturbations = (Perturbation("light", 1), Perturbation("light", 2))
    with pytest.raises(ValueError, match="two perturbations are of the dimension 'light'"):
        env.reset(options={"task": 0, "initial_state": 0})
    env.perturbations = ()


def test_several_at_once_are_those_of_each(env: TabletopEnv) -> None:
    """Light and base say in the picture and in the state that all are there; what one draws, others do not change."""
    cells = [Perturbation(name, 2) for name in OF_THE_SCENE]
    found = []
    for given in [(cell,) for cell in cells] + [tuple(cells), tuple(reversed(cells))]:
        env.perturbations = given
        observation, info = env.reset(options={"task": 1, "initial_state": 4})
        found.append((observation, info["perturbation"]))
    env.perturbations = ()
    *alone, (observation, drawn), (reversed_observation, reversed_drawn) = found
    assert drawn == reversed_drawn
    assert all(np.array_equal(observation[name], reversed_observation[name]) for name in observation)
    for cell, (_, each) in zip(cells, alone, strict=True):
        if cell.dimension != "background":  # it keeps away from the colours of distractors, too
            assert each.items() <= drawn.items(), cell
    assert set(drawn) == {name for _, each in alone for name in each}


def test_other_tasks_of_a_turned_camera_say_left_and_right_truly() -> None:
    """They become labels of recordings, so words that are no longer true must not be among them."""
    env = tabletop("tabletop_spatial", image_size=16, render=False)
    dropped = 0
    for task in range(len(env.family.tasks)):
        for state in range(12):
            options = {"task": task, "initial_state": state}
            env.perturbations = ()
            clean = env.reset(options=options)[1]["alternative_tasks"]
            env.perturbations = (Perturbation("camera", 3),)
            turned = env.reset(options=options)[1]["alternative_tasks"]
            assert set(turned) <= set(clean)
            assert all(env._sides_are_right(other) for other in turned)
            dropped += len(clean) - len(turned)
    assert dropped > 0
    env.close()
