"""LIBERO's scripted experts: from goals to skills without a simulator, and one task of it where assets are present.

Success over all tasks and initial states is measured by `expert_table suite=libero_object`; see docs/libero.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest

from cogvla.envs.contract import Perturbable, SuiteEnv, required, resting_action
from cogvla.envs.perturbation.perturbation import Perturbation
from cogvla.envs.recording.demonstrator import Demonstrator, DemonstratorSettings
from cogvla.envs.rotations import rotation_vector
from cogvla.envs.suite import Suite
from cogvla.libero.env import LiberoEnv, LiberoSettings
from cogvla.libero.experts.grasps import PALM_HEIGHT, Grasp
from cogvla.libero.experts.hand import Hand
from cogvla.libero.experts.motion import CLOSE, DOWN, OPEN, Move, over, pointing
from cogvla.libero.experts.places import Place
from cogvla.libero.experts.plan import VERBS, Subgoal, subgoals
from cogvla.libero.experts.skills import PHASES
from cogvla.libero.experts.view import FINGER_OPEN, Obstacles, SceneView
from cogvla.libero.suites import libero_expert, libero_suite
from cogvla.libero.tasks import LIBERO_SUITES
from cogvla.tests.support.libero_assets import ASSETS, MESHES, needs_assets, needs_libero
from cogvla.tests.support.toy_suite import ToyEnv

NOMINAL = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""How the hand is turned at the beginning: it points down and opens along y."""


def steps(*goal: tuple[str, ...]) -> list[tuple[str, str, str]]:
    return [(subgoal.verb, subgoal.item, subgoal.place) for subgoal in subgoals(goal)]


# --- goals -----------------------------------------------------------------------------------------------------------


def test_putting_into_a_drawer_opens_it_first_and_closes_it_last() -> None:
    drawer = "white_cabinet_1_bottom_region"
    found = steps(("close", drawer), ("in", "bowl_1", drawer))
    moved = ("clear", "bowl_1", drawer)
    assert found == [moved, ("open", drawer, ""), ("put", "bowl_1", drawer), ("close", drawer, "")]
    assert steps(("in", "mug_1", "microwave_1_heating_region"))[0] == ("open", "microwave_1", ""), "a door stays aside"


def test_the_stove_is_turned_on_before_something_stands_on_it() -> None:
    found = steps(("on", "moka_pot_1", "flat_stove_1_cook_region"), ("turnon", "flat_stove_1"))
    assert [verb for verb, _, _ in found] == ["turnon", "put"]


def test_two_objects_are_put_in_the_order_of_the_goal() -> None:
    basket = "basket_1_contain_region"
    found = steps(("in", "soup_1", basket), ("in", "milk_1", basket))
    assert found == [("put", "soup_1", basket), ("put", "milk_1", basket)]


def test_two_objects_on_one_surface_stand_side_by_side() -> None:
    found = subgoals([("on", f"moka_pot_{i}", "flat_stove_1_cook_region") for i in (1, 2)])
    assert [subgoal.side for subgoal in found] == [-1, 1]


def test_opening_on_the_way_is_done_when_the_thing_is_inside() -> None:
    inside = ("in", "bowl_1", "wooden_cabinet_1_top_region")
    assert subgoals([inside])[1] == Subgoal("open", "wooden_cabinet_1_top_region", until=(inside,))


def test_plates_are_pushed() -> None:
    assert steps(("on", "plate_1", "main_table_stove_front_region"))[0][0] == "push"


def test_a_predicate_without_a_skill_is_refused() -> None:
    with pytest.raises(ValueError, match="turnoff"):
        subgoals([("turnoff", "flat_stove_1")])


@needs_libero
@pytest.mark.parametrize("suite", [name for name in LIBERO_SUITES if name != "libero_90"])
def test_every_goal_of_the_suites_becomes_subgoals(suite: str) -> None:
    from cogvla.libero.installation import problem, task_names

    for name in task_names(suite):
        goal = problem(suite, name).goal
        found = subgoals(goal)
        assert {subgoal.verb for subgoal in found} <= set(VERBS)
        assert {predicate for subgoal in found for predicate in subgoal.until} == set(goal)


