"""Perturbations of episodes: names, draws, images of worse cameras, and what a rollout makes of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, Perturbation
from cogvla.envs.perturbation.sensor import FAULTS, Sensor
from cogvla.envs.perturbation.wording import reworded
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import EVERYWHERE, get_suite, suite_names
from cogvla.tests.support.point_suite import TASKS, ToyPolicy, toy_suite

PERTURBABLE = [name for name in suite_names() if name.startswith("tabletop_")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cameras", "did you mean camera"),
        ("Lights", "did you mean light"),
        ("backgrounds", "did you mean background"),
        ("noise", "one of all, camera, light, background, sensor, layout, robot, wording"),
        ("", "one of all, camera"),
        (3, "unknown perturbation 3"),
    ],
)
def test_unknown_dimensions_are_refused(name: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        Perturbation(name, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("level", [0, 4, -1, 1.0, "2", True, None])
def test_unknown_levels_are_refused(level: Any) -> None:
    with pytest.raises(ValueError, match="level must be 1, 2 or 3, got"):
        Perturbation("light", level)


@pytest.mark.parametrize("name", PERTURBABLE)
def test_levels_do_not_overlap(name: str) -> None:
    suite = get_suite(name)
    for dimension in DIMENSIONS:
        first, *others = [suite.magnitudes(Perturbation(dimension, level)) for level in LEVELS]
        assert all(first.keys() == other.keys() for other in others)
        for key in first:
            ends = [each[key] for each in (first, *others)]
            if key in ("lightness", "saturation") or not isinstance(ends[0], list):
                continue  # what a level of the background adds is hue or pattern
            rising = all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
            falling = all(a[0] >= b[1] for a, b in itertools.pairwise(ends))
            assert rising or falling, (dimension, key, ends)


def test_a_suite_without_a_dimension_is_refused_before_anything_is_played() -> None:
    policy = ToyPolicy()
    for dimension in ("camera", "light", "layout"):
        spec = EpisodeSpec(0, 1, perturbation=Perturbation(dimension, 1))
        with pytest.raises(
            ValueError, match=f"'point' cannot be perturbed in '{dimension}'; it supports sensor, wording"
        ):
            rollout(policy, toy_suite(), [spec])
    assert not policy.batches


# --- sensor --------------------------------------------------------------------------------------------------------


def picture(size: int = 48) -> np.ndarray:
    image = np.full((size, size, 3), (128, 122, 115), np.uint8)
    image += (20 * np.random.default_rng(0).random((size, size, 1))).astype(np.uint8)
    image[size // 4 : size // 2, size // 3 : size // 2] = (230, 20, 20)
    image[size // 2 :, : size // 4] = (25, 50, 230)
    return image


def changed(fault: str, level: int, step: int = 0, camera: str = "agentview", size: int = 48) -> np.ndarray:
    sensor = Sensor(level, [7, 3], FAULTS.index(fault))
    assert sensor.drawn == {"fault": fault}
    return sensor({camera: picture(size)}, step)[camera]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "dropped"])
@pytest.mark.parametrize("size", [48, 128])
def test_faults_change_images_more_and_more(fault: str, size: int) -> None:
    clean = picture(size).astype(float)
    images = [changed(fault, level, size=size) for level in LEVELS]
    assert all(image.dtype == np.uint8 and image.shape == clean.shape for image in images)
    errors = [0.0, *(float(np.abs(image - clean).mean()) for image in images)]
    assert errors == sorted(errors)
    assert len(set(errors)) == 4


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_follow_from_the_episode_step_and_camera(fault: str) -> None:
    assert np.array_equal(changed(fault, 2, step=5), changed(fault, 2, step=5))
    if fault in ("noise", "motion"):
        assert not np.array_equal(changed(fault, 2, step=5), changed(fault, 2, step=6))
    if fault in ("fog", "exposure"):
        assert np.array_equal(changed(fault, 2, step=5), changed(fault, 2, step=6)), "weather and exposure stay"
    if fault in ("noise", "motion", "fog", "exposure"):
        assert not np.array_equal(changed(fault, 2), changed(fault, 2, camera="wrist"))


def test_dropped_frames_repeat_the_last_one() -> None:
    lost = []
    for level in LEVELS:
        sensor = Sensor(level, [7, 3], FAULTS.index("dropped"))
        seen = [sensor({"wrist": np.full((8, 8, 3), step, np.uint8)}, step)["wrist"][0, 0, 0] for step in range(100)]
        assert seen[0] == 0
        repeated = [now != step for step, now in enumerate(seen)]
        assert all(seen[step] == seen[step - 1] for step, again in enumerate(repeated) if again)
        lost.append(sum(repeated))
    assert 0 < lost[0] < lost[1] < lost[2] < 80


def test_initial_states_take_turns_through_the_faults() -> None:
    assert {Sensor(1, [7, 3, turn], turn).drawn["fault"] for turn in range(3, 3 + len(FAULTS))} == set(FAULTS)


# --- wording and rollouts ------------------------------------------------------------------------------------------


def test_wordings_follow_from_the_episode() -> None:
    known = [task.instruction for task in get_suite("tabletop_goal").tasks]
    for level in LEVELS:
        seeds = [Perturbation("wording", level).seed("tabletop_goal", task, 0) for task in range(10)]
        said = [reworded(text, level, seed, known) for text, seed in zip(known, seeds, strict=True)]
        assert not set(said) & set(known)
        assert said[4] == reworded(known[4], level, seeds[4], known)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rollout_perturbs_images_and_words_of_any_suite(workers: int) -> None:
    states = range(1, 4)
    plain = list(rollout(ToyPolicy(), toy_suite(), [EpisodeSpec(0, s) for s in states], workers=workers))
    assert all(result.perturbation is None for result in plain)
    for dimension in EVERYWHERE:
        specs = [EpisodeSpec(0, state, perturbation=Perturbation(dimension, 2)) for state in states]
        results = sorted(rollout(ToyPolicy(), toy_suite(), specs, workers=workers), key=lambda r: r.initial_state)
        again = sorted(rollout(ToyPolicy(), toy_suite(), specs[::-1], workers=workers), key=lambda r: r.initial_state)
        assert [r.perturbation for r in results] == [r.perturbation for r in again]
        assert all(r.perturbation for r in results)
        reworded_ones = [r.instruction != TASKS[0].instruction for r in results]
        assert reworded_ones == [dimension == "wording"] * len(states), "prompts are clean but for the wording"


def test_the_policy_sees_the_perturbed_images() -> None:
    seen: dict[str, list[np.ndarray]] = {"clean": [], "sensor": []}

    class Watching(ToyPolicy):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.seen = seen[name]

        def act(self, observation: Any) -> Any:
            self.seen.append(observation.images["agentview"][0])
            return super().act(observation)

    state = FAULTS.index("noise")
    for name, perturbation in (("clean", None), ("sensor", Perturbation("sensor", 3))):
        list(rollout(Watching(name), toy_suite(), [EpisodeSpec(0, state, perturbation=perturbation)]))
    assert len(seen["clean"]) == len(seen["sensor"]), "the state is not perturbed"
    assert all(not np.array_equal(a, b) for a, b in zip(*seen.values(), strict=True))
