"""Perturbed scenes of LIBERO: more with each level, the same physics, and names that are still true."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cogvla.envs.perturbation.perturbation import (
    BACKGROUND,
    CAMERA,
    DIMENSIONS,
    LEVELS,
    LIGHT,
    OF_THE_PLAYER,
    Perturbation,
)
from cogvla.libero.env import CAMERAS, LiberoEnv
from cogvla.libero.perturbations import PERTURBATIONS
from cogvla.tests.support.libero_assets import LEAN, needs_assets

pytestmark = needs_assets
OWN = [name for name in PERTURBATIONS if name not in OF_THE_PLAYER]
LEFT_AND_RIGHT, KITCHEN = 4, 2
"""Tasks of libero_10: one that names a left and a right plate, and one in a kitchen, which has three lights."""


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    built = LiberoEnv("libero_10", LEAN, image_size=48)
    yield built
    built.close()


def start(env: LiberoEnv, task: int, dimension: str = "", level: int = 0) -> dict[str, np.ndarray]:
    env.perturbations = (Perturbation(dimension, level),) if level else ()
    return env.reset(options={"task": task, "initial_state": 3})[0]


@pytest.mark.parametrize("dimension", OWN)
def test_images_differ_more_with_each_level(env: LiberoEnv, dimension: str) -> None:
    for task in (KITCHEN, 5):
        clean, changes = start(env, task), [0.0]
        for level in LEVELS:
            seen = start(env, task, dimension, level)
            changes.append(float(np.mean([np.abs(seen[c].astype(float) - clean[c]).mean() for c in CAMERAS])))
        assert np.unique(changes).size == len(changes), "each level differs"
        assert changes[1] < changes[3], changes


@pytest.mark.parametrize("dimension", [CAMERA, LIGHT, BACKGROUND])
def test_what_looks_different_plays_the_same(env: LiberoEnv, dimension: str) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 7))
    states = []
    for level in (0, 3):
        start(env, KITCHEN, dimension, level)
        states.append([env.step(action)[0]["state"] for action in actions])
    assert np.array_equal(states[0], states[1])


def test_target_and_goal_stay_in_view(env: LiberoEnv) -> None:
    for level in LEVELS:
        for task in range(10):
            start(env, task, "camera", level)
            for point in env.labels().values():
                u, v, depth = env.camera_projection("agentview") @ np.append(point, 1.0)
                assert depth > 0
                assert (np.abs(np.array([u, v]) / depth - 0.5) < 0.5).all(), (level, task)


def test_where_sides_are_named_the_camera_turns_little(env: LiberoEnv) -> None:
    for task, most in ((LEFT_AND_RIGHT, 15), (KITCHEN, 50)):
        env.perturbations = (Perturbation("camera", 3),)
        _, info = env.reset(options={"task": task, "initial_state": 3})
        assert most / 3 <= abs(info["perturbation"]["azimuth"]) <= most


def test_all_dimensions_are_offered_and_others_refused(env: LiberoEnv) -> None:
    assert sorted(PERTURBATIONS) == sorted(DIMENSIONS)
    for dimension in OF_THE_PLAYER:
        with pytest.raises(ValueError, match=f"a rollout carries out the perturbation '{dimension}'"):
            start(env, KITCHEN, dimension, 1)
    for dimension, level in (("layouts", 1), ("robot", 4), ("", 1)):
        with pytest.raises(ValueError, match=r"one of all, camera, .*layout, robot, wording|level must be 1, 2 or 3"):
            Perturbation(dimension, level)