# --- geometry --------------------------------------------------------------------------------------------------------


def test_a_hand_closes_along_a_line_whichever_way_round_is_nearer() -> None:
    for closing in (np.array([0.0, 1.0, 0.0]), np.array([0.0, -1.0, 0.0])):
        assert np.allclose(pointing(DOWN, closing, NOMINAL), NOMINAL)
    front = pointing(np.array([0.0, -1.0, 0.0]), np.array([0.0, 0.0, 1.0]), NOMINAL)
    assert np.allclose(front[:, 2], [0, -1, 0])
    assert np.linalg.det(front) == pytest.approx(1.0)
    assert np.trace(front @ NOMINAL.T) == pytest.approx(1.0), "a quarter turn, and not a half"


def test_a_hand_that_someone_else_moves_has_gripped_and_left_a_fixture_only_if_it_did() -> None:
    view = SimpleNamespace(gripper=np.zeros(3), rotation=NOMINAL, opening=2 * FINGER_OPEN, is_thing=lambda _: False)
    hand = Hand(view)  # type: ignore[arg-type]
    advise = partial(hand.grip, "drawer", np.zeros(3), NOMINAL, np.zeros(3))
    assert advise().gripper == CLOSE
    hand.follow(closes=False)
    assert hand.leave() is None, "nobody gripped"
    for _ in range(3):
        advise()
        hand.follow(closes=True)
    assert hand.leave() is not None
    hand.follow(closes=False)
    assert hand.leave() is not None, "the hand is still there"
    view.gripper = np.array([0.0, 0.2, 0.0])
    hand.follow(closes=False)
    assert hand.leave() is None, "it went away sideways"
    for y in (0.0, 0.1):  # it begins to leave, grips again, and pulls
        view.gripper = np.array([0.0, y, 0.0])
        hand.grip("drawer", view.gripper, NOMINAL, view.gripper)
        hand.follow(closes=True)
        if y == 0.0:
            hand.leave()
            hand.follow(closes=False)
    view.gripper = np.array([0.0, 0.2, 0.0])
    hand.follow(closes=True)
    hand.follow(closes=False)
    assert hand.leave() is not None, "where it began to leave before says nothing"


def test_a_hand_holds_a_thing_while_one_finger_trembles() -> None:
    touched = (True, True)
    view = SimpleNamespace(
        gripper=np.zeros(3), rotation=NOMINAL, finger_speed=0.0, touching=lambda _: touched, is_thing=lambda _: True
    )
    hand = Hand(view)  # type: ignore[arg-type]
    hand._forget("bowl")
    hand.follow(closes=True)
    assert all(hand.still_holds("bowl") for _ in range(9))
    touched = (True, False)
    assert [hand.still_holds("bowl") for _ in range(6)] == [True] * 4 + [False] * 2
    touched = (True, True)
    assert all(hand.still_holds("bowl") for _ in range(9))
    touched, view.finger_speed = (True, False), 0.05
    assert not hand.still_holds("bowl"), "it slips out of the hand"
    touched, view.finger_speed = (False, False), 0.0
    assert not hand.still_holds("bowl")
    hand.follow(closes=False)
    touched = (True, False)
    hand.follow(closes=True)
    assert not hand.closing, "a closed hand beside the bowl"
    view.finger_speed = 0.1
    hand.follow(closes=True)
    assert hand.closing


def test_someone_else_may_act_while_the_expert_would_push_with_its_fist() -> None:
    """The hand had forgotten the bowl, but not the grasp, and asked which way up a thing without a name is."""
    known = {"bowl": np.eye(3)}
    view = SimpleNamespace(gripper=np.zeros(3), rotation=NOMINAL, frame=known.__getitem__, is_thing=known.__contains__)
    hand = Hand(view)  # type: ignore[arg-type]
    hand._forget("bowl")
    hand._grasp = Grasp(np.zeros(3), np.array([1.0, 0.0, 0.0]), rim=True)
    hand.fist()
    for closes in (True, False):
        hand.follow(closes)


