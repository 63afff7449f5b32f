"""Every registered suite keeps to envs/contract.py, in the parts that it offers. A new one is tested by being there.

`point` of tests/support, which is built to fail, is left out. Of LIBERO's suites, which are one class, only
`libero_goal` is played without `-m slow`.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from cogvla.envs.contract import (
    Advisor,
    Cameras,
    ContractError,
    Expert,
    ImageSkipping,
    Labels,
    Perturbable,
    SuiteEnv,
    TargetMasks,
    offered,
    required,
)
from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, OF_THE_PLAYER, Perturbation
from cogvla.envs.recording.demonstrator import Demonstrator, DemonstratorSettings
from cogvla.envs.recording.recorder import record
from cogvla.envs.suite import Suite, get_suite, suite_names
from cogvla.tests.support import toy_suite
from cogvla.tests.support.libero_assets import LEAN, needs_assets

toy_suite.register()
SIZE = 32
CAMERAS = ("agentview", "wrist")
WAIT = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
FIRST_SOLVED = {"libero_90": 1}
"""Suite -> its first task that the expert solves from initial state 0, if that is not task 0."""
Played = tuple[Suite, Any]


def played(name: str) -> Any:
    if not name.startswith("libero_"):
        return name
    return pytest.param(name, marks=[needs_assets, *([] if name == "libero_goal" else [pytest.mark.slow])])


@pytest.fixture(scope="module", params=[played(name) for name in suite_names() if name != "point"])
def suite(request: pytest.FixtureRequest) -> Suite:
    return get_suite(request.param, {"libero": asdict(replace(LEAN, extra_passes=False))})


@pytest.fixture(scope="module")
def built(suite: Suite) -> Iterator[Any]:
    env = suite.make(image_size=SIZE)
    yield env
    env.close()


@pytest.fixture
def env(built: Any) -> Any:
    """Nothing is left over from the test before."""
    if (skipping := offered(built, ImageSkipping)) is not None:
        skipping.skip_images = False
    if (perturbable := offered(built, Perturbable)) is not None:
        perturbable.perturbations = ()
    return built


def reset(env: Any, task: int, state: int, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return env.reset(options={"task": task, "initial_state": state, **options})


def rollout(env: Any, task: int, state: int, steps: int = 4) -> list[bytes]:
    """Observations under random actions."""
    observation, _ = reset(env, task, state)
    rng, seen = np.random.default_rng(3), []
    for _ in range(steps):
        seen.append(b"".join(observation[key].tobytes() for key in sorted(observation)))
        observation, *_ = env.step(rng.uniform(-1, 1, 7).astype(np.float32))
    return seen


def global_generator() -> bytes:
    """The state of NumPy's global generator."""
    return pickle.dumps(np.random.get_state())  # noqa: NPY002


def test_a_suite_names_its_tasks(suite: Suite) -> None:
    assert suite.tasks
    assert suite.max_steps > 0
    assert len({task.name for task in suite.tasks}) == len(suite.tasks)


@pytest.mark.filterwarnings("ignore::UserWarning")  # infinite bounds of the state
def test_required_members_and_types(suite: Suite, env: Any) -> None:
    assert offered(env, SuiteEnv) is not None
    check_env(env.unwrapped, skip_render_check=True)
    observation, info = reset(env, 0, 0)
    assert env.observation_space.contains(observation)
    assert {name: observation[name].shape for name in observation} == {
        **dict.fromkeys(CAMERAS, (SIZE, SIZE, 3)),
        "state": (8,),
    }
    assert all(observation[name].dtype == np.uint8 and observation[name].std() > 0 for name in CAMERAS)
    assert observation["state"].dtype == np.float32
    assert (env.action_space.shape, env.action_space.low.min(), env.action_space.high.max()) == ((7,), -1, 1)
    assert info["instruction"] == suite.tasks[0].instruction
    _, reward, terminated, truncated, after = env.step(WAIT)
    assert isinstance(reward, float)
    for value in (terminated, truncated, info["success"], after["success"]):
        assert value is False


