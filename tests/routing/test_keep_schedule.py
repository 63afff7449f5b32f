from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvla.routing.keep_schedule import keep_count, keep_ratios

PAPER = "shiftedcos_decay_0.85_0.15"


def test_the_papers_schedule() -> None:
    ratios = keep_ratios(PAPER, depth=32, period=31)
    assert all(ratio is None for ratio in ratios[:8])
    known = {8: 0.84, 12: 0.67, 16: 0.48, 20: 0.28}
    for layer, expected in known.items():
        assert ratios[layer] == pytest.approx(expected, abs=0.01), layer
    assert all(ratio == 0.15 for ratio in ratios[25:])
    assert sum(1.0 if ratio is None else ratio for ratio in ratios) / 32 == pytest.approx(0.5375, abs=1e-3)
    assert ratios == keep_ratios(PAPER, depth=32)


def test_period_follows_the_depth_or_stays_faithful() -> None:
    assert keep_ratios(PAPER, depth=3) == (None, pytest.approx(0.5), 0.15)
    assert keep_ratios(PAPER, depth=3, period=31) == (None, None, None)
    assert keep_ratios(PAPER, depth=1) == (None,)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("none", (None,) * 5),
        ("interleave", (None, 0.4, None, 0.4, None)),
        ("deep_all", (None, None, 0.4, 0.4, 0.4)),
        ("deep_all_wo_last", (None, None, 0.4, 0.4, None)),
    ],
)
def test_other_schedules(schedule: str, expected: tuple[float | None, ...]) -> None:
    assert keep_ratios(schedule, depth=5, mean=0.4) == expected


def test_linear_decay() -> None:
    assert keep_ratios("shiftedlinear_decay", depth=5) == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
    assert keep_ratios("shiftedlinear_decay_0.8_0.3", depth=5) == (None, 0.75, 0.5, 0.3, 0.3)


def test_a_ratio_above_the_upper_limit_is_not_routed_even_where_it_is_above_one() -> None:
    assert keep_ratios("shiftedlinear_decay_1.0_0.2", depth=5, mean=0.6) == (None, pytest.approx(0.85), 0.6, 0.35, 0.2)


@given(st.integers(1, 40), st.floats(0.1, 1), st.sampled_from([PAPER, "shiftedlinear_decay_0.9_0.1"]))
def test_decays_fall_and_stay_in_range(depth: int, mean: float, schedule: str) -> None:
    ratios = [1.0 if ratio is None else ratio for ratio in keep_ratios(schedule, depth, mean)]
    assert ratios == sorted(ratios, reverse=True)
    assert all(0.1 <= ratio <= 1 for ratio in ratios)


@given(st.integers(1, 1000), st.floats(0, 1))
def test_keep_count_rounds_down_to_one_at_least(tokens: int, ratio: float) -> None:
    count = keep_count(tokens, ratio)
    assert (ratio > 0) <= count <= tokens
    assert count <= max(ratio > 0, tokens * ratio) < count + 1


def test_few_tokens_are_not_rounded_to_none() -> None:
    assert [keep_count(tokens, 0.15) for tokens in (0, 1, 4, 6, 7, 13, 14)] == [0, 1, 1, 1, 1, 1, 2]
    assert keep_count(4, 0.0) == 0, "the end of shiftedlinear_decay"


@pytest.mark.parametrize("schedule", ["shiftedcos_decay", "linear", "shiftedcos_decay_0.1_0.9", ""])
def test_unknown_schedules_are_refused(schedule: str) -> None:
    with pytest.raises(ValueError, match="schedule"):
        keep_ratios(schedule, depth=4)