def test_obstacles_are_turned_boxes() -> None:
    turned = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    wall = Obstacles(np.zeros((1, 3)), np.array([[0.2, 0.01, 0.1]]), turned[None], np.array([0.1]), np.array([-0.1]))
    assert wall.under(np.array([[0.0, 0.15], [0.15, 0.0], [0.02, 0.0]])).tolist() == [[True], [False], [False]]
    assert wall.under(np.array([[0.02, 0.0]]), margin=0.02).tolist() == [[True]]


def test_what_was_let_go_beside_its_place_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    touched, low, high = (True, True), np.array([-0.05, -0.05, 0.0]), np.array([0.05, 0.05, 0.1])
    view = SimpleNamespace(
        gripper=np.array([0.0, 0.0, 0.09]),
        rotation=NOMINAL,
        opening=2 * FINGER_OPEN,
        finger_speed=0.0,
        touching=lambda _: touched,
        is_thing=lambda _: True,
        box=lambda _: (low, high),
        position=lambda _: np.array([0.031, 0.0, 0.0]),
    )
    hand = Hand(view)  # type: ignore[arg-type]
    monkeypatch.setattr(hand, "take", lambda *_: Move("approach", np.zeros(3), NOMINAL, OPEN))
    hand._forget("mug")
    hand.follow(closes=True)
    hand.follow(closes=False)
    touched, place = (False, False), Place(np.zeros(3), tolerance=0.012, drop=0.012)
    phases = []
    for height in (0.09, 0.15, 0.09):
        view.gripper = np.array([0.0, 0.0, height])
        phases.append(hand.put_at("mug", lambda _: place).phase)
    assert phases == ["release", "approach", "approach"]


def test_a_palm_over_a_bar_goes_aside_before_it_comes_down() -> None:
    bar = Obstacles(
        np.array([[0.0, 0.05, 1.0]]), np.array([[0.2, 0.03, 0.1]]), np.eye(3)[None], np.array([1.1]), np.array([0.9])
    )
    turned = np.diag([1.0, -1.0, -1.0])  # the palm lies along the bar
    hand, aim = np.array([0.0, 0.0, 1.02]), np.array([0.0, -0.015, 0.9])
    low, high = np.array([-0.05, -0.05, 1.05]), np.array([0.05, 0.05, 1.12])
    view = SimpleNamespace(gripper=hand, rotation=turned, box=lambda _: (low, high), obstacles=lambda *_: bar)
    above = over(view, aim, turned, carried="bowl", tolerance=0.02)  # type: ignore[arg-type]
    assert above[1] == pytest.approx(-0.015)
    assert above[2] > hand[2]
    view.gripper = np.array([0.0, 0.0, 1.2])  # farther up it comes down, though only as far as the bar lets the palm
    down = over(view, aim, turned, carried="bowl", tolerance=0.02)[2]  # type: ignore[arg-type]
    assert 1.1 < down + PALM_HEIGHT < 1.12
    view.gripper = np.array([0.0, -0.1, 1.1])
    assert over(view, view.gripper - (0.0, 0.0, 0.1), turned, carried="bowl")[2] < 1.01  # type: ignore[arg-type]


# --- one task --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite() -> Suite:
    return libero_suite(
        "libero_object", LiberoSettings(ASSETS, lean=True, reflections=False, robot_meshes=MESHES, extra_passes=False)
    )


@pytest.fixture(scope="module")
def env(suite: Suite) -> Iterator[LiberoEnv]:
    built = suite.make(render=False)
    assert isinstance(built, LiberoEnv)
    yield built
    built.close()


def reset(env: SuiteEnv, task: int, state: int) -> None:
    """Reset a task to a state, and let things come to rest."""
    env.reset(options={"task": task, "initial_state": state})
    for _ in range(10):
        env.step(resting_action())