def test_task_and_initial_state_decide_everything(suite: Suite, env: Any) -> None:
    """In an environment with a past, with another past, and without one; for evaluation and for training states."""
    for task, state in ((0, 5), (1, 1234)):
        first = rollout(env, task, state)
        before = global_generator()
        assert rollout(env, task, state + 1) != first
        assert global_generator() == before, "the global generator is left as it was"
        assert rollout(env, task, state) == first
    rebuilt = suite.make(image_size=SIZE)
    assert rollout(rebuilt, task, state) == first
    rebuilt.close()


def test_seed_decides_what_options_leave_open(env: Any) -> None:
    first, again, other = (env.reset(seed=seed)[0]["state"] for seed in (11, 11, 12))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_bad_actions_and_options_are_refused(suite: Suite, env: Any) -> None:
    reset(env, 0, 0)
    for action in (np.zeros(6), np.zeros((1, 7)), np.array([np.nan, 0, 0, 0, 0, 0, 0]), np.full(7, np.inf)):
        with pytest.raises(ValueError, match="action"):
            env.step(action)
    for options in ({"task": len(suite.tasks)}, {"initial_state": -1}, {"tasks": 1}):
        with pytest.raises(ValueError, match=r"task|initial_state|options"):
            env.reset(options=options)


def test_actions_outside_of_the_space_are_clipped(env: Any) -> None:
    states = []
    for size in (1.0, 5.0):
        reset(env, 0, 0)
        for sign in (1, -1, 1):
            observation, *_ = env.step(np.array([sign, -sign, sign, sign, -sign, sign, -sign], np.float32) * size)
        states.append(observation["state"])
    assert np.array_equal(*states)


def test_asked_swaps_the_instruction_but_not_the_scene(suite: Suite, env: Any) -> None:
    plain, info = reset(env, 0, 7)
    others = info.get("alternative_tasks", [])
    assert 0 not in others
    for other in others[:2]:
        swapped, swapped_info = reset(env, 0, 7, asked=other)
        assert swapped_info["instruction"] == suite.tasks[other].instruction != info["instruction"]
        assert 0 in swapped_info["alternative_tasks"]
        assert other not in swapped_info["alternative_tasks"]
        assert all(np.array_equal(plain[name], swapped[name]) for name in CAMERAS)
        _, _, terminated, _, after = env.step(WAIT)
        assert after["scene_task_success"] is after["success"] is terminated is False
    with pytest.raises(ValueError, match="cannot be carried out"):
        reset(env, 0, 7, asked=len(suite.tasks))


def perturbed(env: Any, task: int, state: int, change: Perturbation | None) -> tuple[bytes, Any]:
    """The first observations, and what was drawn."""
    required(env, Perturbable, "this test").perturbations = () if change is None else (change,)
    observation, info = reset(env, task, state)
    seen = [observation, env.step(WAIT)[0]]
    return b"".join(each[key].tobytes() for each in seen for key in sorted(each)), info.get("perturbation")


def test_perturbations_follow_from_the_episode_and_leave_nothing_behind(suite: Suite, env: Any) -> None:
    assert all(len(levels) == len(LEVELS) for levels in suite.perturbations.values())
    own = [name for name in DIMENSIONS if name in suite.perturbations and name not in OF_THE_PLAYER]
    if not own:
        pytest.skip("none but those of the player")
    cells = [None, *(Perturbation(name, level) for name in own for level in LEVELS)]
    episodes = [(task, 3, cell) for cell in cells for task in (0, 1)]
    seen = [perturbed(env, *episode) for episode in episodes]
    assert all((drawn is None) is (cell is None) for (_, _, cell), (_, drawn) in zip(episodes, seen, strict=True))
    assert len({images for images, _ in seen}) == len(seen), "each cell differs from the others, and from the clean run"
    rebuilt = suite.make(image_size=SIZE)
    for index in np.random.default_rng(5).permutation(len(episodes)):
        assert perturbed(rebuilt, *episodes[index]) == seen[index], episodes[index]
    rebuilt.close()


