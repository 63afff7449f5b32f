"""Which protocol a suite is evaluated by, with which limits, and what the command understands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig

from cogvla.envs.evaluation.protocol import EvaluationProtocol, load_protocol
from cogvla.envs.suite import Suite, Task
from cogvla.libero.suites import PROTOCOL
from cogvla.libero.tasks import LIBERO_SUITES, MAX_STEPS, instruction
from cogvla.scripts.command import MISTAKES, compose
from cogvla.scripts.eval_libero import protocol_of, run, suites
from cogvla.tests.support.point_suite import toy_suite


def libero(name: str) -> Suite:
    """Stands for a suite of LIBERO where that is not installed."""
    return Suite(name, tuple(Task(str(i), str(i)) for i in range(10)), MAX_STEPS[name], toy_suite().make, 50, PROTOCOL)


def config(*overrides: str) -> DictConfig:
    return compose("eval_libero", ["checkpoint=random", *overrides])


@pytest.mark.parametrize(
    ("protocol", "limits"),
    [
        ("openvla_oft", (220, 280, 300, 520, 400)),
        ("cogvla", (220, 280, 320, 520, 400)),
        ("lerobot", (280, 280, 300, 520, 400)),
    ],
)
def test_published_limits(protocol: str, limits: tuple[int, ...]) -> None:
    named = load_protocol(protocol)
    assert tuple(named.for_suite(libero(name)).max_steps for name in LIBERO_SUITES) == limits
    assert (named.waiting_steps, named.episodes_per_task, named.first_initial_state) == (10, 50, 0)
    assert named.execute_steps in (8, None)
    assert len(named.episodes(libero("libero_goal"))) == 500
    assert named.for_suite(toy_suite()).max_steps == toy_suite().max_steps, "the suite's own where none is named"


def test_the_suites_own_protocol_is_taken_unless_one_is_named() -> None:
    goal, tabletop = libero("libero_goal"), toy_suite()
    assert protocol_of(goal, config()) == load_protocol("openvla_oft")
    assert protocol_of(tabletop, config()) == load_protocol("tabletop")
    assert protocol_of(goal, config("protocol=cogvla")) == load_protocol("cogvla")
    assert protocol_of(tabletop, config("protocol=cogvla")).name == "cogvla"


@pytest.mark.parametrize("named", [(), ("protocol=openvla_oft",)])
def test_values_of_any_protocol_can_be_changed(named: tuple[str, ...]) -> None:
    changes = ("protocol.execute_steps=null", "protocol.max_steps=24", "episodes_per_task=3", "seed=5")
    protocol = protocol_of(libero("libero_goal"), config(*named, *changes))
    assert protocol == load_protocol("openvla_oft", execute_steps=None, max_steps=24, episodes_per_task=3, seed=5)


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_steps must be positive"):
        EvaluationProtocol("wrong", max_steps={"libero_goal": 0})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"episodes_per_task": True}, "episodes_per_task must be a whole number of at least 1, got True"),
        ({"episodes_per_task": 2.5}, "episodes_per_task must be a whole number"),
        ({"first_initial_state": True}, "first_initial_state must be a whole number of at least 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"temporal_ensemble": True}, "temporal_ensemble must be a number or null"),
        ({"committed": 0}, "committed true or false"),
        ({"max_steps": {"libero_gaol": 300}}, "unknown suite 'libero_gaol'.*did you mean libero_goal"),
    ],
)
def test_values_of_another_kind_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_protocol("openvla_oft", **changes)


def test_all_libero_are_the_four_suites_of_the_published_tables() -> None:
    assert suites("all_libero") == ["libero_10", "libero_goal", "libero_object", "libero_spatial"]
    assert suites(["libero_90"]) == ["libero_90"]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/", "-1/2"])
def test_shards_are_checked(shard: str, tmp_path: Any) -> None:
    with pytest.raises(MISTAKES, match="shard must be i/n"):
        run(config("suite=tabletop_object", f"shard={shard}", f"output={tmp_path}"), "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pick_up_the_milk_and_place_it_in_the_basket", "pick up the milk and place it in the basket"),
        ("KITCHEN_SCENE10_put_the_black_bowl_on_the_plate", "put the black bowl on the plate"),
        ("LIVING_ROOM_SCENE2_pick_up_the_book", "pick up the book"),
    ],
)
def test_instructions_are_the_names_in_words(name: str, words: str) -> None:
    assert instruction(name) == words


def test_axis_angle_keeps_the_sign_of_the_quaternion() -> None:
    from cogvla.libero.env import axis_angle

    quarter = np.array([0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5)])
    np.testing.assert_allclose(axis_angle(quarter), [0, 0, np.pi / 2], atol=1e-12)
    np.testing.assert_allclose(axis_angle(-quarter), [0, 0, -3 * np.pi / 2], atol=1e-12)
    np.testing.assert_allclose(axis_angle(np.array([0.0, 0.0, 0.0, 1.0])), 0)
    np.testing.assert_allclose(axis_angle(np.array([1.0, 0.0, 0.0, 0.0])), [np.pi, 0, 0], atol=1e-12)
