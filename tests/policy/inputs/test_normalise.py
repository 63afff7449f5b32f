"""Normalisation and its inverse, by known answers and for arbitrary data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.policy.inputs.normalise import Normaliser, Statistics, normalisers
from cogvla.policy.interface import NORMALISATIONS, Camera, Embodiment

KNOWN = Statistics(q01=(0.0,), q99=(10.0,), min=(-10.0,), max=(30.0,), mean=(4.0,), std=(2.0,))
numbers = st.floats(-100, 100, width=32)


@pytest.mark.parametrize(
    ("kind", "physical", "normalised"),
    [
        ("q99", [0.0, 5.0, 10.0, 7.5], [-1.0, 0.0, 1.0, 0.5]),
        ("q99", [-3.0, 11.0], [-1.0, 1.0]),  # clipped
        ("min_max", [-10.0, 10.0, 30.0, 31.0], [-1.0, 0.0, 1.0, 1.0]),
        ("mean_std", [4.0, 6.0, 2.0, 14.0], [0.0, 1.0, -1.0, 5.0]),  # not clipped
        ("identity", [-7.0, 0.25], [-7.0, 0.25]),
    ],
)
def test_known_answers(kind: str, physical: list[float], normalised: list[float]) -> None:
    x = torch.tensor(physical)[:, None]
    torch.testing.assert_close(Normaliser(kind, KNOWN)(x), torch.tensor(normalised)[:, None])


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(numbers, numbers, numbers), min_size=2, max_size=30),
    kind=st.sampled_from(NORMALISATIONS),
    mask=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_the_inverse_gives_back_what_is_in_range(rows: list[Any], kind: str, mask: tuple[bool, ...]) -> None:
    x_ND = torch.tensor(rows, dtype=torch.float32)
    statistics = Statistics.of(x_ND.numpy())
    normaliser = Normaliser(kind, statistics, mask)
    y_ND = normaliser(x_ND)
    back_ND = normaliser.inverse(y_ND)
    if kind == "q99":
        low, high = torch.tensor(statistics.q01), torch.tensor(statistics.q99)
        clipped_ND = torch.maximum(torch.minimum(x_ND, high.float()), low.float())
        x_ND = torch.where(torch.tensor(mask), clipped_ND, x_ND)
    torch.testing.assert_close(back_ND, x_ND, atol=1e-4, rtol=1e-5)
    if kind in ("q99", "min_max"):
        assert (y_ND.abs() <= 1)[:, torch.tensor(mask)].all()


def test_a_constant_dimension_is_zero_and_comes_back_as_its_value() -> None:
    statistics = Statistics.of(np.array([[3.0, 0.0], [3.0, 1.0]]))
    for kind in ("q99", "min_max", "mean_std"):
        normaliser = Normaliser(kind, statistics)
        y = normaliser(torch.tensor([[3.0, 0.0], [99.0, 0.0]]))
        assert (y[:, 0] == 0).all()
        assert normaliser.inverse(y)[:, 0].tolist() == [3.0, 3.0]


def test_a_masked_dimension_passes_unchanged() -> None:
    statistics = Statistics.of(np.array([[0.0, 0.0], [1.0, 5.0]]))
    normaliser = Normaliser("min_max", statistics, [True, False])
    x = torch.tensor([[0.5, 7.0]])
    assert normaliser(x).tolist() == [[0.0, 7.0]]
    assert normaliser.inverse(torch.tensor([[0.0, 7.0]])).tolist() == [[0.5, 7.0]]


def test_outputs_outside_of_the_range_are_not_clipped_on_the_way_back() -> None:
    assert Normaliser("q99", KNOWN).inverse(torch.tensor([1.5])).item() == 12.5


def test_it_works_on_chunks_and_says_which_size_it_wants() -> None:
    normaliser = Normaliser("q99", KNOWN)
    assert normaliser(torch.zeros(2, 8, 1)).shape == (2, 8, 1)
    with pytest.raises(ValueError, match="expected 1 dimensions, got 2"):
        normaliser(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="expected 1 dimensions, got 2"):
        normaliser.inverse(torch.zeros(3, 2))


def test_statistics_of_known_data_and_their_round_trip() -> None:
    statistics = Statistics.of(np.arange(101.0)[:, None])
    assert (statistics.q01, statistics.q99, statistics.min, statistics.max) == ((1.0,), (99.0,), (0.0,), (100.0,))
    assert statistics.mean == (50.0,)
    assert statistics.std == pytest.approx((np.sqrt((101**2 - 1) / 12),))
    written: dict[str, Any] = statistics.to_dict()
    assert Statistics(**written) == statistics


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q99": (float("nan"),)}, "'q99' contains NaN"),
        ({"std": (float("inf"),)}, "'std' contains NaN or infinite"),
        ({"mean": (1.0, 2.0)}, "'mean' has 2 dimensions, q01 has 1"),
    ],
)
def test_bad_statistics(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Statistics(**{**KNOWN.to_dict(), **change})


def test_bad_kinds_and_masks() -> None:
    with pytest.raises(ValueError, match="unknown normalisation 'q98'; one of q99"):
        Normaliser("q98", KNOWN)
    with pytest.raises(ValueError, match="the mask has 2 entries, the statistics 1 dimensions"):
        Normaliser("q99", KNOWN, [True, False])


def test_normalisers_of_an_embodiment() -> None:
    robot = Embodiment("r", (Camera("c", 8, 8),), 1, 2, 4, 10.0, "min_max", "q99", (True, False), gripper_index=1)
    doubled: dict[str, Any] = {name: value * 2 for name, value in KNOWN.to_dict().items()}
    both = Statistics(**doubled)
    state, action = normalisers(robot, {"state": KNOWN, "action": both.to_dict()})
    assert state(torch.tensor([10.0])).item() == 0  # min_max
    assert action(torch.tensor([7.5, 0.3])).tolist() == pytest.approx([0.5, 0.3])
    with pytest.raises(ValueError, match="'action' must have the embodiment's 2 dimensions; found 1"):
        normalisers(robot, {"state": KNOWN, "action": KNOWN})
    with pytest.raises(ValueError, match="'state' must have the embodiment's 1 dimensions; found none"):
        normalisers(robot, {"action": both})