def test_truncated_at_the_limit(suite: Suite) -> None:
    env = suite.make(image_size=SIZE, render=False)
    observation, _ = reset(env, 0, 0)
    assert not any(observation[name].any() for name in CAMERAS)
    ends = [env.step(np.zeros(7, np.float32))[2:4] for _ in range(suite.max_steps)]
    assert ends == [(False, False)] * (suite.max_steps - 1) + [(False, True)]
    env.close()


def test_the_expert_ends_an_episode(suite: Suite, env: Any) -> None:
    if suite.expert is None:
        pytest.skip("no expert")
    if (skipping := offered(env, ImageSkipping)) is not None:
        skipping.skip_images = True
    reset(env, FIRST_SOLVED.get(suite.name, 0), 0)
    for _ in range(suite.settling_steps):
        env.step(WAIT)
    expert = required(suite.expert(env, np.random.default_rng(0)), Expert, "this test")
    for _ in range(suite.max_steps):
        action = expert.act()
        assert (action.dtype, action.shape, np.abs(action).max() <= 1) == (np.float32, (7,), True)
        assert isinstance(expert.phase, int)
        assert np.array_equal(expert.noisy(action), action), "no noise was asked for"
        _, _, terminated, _, info = env.step(action)
        assert terminated is info["success"]
        if terminated:
            break
    assert terminated
    noisy = suite.expert(env, np.random.default_rng(0), noise=1.0)
    assert not np.array_equal(noisy.noisy(action), action)


def test_the_expert_advises_whoever_acts_and_can_take_over(suite: Suite, env: Any) -> None:
    if suite.expert is None:
        pytest.skip("no expert")
    reset(env, FIRST_SOLVED.get(suite.name, 0), 0)
    for _ in range(suite.settling_steps):
        env.step(WAIT)
    built = suite.expert(env, np.random.default_rng(0))
    if (advisor := offered(built, Advisor)) is None:
        pytest.skip("gives no advice")
    expert, rng = required(built, Expert, "this test"), np.random.default_rng(1)
    for _ in range(12):
        assert np.isfinite(expert.act()).all()
        action = np.append(rng.uniform(-0.4, 0.4, 6), rng.choice([-1.0, 1.0])).astype(np.float32)
        env.step(action)
        advisor.follow(action)
    for _ in range(suite.max_steps):
        if env.step(expert.act())[2]:
            return
    pytest.fail("the expert could not finish what someone else began")


def test_labels(suite: Suite, env: Any) -> None:
    labels = offered(env, Labels)
    if labels is None:
        pytest.skip("not offered")
    _, info = reset(env, 0, 2)
    tasks = [0, *info["alternative_tasks"]]
    for task in tasks:
        values = labels.labels_for(task)
        assert all(values[name].dtype == np.float32 and values[name].shape == (3,) for name in ("target", "goal"))
        reset(env, 0, 2, asked=task)
        assert all(np.array_equal(values[name], labels.labels()[name]) for name in ("target", "goal"))
    for camera in CAMERAS:
        matrix = labels.camera_projection(camera)
        assert (matrix.dtype, matrix.shape) == (np.float32, (3, 4))


