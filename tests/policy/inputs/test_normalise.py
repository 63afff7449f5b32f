"""Normalisation and its inverse, by known answers and for arbitrary data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.policy.inputs.normalise import Normaliser, Statistics, normalisers, rarely_used
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


def rare(share: float, low: float = 0.0, high: float = 0.7, frames: int = 4000, noise: float = 0.0) -> np.ndarray:
    """A dimension [N,1] that rests at 0, but for a share of the frames in which it moves from `low` to `high`."""
    rng = np.random.default_rng(0)
    x_N = rng.normal(0, 1, frames) * noise
    moving = rng.choice(frames, max(2, round(share * frames)), replace=False)
    x_N[moving] = np.linspace(low, high, len(moving))
    return x_N[:, None].astype(np.float32)


@pytest.mark.parametrize(
    ("x_N1", "shift"),
    [
        (rare(0.009), 0.0),
        (rare(0.009, low=-0.4), 0.0),
        (rare(0.0005), 0.0),
        (rare(0.009, high=0.0, low=-0.7), 0.0),
        (rare(0.009, noise=1e-4), 0.0),
        (rare(0.009, high=2e-5, low=-1e-5), 0.0),
        (rare(0.009), 90.0),
        (rare(0.009, high=500.0), 1e6),
        (np.append(np.linspace(-0.8, 0, 30).repeat(100), [0.0] * 3000 + [0.7] * 20)[:, None].astype(np.float32), 0.0),
    ],
)
@pytest.mark.parametrize("kind", ["q99", "min_max", "mean_std"])
def test_a_dimension_that_hardly_ever_moves_can_reach_its_extremes(kind: str, x_N1: np.ndarray, shift: float) -> None:
    x_N1 = x_N1 + np.float32(shift)
    normaliser = Normaliser(kind, Statistics.of(x_N1))
    ends_21 = torch.from_numpy(np.stack([x_N1.min(0), x_N1.max(0)]))
    size = float(ends_21[1] - ends_21[0])
    torch.testing.assert_close(normaliser.inverse(normaliser(ends_21)), ends_21, atol=1e-3 * size, rtol=0)


@pytest.mark.parametrize(
    "x_N1",
    [
        rare(0.1, low=-0.7),
        np.random.default_rng(0).normal(0, 1, (4000, 1)),
        np.append(np.random.default_rng(0).normal(0, 1, 4000), 50.0)[:, None],  # a glitch
        np.append(np.linspace(0, 0.04, 500), [0.04] * 3000 + [0.046] * 10)[:, None],  # fingers at their stop
        np.full((4000, 1), 3.0),
    ],
)
def test_other_dimensions_have_the_quantiles_of_their_data(x_N1: np.ndarray) -> None:
    statistics = Statistics.of(x_N1)
    assert [statistics.q01[0], statistics.q99[0]] == np.quantile(x_N1, [0.01, 0.99]).tolist()
    assert not rarely_used(x_N1).any()


@pytest.mark.parametrize("at", [0.0, 0.1, 90.0, -1e6])
@pytest.mark.parametrize("kind", ["q99", "min_max", "mean_std"])
def test_rounding_errors_are_not_motion(kind: str, at: float) -> None:
    x_N1 = np.full((1000, 1), at, np.float32)
    x_N1[::2] = np.nextafter(x_N1[::2], np.float32(np.inf))
    normaliser = Normaliser(kind, Statistics.of(x_N1))
    assert (normaliser(torch.from_numpy(x_N1)) == 0).all()
    assert normaliser.inverse(torch.tensor([1.0])).item() == pytest.approx(at, rel=1e-6, abs=1e-6)


def test_statistics_that_are_given_are_used_as_they_are() -> None:
    given = Statistics(q01=(0.0,), q99=(0.0,), min=(-1.0,), max=(0.7,), mean=(0.0,), std=(0.01,))
    assert Normaliser("q99", given).inverse(torch.tensor([1.0])).item() == 0


def test_a_masked_dimension_passes_unchanged() -> None:
    statistics = Statistics.of(np.array([[0.0, 0.0], [1.0, 5.0]]))
    normaliser = Normaliser("min_max", statistics, [True, False])
    x = torch.tensor([[0.5, 7.0]])
    assert normaliser(x).tolist() == [[0.0, 7.0]]
    assert normaliser.inverse(torch.tensor([[0.0, 7.0]])).tolist() == [[0.5, 7.0]]


def test_outputs_outside_of_the_range_are_not_clipped_on_the_way_back() -> None:
    assert Normaliser("q99", KNOWN).inverse(torch.tensor([1.5])).item() == 12.5


@given(kinds=st.tuples(st.sampled_from(NORMALISATIONS), st.sampled_from(NORMALISATIONS)), x=st.floats(1, 9, width=32))
def test_a_change_to_other_statistics_is_that_of_the_values(kinds: tuple[str, str], x: float) -> None:
    two = replace(KNOWN, q01=(-3.0,), q99=(12.0,), min=(-20.0,), mean=(5.0,))
    first, second = Normaliser(kinds[0], KNOWN), Normaliser(kinds[1], two)
    factor, offset = first.change_to(second)
    value = torch.tensor([x])
    torch.testing.assert_close(factor * first(value) + offset, second(value), atol=1e-4, rtol=1e-5)


def test_a_change_to_other_statistics_leaves_constant_dimensions() -> None:
    still = Normaliser("q99", Statistics.of(np.full((3, 1), 2.0)))
    for first, second in ((still, Normaliser("q99", KNOWN)), (Normaliser("q99", KNOWN), still)):
        assert first.change_to(second) == (torch.ones(1), torch.zeros(1))


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
        ({"q01": (11.0,)}, "q01 is above q99 in dimension 0"),
        ({"min": (31.0,)}, "min is above max in dimension 0"),
        ({"std": (-0.1,)}, "std is negative in dimension 0"),
        ({"std": (50.0,)}, "std is larger than max - min in dimension 0"),
        ({"q01": (-11.0,)}, "min is above q01"),
        ({"q99": (30.1,)}, "q99 is above max"),
        ({"mean": (-20.0,)}, "min is above mean"),
        ({"mean": (31.0,)}, "mean is above max"),
    ],
)
def test_bad_statistics(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Statistics(**{**KNOWN.to_dict(), **change})


def test_statistics_may_be_rounded() -> None:
    x_ND = np.array([[1.1], [1.1], [1.1]], np.float32)
    exact = Statistics.of(x_ND)
    assert replace(exact, mean=(1.10001,), q99=(1.1000001,)).mean == (1.10001,)


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
