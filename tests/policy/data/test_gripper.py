"""Gripper values of data sets: mapped to the embodiment's, for any number of grippers, or refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cogvla.configs.build import build
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.gripper import GripperConvention, convert_grippers
from cogvla.policy.interface import Camera, Embodiment

CAMERAS = (Camera("front", 8, 8),)


def robot(grippers: int | tuple[int, ...] | None = 1) -> Embodiment:
    return Embodiment("r", CAMERAS, 3, 4, 8, 10.0, gripper_index=grippers, gripper_open=-1.0, gripper_close=1.0)


def actions(*grippers: Sequence[float]) -> torch.Tensor:
    """Actions [N,4] with these values in dimensions 1 and 3."""
    action_NA = torch.full((len(grippers[0]), 4), 0.25)
    for index, values in zip((1, 3), grippers, strict=False):
        action_NA[:, index] = torch.tensor(values)
    return action_NA


@pytest.mark.parametrize(
    ("values", "convention", "expected"),
    [
        ([-1, 1, 1, 0.5], None, [-1, 1, 1, 0.5]),
        ([1, 0, 0.5], (1, 0), [-1, 1, 0]),
        ([0, 0.08, 0.04], (0.08, 0), [1, -1, 0]),
        ([0, 100, 103, -2], (100, 0), [1, -1, -1.06, 1.04]),
        ([0, 0, 0], (1, 0), [1, 1, 1]),  # it stays closed
        ([0.3, 0.6], (1, 0, True), [0.4, -0.2]),
    ],
)
def test_values_are_mapped(values: list[float], convention: tuple[float, ...] | None, expected: list[float]) -> None:
    conventions = None if convention is None else [GripperConvention(1, *convention)]  # type: ignore[arg-type]
    before_NA = actions(values)
    after_NA = convert_grippers(before_NA, conventions, robot())
    assert after_NA[:, 1].tolist() == pytest.approx(expected)
    assert (after_NA[:, [0, 2, 3]] == 0.25).all()
    assert torch.equal(before_NA, actions(values))


@pytest.mark.parametrize(
    ("values", "convention", "found", "fits"),
    [
        ([0, 0.08, 0.05], (1, 0), "0 to 0.08", "{index: 1, open: 0.08, close: 0} if 0.08 opens"),
        ([0, 1, 1, 0], None, "0 to 1", "{index: 1, open: 1, close: 0} if 1 opens"),
        ([0, 0.8, 0.4], (0, 1), "0 to 0.8", "{index: 1, open: 0, close: 0.8} if 0 opens"),
        ([0, 255, 10], (1, 0), "0 to 255", "{index: 1, open: 255, close: 0} if 255 opens"),
        ([-1, 1, 0], (1, 0), "-1 to 1", "{index: 1, open: 1, close: -1} if 1 opens"),
        ([0.0] * 5000 + [1.0, 0.08], (1, 0), "0 to 1", "part: true"),
        ([0, 0, 0], None, "0 to 0", "give its open and close values"),
        ([0.3, 0.6], (1, 0), "0.3 to 0.6", "{index: 1, open: 1, close: 0, part: true}"),
    ],
)
def test_values_of_another_convention_are_refused(
    values: list[float], convention: tuple[float, float] | None, found: str, fits: str
) -> None:
    conventions = None if convention is None else [GripperConvention(1, *convention)]
    with pytest.raises(ValueError, match="action 1 of the data, a gripper, has values from") as error:
        convert_grippers(actions(values), conventions, robot())
    assert found in str(error.value)
    assert fits in str(error.value)
    assert "\n" not in str(error.value)


def test_two_grippers_of_two_conventions() -> None:
    stored_NA = actions([0, 1, 0.5], [0.08, 0, 0.04])
    both = [GripperConvention(3, 0.08, 0), GripperConvention(1, 0, 1)]
    assert convert_grippers(stored_NA, both, robot((1, 3)))[:, [1, 3]].tolist() == [[-1, -1], [1, 1], [0, 0]]
    with pytest.raises(ValueError, match=r"action 1 .*embodiment 'r' says -1 open"):
        convert_grippers(stored_NA, both[:1], robot((1, 3)))
    with pytest.raises(ValueError, match=r"action 1 .*; action 3 "):
        convert_grippers(stored_NA, None, robot((1, 3)))


def test_without_grippers_nothing_is_checked() -> None:
    stored_NA = actions([0, 7], [8, 0])
    assert torch.equal(convert_grippers(stored_NA, None, robot(None)), stored_NA)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [{"index": 0, "open": 1, "close": 0}],
            r"index 0 is no gripper of embodiment 'r': its gripper_index is \[1, 3\]",
        ),
        ([{"index": 3, "open": 1, "close": 0}] * 2, "two entries of one index"),
    ],
)
def test_conventions_of_other_dimensions(given: list[dict[str, float]], said: str) -> None:
    config = build(DataConfig, {"cameras": {}, "root": "r", "gripper": given}, "data")
    with pytest.raises(ValueError, match=said):
        convert_grippers(actions([1, 0], [1, 0]), config.gripper, robot((1, 3)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"index": 1, "open": 1, "close": 1}, "must differ"),
        ({"index": 1, "open": float("nan"), "close": 1}, "must be finite"),
        ({"index": 1, "opened": 1, "close": 0}, "unknown key opened in data.gripper"),
        ([{"index": 1}], r"data\.gripper\[0\]: open, close missing; valid keys are index, open"),
        ("open", "data.gripper must be a mapping"),
    ],
)
def test_bad_conventions(given: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(DataConfig, {"cameras": {}, "root": "r", "gripper": given}, "data")


def test_one_convention_or_a_list() -> None:
    one = {"index": 1, "open": 1, "close": 0}
    configs = [
        build(DataConfig, {"cameras": {}, "root": "r", "gripper": given}, "data") for given in (one, [one], None)
    ]
    assert [config.gripper for config in configs] == [(GripperConvention(1, 1, 0),)] * 2 + [()]


@pytest.mark.parametrize(
    ("index", "kept"), [(1, 1), ([1], 1), ([3, 1], (1, 3)), ((1, 3), (1, 3)), ([], None), (None, None)]
)
def test_grippers_of_an_embodiment(index: object, kept: object) -> None:
    embodiment = robot(index)  # type: ignore[arg-type]
    assert embodiment.gripper_index == kept
    assert embodiment.grippers == (() if kept is None else (kept,) if isinstance(kept, int) else kept)


@pytest.mark.parametrize("index", [4, -1, (1, 4), (1, 1), "1", True, 1.0])
def test_bad_grippers_of_an_embodiment(index: object) -> None:
    with pytest.raises(ValueError, match="gripper_index"):
        robot(index)  # type: ignore[arg-type]