def test_a_counterfactual_demonstration_does_another_task_in_the_scene(suite: Suite, env: Any) -> None:
    if suite.expert is None or offered(env, Labels) is None:
        pytest.skip("cannot be recorded")
    instructions = tuple(task.instruction for task in suite.tasks)
    settings = DemonstratorSettings(
        suite.make,
        suite.expert,
        instructions,
        suite.max_steps,
        SIZE,
        noise=0.0,
        seed=0,
        settling_steps=suite.settling_steps,
        counterfactual=1.0,
    )
    demonstrator = Demonstrator(settings)
    slot = FIRST_SOLVED.get(suite.name, 0)
    episode, _ = demonstrator.record(slot)
    demonstrator.close()
    assert settings.recorded(episode, slot)
    assert not settings.recorded(episode, slot + 1)
    task, scene, state = (
        int(episode.arrays[f"label.{name}"][0, 0]) for name in ("task", "scene_task", "initial_state")
    )
    _, info = reset(env, slot, state)
    others = info["alternative_tasks"]
    assert scene == slot
    assert task in (others or [slot])
    assert episode.instruction == instructions[task]
    _, info = reset(env, slot, state, **({} if task == slot else {"asked": task}))
    possible = sorted([task, *info["alternative_tasks"]])
    assert slot in possible
    assert np.flatnonzero(episode.arrays["label.possible"][0]).tolist() == possible
    for _ in range(suite.settling_steps):
        env.step(WAIT)
    places = required(env, Labels, "this test").labels()
    assert all(np.allclose(episode.arrays[f"label.{name}"][0], places[name], atol=1e-3) for name in places)
    done = [env.step(action)[4]["success"] for action in episode.arrays["label.executed_action"]]
    assert any(done), "played again, it does the task that it says"


def test_target_masks(env: Any) -> None:
    masks = offered(env, TargetMasks)
    if masks is None:
        pytest.skip("not offered")
    reset(env, 0, 0)
    for camera in CAMERAS:
        mask = masks.target_mask(camera, 24, 40)
        assert (mask.dtype, mask.shape) == (bool, (24, 40))


def test_cameras(env: Any) -> None:
    cameras = offered(env, Cameras)
    if cameras is None:
        pytest.skip("not offered")
    observation, _ = reset(env, 0, 0)
    for camera in CAMERAS:
        image = cameras.render_camera(camera, 24, 40)
        assert (image.dtype, image.shape) == (np.uint8, (24, 40, 3))
        assert np.array_equal(cameras.render_camera(camera, SIZE, SIZE), observation[camera])


def test_skipped_images_are_the_last_ones(env: Any) -> None:
    skipping = offered(env, ImageSkipping)
    if skipping is None:
        pytest.skip("not offered")
    action = np.array([1, 1, -1, 0, 0, 0, -1], np.float32)
    first, _ = reset(env, 0, 0)
    skipping.skip_images = True
    second, *_ = env.step(action)
    assert np.array_equal(first["wrist"], second["wrist"])
    assert not np.array_equal(first["state"], second["state"])
    skipping.skip_images = False
    third, *_ = env.step(action)
    assert not np.array_equal(third["wrist"], second["wrist"])


def test_a_part_that_lacks_a_member_is_refused(tmp_path: Any) -> None:
    assert offered(toy_suite.ToyEnv(), Labels) is not None
    assert offered(toy_suite.Unlabelled(), Labels) is None
    with pytest.raises(ContractError, match=r"^HalfLabelled lacks camera_projection of Labels \(envs/contract\.py\)$"):
        offered(toy_suite.HalfLabelled(), Labels)
    cases = [
        (toy_suite.HalfLabelled, toy_suite.ToyExpert, "HalfLabelled lacks camera_projection of Labels"),
        (toy_suite.Unlabelled, toy_suite.ToyExpert, "recording needs Labels .*Unlabelled lacks camera_pro"),
        (toy_suite.ToyEnv, toy_suite.Noiseless, "Noiseless lacks noisy of Expert"),
    ]
    for (make, expert, said), workers in itertools.product(cases, (0, 1)):
        broken = Suite("broken", toy_suite.suite().tasks, 40, make, expert=expert)
        with pytest.raises(ContractError, match=said):
            record(broken, 1, tmp_path / "data", image_size=16, workers=workers)
