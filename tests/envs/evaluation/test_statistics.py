"""Wilson intervals against published values, and percentiles against a sorted list."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvla.envs.evaluation.statistics import latency, success_rate, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_known_answers(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_brackets_the_estimate_and_is_symmetric(case: tuple[int, int]) -> None:
    successes, trials = case
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low))


def test_wilson_solves_its_equation() -> None:
    """Both ends are where the score test just rejects: |p - x/n| = z sqrt(p (1 - p) / n)."""
    for bound in wilson_interval(37, 50):
        assert abs(bound - 37 / 50) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 50), rel=1e-6)


def test_more_confidence_and_fewer_trials_are_wider() -> None:
    def width(*arguments: float) -> float:
        low, high = wilson_interval(*arguments)  # type: ignore[arg-type]
        return high - low

    assert width(5, 10, 0.99) > width(5, 10) > width(50, 100)


@pytest.mark.parametrize("arguments", [(0, 0), (3, 2), (-1, 2), (1, 2, 1.0)])
def test_impossible_counts_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"need|confidence"):
        wilson_interval(*arguments)  # type: ignore[arg-type]


def test_success_rate() -> None:
    rate = success_rate([True, True, False, True])
    assert (rate.successes, rate.trials, rate.value) == (3, 4, 0.75)
    assert (rate.low, rate.high) == wilson_interval(3, 4)
    assert success_rate([]).value is None


def test_latency_percentiles_and_rate() -> None:
    found = latency(range(101))
    assert found is not None
    assert (found.p50, found.p95, found.p99, found.mean, found.count) == (50, 95, 99, 50, 101)
    assert found.rate_hz == 20
    assert latency([]) is None
    with pytest.raises(ValueError, match="finite"):
        latency([1.0, float("nan")])