@needs_assets
def test_what_falls_out_of_the_hand_is_taken_again(env: LiberoEnv) -> None:
    reset(env, 1, 0)
    expert = libero_expert(env, np.random.default_rng(0))
    view, dropped, success = SceneView(env.scene), 0, False
    for _ in range(280):
        action = expert.act()
        if view.gripper[2] > 0.1 and dropped < 8 and action[6] > 0:
            action[6], dropped = -1.0, dropped + 1
        *_, success, _, _ = env.step(action)
        if success:
            break
    assert dropped == 8
    assert success


@needs_assets
def test_what_someone_else_tips_over_is_taken_as_it_lies(env: LiberoEnv) -> None:
    reset(env, 7, 1000)
    expert = libero_expert(env, np.random.default_rng(0))
    expert.act()
    pose = env.scene.data.joint("milk_1_joint0").qpos
    mujoco.mju_mulQuat(pose[3:], np.sqrt([0.5, 0.5, 0.0, 0.0]), pose[3:].copy())
    pose[2] += 0.03
    for _ in range(15):
        expert.act()
        env.step(resting_action())
        expert.follow(resting_action())
    advised, anew = expert.act(), libero_expert(env, np.random.default_rng(0)).act()
    np.testing.assert_allclose(advised, anew, atol=0.02)


@needs_assets
@pytest.mark.parametrize("state", [2, 1001])
def test_a_bowl_comes_down_into_a_drawer_past_the_bars_above_it(state: int) -> None:
    settings = LiberoSettings(ASSETS, lean=True, reflections=False, robot_meshes=MESHES, extra_passes=False)
    env = libero_suite("libero_10", settings).make(render=False)
    reset(env, 3, state)
    expert, phases = libero_expert(env, np.random.default_rng(0)), [""]
    while phases[-1] != "release" and len(phases) < 200:
        env.step(expert.act())
        phases.append(PHASES[expert.phase])
    env.close()
    assert phases[-1] == "release"
    assert phases.count("lower") < 15


@needs_assets
def test_the_way_to_a_handle_changes_slowly() -> None:
    """Actions that jump from one step to the next teach a policy the middle of both, as no picture shows the moment."""
    settings = LiberoSettings(ASSETS, lean=True, reflections=False, robot_meshes=MESHES, extra_passes=False)
    env = libero_suite("libero_10", settings).make(render=False)
    reset(env, 9, 1)
    expert, actions = libero_expert(env, np.random.default_rng(0)), [np.zeros(7, np.float32)]
    while actions[-1][6] < 1 and len(actions) < 100:
        actions.append(expert.act())
        env.step(actions[-1])
    env.close()
    assert 30 < len(actions) < 100, "it closes on the handle"
    jumps = np.abs(np.diff(actions[2:-1], axis=0))[:, :6].max(axis=1)
    assert jumps.max() < 0.7


@needs_assets
@pytest.mark.parametrize(
    ("suite_name", "task", "state", "changes"),
    [
        pytest.param("libero_goal", 3, 7, (), id="a bowl where the drawer opens"),
        pytest.param("libero_goal", 5, 3, (), id="a box in the plate's way"),
        pytest.param("libero_goal", 5, 9, (), id="an arm nearly stretched out"),
        pytest.param("libero_goal", 5, 4, (Perturbation("robot", 3),), id="a plate at the end of the arm's reach"),
        pytest.param("libero_goal", 5, 1, (Perturbation("robot", 1),), id="a plate beside a cabinet"),
        pytest.param("libero_goal", 2, 0, (), id="a far place"),
        pytest.param("libero_10", 3, 0, (), id="a drawer below others to shut"),
        pytest.param("libero_10", 9, 0, (), id="a mug through an opening at the front"),
        pytest.param("libero_10", 9, 36, (), id="a door that is not wide open"),
        pytest.param("libero_10", 2, 0, (Perturbation("layout", 3),), id="a pot as wide as the open hand"),
    ],
)
def test_what_is_in_the_way_and_what_is_far(
    suite_name: str, task: int, state: int, changes: tuple[Perturbation, ...]
) -> None:
    settings = LiberoSettings(ASSETS, lean=True, reflections=False, robot_meshes=MESHES, extra_passes=False)
    suite = libero_suite(suite_name, settings)
    env = suite.make(render=False)
    required(env, Perturbable, "perturbation").perturbations = changes
    reset(env, task, state)
    expert, success = libero_expert(env, np.random.default_rng(0)), False
    for _ in range(suite.max_steps):
        *_, success, _, _ = env.step(expert.act())
        if success:
            break
    env.close()
    assert success


