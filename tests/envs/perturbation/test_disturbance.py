"""Something happens in the middle of an episode, once, and from the drawn step on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cogvla.envs.contract import CAMERAS, ImageSkipping, Perturbable, required, resting_action
from cogvla.envs.perturbation.disturbance import DISTURBANCES, check_disturbances, disturbed
from cogvla.envs.perturbation.perturbation import Perturbation
from cogvla.envs.suite import get_suite
from cogvla.tests.support.point_suite import toy_suite


def played(kind: str | None, task: int, steps: int) -> tuple[list[dict[str, np.ndarray]], dict[str, Any], np.ndarray]:
    suite = get_suite("tabletop_object")
    env: Any = (suite if kind is None else disturbed(suite, kind)).make(image_size=32)
    observation, info = env.reset(seed=0, options={"task": task, "initial_state": 3})
    seen = [observation]
    for number in range(steps):
        action = resting_action()
        action[number % 2] = 0.5
        seen.append(env.step(action)[0])
    scene = env.unwrapped.scene
    places = np.array([scene.position(name) for name in sorted(scene.placed) if scene.items[name].free])
    env.close()
    return seen, info.get("perturbation", {}), places


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_a_disturbance_begins_at_its_step(kind: str) -> None:
    seen, drawn, places = played(kind, 1, 24)
    clean, _, rested = played(None, 1, 24)
    assert drawn["disturbance"] == kind
    onset, camera = drawn["step"], drawn["camera"]
    other = next(name for name in CAMERAS if name != camera)
    for step in range(onset + 1):
        assert all((seen[step][name] == clean[step][name]).all() for name in CAMERAS)
    if kind == "pushed":
        assert np.linalg.norm(places - rested, axis=1).max() > 0.03
        return
    assert (places == rested).all()
    for step in range(onset + 1, len(seen)):
        assert (seen[step][other] == clean[step][other]).all()
        assert (seen[step][camera] != clean[step][camera]).any()
        if kind == "frozen":
            assert (seen[step][camera] == seen[onset][camera]).all()
        if kind == "covered":
            assert seen[step][camera].max() < 30


def test_an_unknown_disturbance_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown disturbance 'rain'; one of frozen, covered, moved, pushed"):
        disturbed(get_suite("tabletop_object"), "rain")


def test_a_disturbed_environment_obeys_as_the_one_inside() -> None:
    env: Any = disturbed(get_suite("tabletop_object"), "pushed").make(image_size=32, render=False)
    required(env, Perturbable, "this test").perturbations = (Perturbation("light", 2),)
    required(env, ImageSkipping, "this test").skip_images = True
    assert env.unwrapped.perturbations == (Perturbation("light", 2),)
    assert env.unwrapped.skip_images
    env.close()


def test_what_cannot_happen_is_said_before_anything_is_played() -> None:
    check_disturbances(get_suite("tabletop_object"), DISTURBANCES)
    check_disturbances(toy_suite(), ["frozen", "covered"])
    with pytest.raises(ValueError, match=r"pushed cannot happen in suite 'point'.*disturbances=\[frozen,covered\]"):
        check_disturbances(toy_suite(), ["frozen", "pushed"])
