"""A name that no suite has leads to the one that was meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cogvla.envs.suite import FIRST_TRAINING_STATE, chosen_start, get_suite, suite_names, unknown_suite


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("libero_long", "libero_10"),
        ("LIBERO-Long", "libero_10"),
        ("libero-10", "libero_10"),
        ("libero10", "libero_10"),
        ("LIBERO_GOAL", "libero_goal"),
        ("libero_spatial_no_noops", "libero_spatial"),
        ("libero_10_no_noops", "libero_10"),
        ("libero_spatail", "libero_spatial"),
        ("tabletop_objects", "tabletop_object"),
        ("goal", "libero_goal or tabletop_goal"),
    ],
)
def test_the_suite_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown suite '{name}'; one of .*; did you mean {meant}"):
        get_suite(name)


@pytest.mark.parametrize("name", ["libero", "libero_4_task_suites_no_noops", "libero_all"])
def test_all_suites_that_were_meant(name: str) -> None:
    assert str(unknown_suite(name, ["all_libero"])).endswith("did you mean all_libero?")


@pytest.mark.parametrize("states", [0, FIRST_TRAINING_STATE + 1])
def test_no_initial_state_is_evaluated_and_recorded(states: int) -> None:
    suite = replace(get_suite("tabletop_object"), initial_states=FIRST_TRAINING_STATE)
    with pytest.raises(ValueError, match=f"initial_states must be 1 to 1000, got {states}: recordings show those"):
        replace(suite, initial_states=states)


@pytest.mark.parametrize("name", ["moon", "", "10"])
def test_other_names(name: str) -> None:
    said = str(unknown_suite(name))
    assert said.startswith(f"unknown suite '{name}'; one of {', '.join(suite_names())}")
    assert ("did you mean" in said) == (name == "10")


@pytest.mark.parametrize(("name", "value"), [("task", 1.9), ("task", "3"), ("task", True), ("initial_state", 0.7)])
def test_half_a_task_is_not_rounded(name: str, value: Any) -> None:
    rng = np.random.default_rng(0)
    assert chosen_start({"task": np.int64(1), "initial_state": 2, "asked": None}, 10, rng) == (1, 2)
    with pytest.raises(ValueError, match=rf"reset options are whole numbers, got {name}={value!r}"):
        chosen_start({"task": 1, "initial_state": 2, name: value}, 10, rng)
    with pytest.raises(ValueError, match=r"got asked=2\.7"):
        chosen_start({"task": 1, "initial_state": 2, "asked": 2.7}, 10, rng)