@needs_assets
@pytest.mark.parametrize(
    ("suite_name", "task"),
    [
        pytest.param("libero_10", 3, id="beside a rack, into a drawer"),
        pytest.param("libero_10", 9, id="by the handle, through an opening at the front"),
        pytest.param("libero_spatial", 5, id="a tilted bowl"),
        pytest.param("libero_spatial", 9, id="from high up"),
    ],
)
def test_a_thing_is_taken_at_the_same_side_in_every_scene_of_a_task(suite_name: str, task: int) -> None:
    settings = LiberoSettings(ASSETS, lean=True, reflections=False, robot_meshes=MESHES, extra_passes=False)
    suite = libero_suite(suite_name, settings)
    env = suite.make(render=False)
    assert isinstance(env, LiberoEnv)
    rotations = []
    for state in (0, 1, 5, 7, 1000, 1001):
        env.reset(options={"task": task, "initial_state": state})
        for _ in range(suite.settling_steps):
            env.step(resting_action())
        expert = libero_expert(env, np.random.default_rng(0))
        while (action := expert.act())[6] < 0:
            env.step(action)
        rotations.append(SceneView(env.scene).rotation)
    env.close()
    angles = [np.degrees(np.linalg.norm(rotation_vector(a @ b.T))) for a, b in combinations(rotations, 2)]
    assert max(angles) < 45


@needs_assets
def test_the_room_in_a_thing_ends_at_its_walls() -> None:
    settings = LiberoSettings(ASSETS, lean=True, reflections=False, robot_meshes=MESHES, extra_passes=False)
    env = libero_suite("libero_10", settings).make(render=False)
    assert isinstance(env, LiberoEnv)
    env.reset(options={"task": 9, "initial_state": 0})
    view, region = SceneView(env.scene), "microwave_1_heating_region"
    low, high = view.box("microwave_1")
    centre = view.position(region)
    back, front, down = (view.room("microwave_1", centre, np.array(way)) for way in ([0, 1, 0], [0, -1, 0], [0, 0, -1]))
    env.close()
    assert front == np.inf, "the door is open"
    assert 0.0 < back < high[1] - centre[1]
    assert 0.0 < down < centre[2] - low[2]


@needs_assets
def test_labels_are_the_item_and_its_place(env: LiberoEnv) -> None:
    env.reset(options={"task": 1, "initial_state": 0})
    labels = env.labels()
    assert np.allclose(labels["target"], env.scene.position("cream_cheese_1"))
    assert np.allclose(labels["goal"], env.scene.position("basket_1_contain_region"))
    other = env.labels_for(7)
    assert np.allclose(other["target"], env.scene.position("milk_1"))


@needs_assets
def test_demonstrations_are_recorded_after_things_have_settled(suite: Suite) -> None:
    names = tuple(task.instruction for task in suite.tasks)
    settings = DemonstratorSettings(
        suite.make, libero_expert, names, suite.max_steps, 32, noise=1.0, seed=0, settling_steps=suite.settling_steps
    )
    demonstrator = Demonstrator(settings)
    episode, attempts = demonstrator.record(1)
    demonstrator.close()
    assert attempts <= 2
    assert episode.instruction == "pick up the cream cheese and place it in the basket"
    assert episode.arrays["action"][[0, -20], 6].tolist() == [-1, 1]
    still = np.abs(np.diff(episode.arrays["label.target"][:10], axis=0))
    assert still.max() < 1e-3, "the object lies before the expert begins"
    assert not np.array_equal(episode.arrays["action"], episode.arrays["label.executed_action"])


def test_the_expert_refuses_other_environments() -> None:
    with pytest.raises(ValueError, match="LIBERO"):
        libero_expert(ToyEnv(), np.random.default_rng(0))
