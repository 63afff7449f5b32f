"""Configuration that makes no sense ends in one line that names the key, and never in a traceback of Python's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cogvla.configs.build import build
from cogvla.configs.load import load, names
from cogvla.configs.schema import DATACLASSES, MISSING, defaults
from cogvla.envs.evaluation.protocol import load_protocol
from cogvla.policy.inputs.augmentation import AugmentationConfig
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.routing.router import RouterConfig
from cogvla.tests.support.paths import CONFIGS

OTHERS: tuple[Any, ...] = ("x", 2.5, True, None, ["x"], {})
"""Values of every kind: some fit a key, the others must be refused."""
PYTHON = ("not supported between", "to unpack", "' object", "unexpected keyword", "must be real number", "\n")
"""What Python says where a value was not checked."""


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("chunk", 8.5, "embodiment.chunk must be a whole number, got 8.5"),
        ("control_hz", "30Hz", "embodiment.control_hz must be a number, got '30Hz'"),
        ("control_hz", True, "embodiment.control_hz must be a number, got True"),
        ("name", 5, "embodiment.name must be text, got 5"),
        ("action_normalise_mask", True, r"embodiment.action_normalise_mask must be a list \[true or false, ...\]"),
        ("cameras", "front", r"embodiment.cameras must be a list \[a mapping, ...\], got 'front'"),
        ("cameras", [{"name": "front", "height": "x", "width": 2}], r"cameras\[0\].height must be a whole number"),
        ("cameras", [{"name": "front", "h": 2}], r"unknown key h in embodiment.cameras\[0\]; valid keys are name"),
    ],
)
def test_a_value_of_another_kind_is_named(key: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(Embodiment, {**load("embodiment", "so101"), key: value}, "embodiment")


@pytest.mark.parametrize("value", [1.0, [90, 90, "fast", 120, 180]])
def test_a_limit_that_is_no_list_of_numbers_is_refused(value: Any) -> None:
    robot = load("robot", "so101")
    with pytest.raises(
        ValueError, match=r"robot.limits.velocity must be a list \[a number or null, ...\] or null, got"
    ):
        build(RobotConfig, {**robot, "limits": {**robot["limits"], "velocity": value}}, "robot")


@dataclass(frozen=True)
class Box:
    """Says a sentence of its own about a text, and has a bug for sizes above 9."""

    size: int = 1

    def __post_init__(self) -> None:
        if self.size == "all":
            raise ValueError("a box has nothing to unpack: give its size")
        if self.size > 9:
            len(self.size)  # type: ignore[arg-type]


def test_what_a_class_says_is_not_replaced_and_a_bug_is_no_mistake_of_the_user() -> None:
    with pytest.raises(ValueError, match="a box has nothing to unpack: give its size"):
        build(Box, {"size": "all"}, "box")
    with pytest.raises(ValueError, match=r"box\.size must be a whole number, got 'x'"):
        build(Box, {"size": "x"}, "box")
    with pytest.raises(TypeError, match="has no len"):
        build(Box, {"size": 10}, "box")


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (
            RouterConfig,
            {"name": "random", "layers": "12"},
            r"it.layers must be a list \[a whole number, ...\], got '12'",
        ),
        (RequestKeys, {"ignored": "wrist"}, r"it.ignored must be a list \[text, ...\], got 'wrist'"),
        (AugmentationConfig, {"contrast": [1.0]}, r"augmentation.contrast must be a list \[a number, a number\]"),
        (RouterConfig, {"stage": 2}, "router.stage is 2; it must be one of null, encoder_block"),
    ],
)
def test_no_value_is_turned_into_another(kind: type[Any], values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(kind, values, "it")


def test_half_an_episode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"episodes_per_task must be a whole number of at least 1, got 2.5"):
        load_protocol("tabletop", episodes_per_task=2.5)


@pytest.mark.parametrize(
    ("group", "dotted"), [(g, dotted) for g in DATACLASSES for dotted in DATACLASSES[g] if g != "policy"]
)
def test_no_value_ends_in_words_of_python(group: str, dotted: str) -> None:
    module, _, name = dotted.rpartition(".")
    kind = getattr(importlib.import_module(f"cogvla.{module}"), name)
    shipped = load(group, names(group)[0]) if group and (CONFIGS / group).is_dir() else {}
    values = {key: value for key, value in {**defaults(dotted), **shipped}.items() if is_literal(value)}
    for changed in changes(values):
        try:
            build(kind, changed, "it")
        except ValueError as error:
            said = str(error)
            assert not [words for words in PYTHON if words in said], (changed, said)


def is_literal(value: Any) -> bool:
    return value != MISSING and not (isinstance(value, str) and "${" in value)


def changes(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The values with one of them changed, also inside of mappings."""
    for key, value in values.items():
        yield from ({**values, key: other} for other in OTHERS)
        if isinstance(value, dict):
            yield from ({**values, key: inner} for inner in changes(value))
