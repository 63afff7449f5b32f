"""Other things on the table, moved things, and another start of the arm: free of contact, solvable, and not solved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
import pytest

from cogvla.envs.contract import resting_action
from cogvla.envs.perturbation.perturbation import LAYOUT, LEVELS, ROBOT, Perturbation
from cogvla.libero.env import LiberoEnv
from cogvla.libero.perturbations import PERTURBATIONS
from cogvla.libero.spares import SPARES, spares_for
from cogvla.libero.suites import libero_expert
from cogvla.libero.tasks import LIBERO_SUITES, MAX_STEPS, tasks
from cogvla.tests.support.libero_assets import LEAN, needs_assets, needs_libero

PLATES = 4
"""Task of libero_10 that names a left and a right plate."""
STATE = 3


@pytest.fixture(scope="module")
def envs() -> Iterator[dict[str, LiberoEnv]]:
    played = ("libero_goal", "libero_10", "libero_object", "libero_spatial")
    built = {suite: LiberoEnv(suite, LEAN, image_size=48) for suite in played}
    yield built
    for env in built.values():
        env.close()


def start(env: LiberoEnv, task: int, *cells: Perturbation, state: int = STATE) -> tuple[dict[str, np.ndarray], Any]:
    env.perturbations = cells
    observation, info = env.reset(options={"task": task, "initial_state": state})
    return observation, info.get("perturbation")


def whole(env: LiberoEnv, observation: dict[str, np.ndarray]) -> bytes:
    """The observation, and the state of the simulation with the poses of all bodies."""
    data = env.scene.data
    simulated = np.concatenate([data.qpos, data.qvel, data.xpos.ravel(), data.xquat.ravel()])
    return b"".join(observation[key].tobytes() for key in sorted(observation)) + simulated.tobytes()


def touching(env: LiberoEnv, body: str) -> set[int]:
    """The things that touch a thing."""
    model = env.scene.model
    own = model.body(body).rootid[0]
    pairs = model.body_rootid[model.geom_bodyid[env.scene.data.contact.geom]].reshape(-1, 2)
    return {int(root) for pair in pairs if own in pair for root in pair} - {int(own)}


@needs_libero
def test_no_instruction_names_a_spare() -> None:
    words = " ".join(task.instruction for suite in LIBERO_SUITES for task in tasks(suite)).split()
    for spare in SPARES:
        assert spare.name.removeprefix("spare_") not in words
    assert not {"purple", "teal", "pink"} & set(words)
    orders = {spares_for("libero_goal", task, 3) for task in range(10)}
    assert len(orders) > 1
    for order in orders:
        assert sorted(spare.name for spare in order) == sorted(spare.name for spare in SPARES)


@needs_assets
@pytest.mark.parametrize(
    ("suite", "task"), [("libero_goal", 1), ("libero_goal", 3), ("libero_10", 2), ("libero_object", 0)]
)
def test_spares_stand_free_and_in_view(envs: dict[str, LiberoEnv], suite: str, task: int) -> None:
    env = envs[suite]
    clean, _ = start(env, task)
    for level in LEVELS:
        seen, drawn = start(env, task, Perturbation(LAYOUT, level))
        assert len(drawn["distractors"]) == level
        assert np.array_equal(seen["state"], clean["state"]), "the arm starts where it did"
        spares = [f"spare_{name}" for name in drawn["distractors"]]
        places = {name: env.scene.data.body(name).xpos.copy() for name in spares}
        for _ in range(10):
            env.step(resting_action())
        for name, place in places.items():
            assert (np.abs(env.scene.data.body(name).xpos - place) < (0.002, 0.002, 0.008)).all(), f"{name} stands"
            u, v, depth = env.camera_projection("agentview") @ np.append(place, 1.0)
            assert depth > 0
            assert max(abs(u / depth - 0.5), abs(v / depth - 0.5)) < 0.5
            assert len(touching(env, name)) == 1, f"{name} touches the table only"


@needs_assets
@pytest.mark.parametrize(("suite", "task"), [("libero_goal", 2), ("libero_10", 2), ("libero_object", 3)])
def test_things_move_further_with_each_level_and_nothing_is_solved(
    envs: dict[str, LiberoEnv], suite: str, task: int
) -> None:
    env = envs[suite]
    for level in LEVELS:
        start(env, task)
        before = {name: env.scene.position(name) for name in env.scene.loose}
        _, drawn = start(env, task, Perturbation(LAYOUT, level))
        least, most = PERTURBATIONS[LAYOUT][level - 1]["moved_mm"]
        assert any(drawn["moved_mm"])
        for name, told in zip(env.scene.loose, drawn["moved_mm"], strict=True):
            far = 1000 * np.linalg.norm(env.scene.position(name) - before[name])
            assert far == pytest.approx(told, abs=0.01)
            assert told == 0.0 or least <= told <= most
        for _ in range(10):
            _, _, success, _, _ = env.step(resting_action())
            assert not success


@needs_assets
def test_where_sides_are_named_things_move_little(envs: dict[str, LiberoEnv]) -> None:
    _, drawn = start(envs["libero_10"], PLATES, Perturbation(LAYOUT, 3))
    assert 0 < max(drawn["moved_mm"]) <= PERTURBATIONS[LAYOUT][0]["moved_mm"][1]


@needs_assets
@pytest.mark.parametrize(("suite", "task"), [("libero_goal", 0), ("libero_10", 0), ("libero_object", 5)])
def test_the_arm_starts_elsewhere_without_contact(envs: dict[str, LiberoEnv], suite: str, task: int) -> None:
    env = envs[suite]
    start(env, task)
    arm = [env.scene.model.joint(f"robot0_joint{i + 1}").qposadr[0] for i in range(7)]
    joints, base = env.scene.data.qpos[arm].copy(), env.scene.data.body("robot0_base").xpos.copy()
    for level in LEVELS:
        _, drawn = start(env, task, Perturbation(ROBOT, level))
        limits = PERTURBATIONS[ROBOT][level - 1]
        assert limits["joints"][0] <= np.linalg.norm(env.scene.data.qpos[arm] - joints) <= limits["joints"][1]
        shift = env.scene.data.body("robot0_base").xpos - base
        assert 1000 * np.linalg.norm(shift) == pytest.approx(drawn["base_mm"])
        assert limits["base_mm"][0] <= drawn["base_mm"] <= limits["base_mm"][1]
        assert not touching(env, "robot0_base")
        grip = env.scene.model.site("gripper0_grip_site").id
        hand, turn = env.scene.data.site_xpos[grip].copy(), env.scene.data.site_xmat[grip].copy()
        for _ in range(10):
            env.step(resting_action())
        assert np.abs(env.scene.data.site_xpos[grip] - hand).max() < 0.02, "waiting does not move the hand"
        assert np.abs(env.scene.data.site_xmat[grip] - turn).max() < 0.05, "nor turn it"


@needs_assets
def test_clean_episodes_are_as_if_nothing_had_ever_been_perturbed(envs: dict[str, LiberoEnv]) -> None:
    env = envs["libero_10"]
    fresh = LiberoEnv("libero_10", LEAN, image_size=48)
    for state in (STATE, 60):
        start(env, 2, Perturbation(LAYOUT, 3), Perturbation(ROBOT, 3), state=state)
        env.step(resting_action())
        played = [(start(each, 2, state=state)[0], each) for each in (env, fresh)]
        assert whole(played[0][1], played[0][0]) == whole(played[1][1], played[1][0])
        action = np.array([0.3, -0.2, -0.5, 0.1, 0, 0.2, -1])
        for _ in range(3):
            assert whole(env, env.step(action)[0]) == whole(fresh, fresh.step(action)[0])
    fresh.close()


@needs_assets
def test_recorded_states_are_restored_into_the_clean_scene(envs: dict[str, LiberoEnv]) -> None:
    env = envs["libero_object"]
    clean, _ = start(env, 0)
    data = env.scene.data
    recorded = np.concatenate([[data.time], data.qpos, data.qvel])
    start(env, 0, Perturbation(LAYOUT, 2))
    restored = env.restore(recorded, task=0)
    assert np.array_equal(restored["state"], clean["state"])
    assert env.perturbations == (Perturbation(LAYOUT, 2),)


@needs_assets
@pytest.mark.parametrize(("suite", "task"), [("libero_object", 3), ("libero_goal", 1)])
def test_the_expert_solves_what_was_changed(envs: dict[str, LiberoEnv], suite: str, task: int) -> None:
    env = envs[suite]
    env.skip_images = True
    for cell in (Perturbation(LAYOUT, 3), Perturbation(ROBOT, 3)):
        start(env, task, cell, state=0)
        for _ in range(10):
            env.step(resting_action())
        expert, steps, success = libero_expert(env, np.random.default_rng(0)), 0, False
        while not success and steps < MAX_STEPS[suite]:
            success = env.step(expert.act())[2]
            steps += 1
        assert success, cell
    env.skip_images = False


@needs_assets
@pytest.mark.parametrize(("suite", "task"), [("libero_goal", 1), ("libero_spatial", 0), ("libero_spatial", 1)])
def test_spares_are_seen(suite: str, task: int, envs: dict[str, LiberoEnv]) -> None:
    """They are drawn, and not only simulated; none stands behind the cabinet."""
    env = envs[suite]
    _, drawn = start(env, task, Perturbation(LAYOUT, 3), state=3)
    model, data = env.scene.model, env.scene.data
    for name in drawn["distractors"]:
        before = env.render_camera("agentview", 96, 96).astype(int)
        data.joint(f"spare_{name}_joint").qpos[2] = -5.0
        mujoco.mj_forward(model, data)
        changed = np.abs(env.render_camera("agentview", 96, 96).astype(int) - before).max(axis=2) > 20
        assert changed.sum() > 10, name
