"""The perturbed tabletop: the same scene each time, nothing left over, and still solvable."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, OF_THE_PLAYER, Perturbation
from cogvla.envs.suite import get_suite

SUITES = ("tabletop_object", "tabletop_spatial", "tabletop_goal", "tabletop_long")
CELLS = [Perturbation(name, level) for name in DIMENSIONS if name not in OF_THE_PLAYER for level in LEVELS]


@cache
def environment(suite: str) -> Any:
    return get_suite(suite).make(image_size=48)


@pytest.fixture(scope="module", autouse=True)
def _close() -> Iterator[None]:
    yield
    for suite in SUITES:
        environment(suite).close()
    environment.cache_clear()


def first(suite: str, cell: Perturbation | None, task: int = 0, state: int = 0) -> dict[str, np.ndarray]:
    env = environment(suite)
    env.perturbation = cell
    observation, _ = env.reset(options={"task": task, "initial_state": state})
    return dict(observation)


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([None, *CELLS]), min_size=1, max_size=5), st.sampled_from(SUITES))
def test_nothing_leaks_into_the_next_episode(cells: list[Perturbation | None], suite: str) -> None:
    clean, perturbed = first(suite, None), first(suite, CELLS[0])
    for number, cell in enumerate(cells):
        first(suite, cell, number % 3, number)
        for _ in range(2):
            environment(suite).step(np.zeros(7))
    assert equal(first(suite, None), clean)
    assert equal(first(suite, CELLS[0]), perturbed)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_another_environment_shows_the_same(cell: Perturbation) -> None:
    env: Any = get_suite("tabletop_goal").make(image_size=48)
    env.perturbation = cell
    observation, _ = env.reset(options={"task": 3, "initial_state": 7})
    env.close()
    assert equal(first("tabletop_goal", cell, 3, 7), observation)
    assert not equal(first("tabletop_goal", None, 3, 7), observation)
    assert not equal(first("tabletop_goal", cell, 3, 8), observation)


@pytest.mark.parametrize("name", ["camera", "light", "background", "robot"])
def test_levels_go_further(name: str) -> None:
    part = "state" if name == "robot" else "agentview"

    def change(level: int) -> float:
        total = 0.0
        for state in range(8):
            clean = first("tabletop_object", None, 0, state)[part].astype(float)
            total += float(np.abs(clean - first("tabletop_object", Perturbation(name, level), 0, state)[part]).mean())
        return total

    found = [change(level) for level in LEVELS]
    assert 0 < found[0] < found[1] < found[2]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("level", LEVELS)
def test_target_and_goal_stay_in_view_and_cubes_keep_their_sides(suite: str, level: int) -> None:
    env = environment(suite)
    for state in range(12):
        for task in (0, 7):
            sides = []
            for cell in (None, Perturbation("camera", level)):
                first(suite, cell, task, state)
                points = [*env.labels().values()]
                if suite == "tabletop_spatial":
                    points += [env.scene.position(f"cube_{i}") for i in range(4)]
                uvd = np.column_stack([points, np.ones(len(points))]) @ env.camera_projection("agentview").T
                right = uvd[:, 0] / uvd[:, 2]
                down = uvd[:, 1] / uvd[:, 2]
                assert ((right > 0) & (right < 1) & (down > 0) & (down < 1)).all()
                sides.append((right[2:].argmin(), right[2:].argmax()) if len(points) > 2 else None)
            assert sides[0] == sides[1]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", ["layout", "robot"])
def test_the_expert_solves_the_hardest_level(suite: str, name: str) -> None:
    played = get_suite(suite)
    env: Any = played.make(image_size=16, render=False)
    assert played.expert is not None
    for task in range(0, len(played.tasks), 3):
        env.perturbation = Perturbation(name, 3)
        _, info = env.reset(options={"task": task, "initial_state": task})
        expert = played.expert(env, np.random.default_rng(0), noise=0.0)
        truncated = False
        while not (info["success"] or truncated):
            _, _, _, truncated, info = env.step(expert.act())
        assert info["success"]


@pytest.mark.parametrize("suite", SUITES)
def test_items_that_stand_by_are_apart(suite: str) -> None:
    env = environment(suite)
    for level in LEVELS:
        first(suite, Perturbation("layout", level), 1, 5)
        own = {item.name for item in env.family.items}
        by, others = env.scene.placed - own, env.scene.placed & own
        assert 1 <= len(by) <= level
        place = env.scene.position
        assert min(float(np.linalg.norm((place(a) - place(b))[:2])) for a in by for b in others) > 0.05


def test_mistakes_are_explained() -> None:
    with pytest.raises(ValueError, match="unknown perturbation 'fog'; one of all, camera, light"):
        Perturbation("fog", 1)
    for level in (0, 4, True, "2"):
        with pytest.raises(ValueError, match="level must be 1, 2 or 3"):
            Perturbation("light", level)  # type: ignore[arg-type]
