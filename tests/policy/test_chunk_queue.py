"""Chunks on absolute ticks, the three ways to blend them, and when the next one is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.policy.chunk_queue import KEEP_PASSED, ChunkQueue, soft_mask
from cogvla.policy.chunking import TemporalEnsemble
from cogvla.real_robot.control.prefetch import ENOUGH, WINDOW, LatencyEstimate, Prefetch


def ramp(start: float, length: int) -> np.ndarray:
    return np.arange(start, start + length, dtype=float)[:, None]


def actions(queue: ChunkQueue, first: int, last: int) -> list[float | None]:
    return [None if (a := queue.get(tick)) is None else float(a[0]) for tick in range(first, last)]


def test_actions_belong_to_ticks_and_passed_ones_are_dropped() -> None:
    queue = ChunkQueue(1)
    assert queue.get(0) is None
    assert queue.add(ramp(0, 5), observed=10, tick=12) == 3
    assert actions(queue, 11, 16) == [None, 2, 3, 4, None]
    assert [queue.remaining(tick) for tick in (12, 14, 15, 99)] == [3, 1, 0, 0]


def test_a_wholly_late_chunk_changes_nothing() -> None:
    queue = ChunkQueue(1)
    queue.add(ramp(0, 5), 10, 10)
    assert queue.add(ramp(100, 3), 10, 13) == 0
    assert actions(queue, 10, 16) == [0, 1, 2, 3, 4, None]


def test_replace_drops_the_old_tail() -> None:
    queue = ChunkQueue(1)
    queue.add(ramp(0, 8), 10, 10)
    queue.add(ramp(100, 3), 13, 14)
    assert actions(queue, 14, 18) == [101, 102, None, None]


def test_the_plan_remembers_what_was_executed_for_real_time_chunking() -> None:
    queue = ChunkQueue(1)
    queue.add(ramp(0, 8), 10, 10)
    queue.add(ramp(100, 8), 13, 15)
    np.testing.assert_array_equal(queue.plan(13)[:, 0], [3, 4, 102, 103, 104, 105, 106, 107])
    assert len(queue.plan(9)) == 0


def test_a_gap_is_not_remembered_as_executed() -> None:
    queue = ChunkQueue(1)
    queue.add(ramp(0, 3), 10, 10)
    queue.add(ramp(100, 8), 20, 22)
    assert actions(queue, 11, 24) == [None] * 11 + [102, 103]


def test_the_past_is_forgotten_in_the_end() -> None:
    queue = ChunkQueue(1)
    for tick in range(0, 400, 4):
        queue.add(ramp(tick, 8), tick, tick + 1)
    assert queue.get(396) == 395 + 1
    assert queue.get(397 - KEEP_PASSED) is not None
    assert queue.get(396 - KEEP_PASSED) is None


def test_clear_forgets_everything() -> None:
    for overlap in ("replace", "ensemble", "real_time"):
        queue = ChunkQueue(1, overlap)
        queue.add(ramp(0, 8), 10, 10)
        queue.clear()
        assert actions(queue, 8, 20) == [None] * 12
        queue.add(ramp(100, 2), 11, 11)
        assert actions(queue, 11, 14) == [100, 101, None], overlap


def test_ensemble_by_hand() -> None:
    queue = ChunkQueue(1, "ensemble", ensemble_m=math.log(2))  # weights 1, 1/2, 1/4 from the oldest
    queue.add(np.full((4, 1), 7.0), 0, 0)
    queue.add(np.full((4, 1), 14.0), 1, 1)
    queue.add(np.full((4, 1), 28.0), 2, 3)  # one tick late
    assert actions(queue, 3, 6) == pytest.approx([(7 + 14 / 2 + 28 / 4) / 1.75, (14 + 28 / 2) / 1.5, 28])
    assert queue.get(6) is None


@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 6), calls=st.integers(1, 8), m=st.floats(-1, 1), seed=st.integers(0, 999))
def test_ensemble_is_the_one_of_evaluation(steps: int, calls: int, m: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, queue = TemporalEnsemble(m, steps), ChunkQueue(2, "ensemble", m)
    for call in range(calls):
        chunk_KA = rng.standard_normal((6, 2))
        planned_TA = reference.plan(["robot"], chunk_KA[None])[0]
        assert queue.add(chunk_KA, call * steps, call * steps) == 6
        np.testing.assert_allclose(queue.plan(call * steps)[:steps], planned_TA, rtol=1e-9, atol=1e-12)


def test_soft_mask_by_hand() -> None:
    # K 6, two ticks pass, the old plan ends before index 4: c = 2/3 and 1/3
    expected = [1, 1, *[c * (math.exp(c) - 1) / (math.e - 1) for c in (2 / 3, 1 / 3)], 0, 0]
    np.testing.assert_allclose(soft_mask(6, 2, 4), expected, rtol=1e-12)
    np.testing.assert_allclose(soft_mask(3, 0, 0), 0)
    np.testing.assert_allclose(soft_mask(3, 3, 3), 1)


@pytest.mark.parametrize(
    ("length", "delay", "horizon"), [(n, d, h) for n in (1, 2, 7, 8) for h in range(n + 1) for d in range(h + 1)]
)
def test_soft_mask_falls_from_one_to_zero(length: int, delay: int, horizon: int) -> None:
    mask = soft_mask(length, delay, horizon)
    assert (np.diff(mask) <= 0).all()
    assert (mask[:delay] == 1).all()
    assert (mask[horizon:] == 0).all()
    assert ((mask[delay:horizon] > 0) & (mask[delay:horizon] < 1)).all()


def test_real_time_fades_from_the_old_plan_to_the_new_chunk() -> None:
    queue = ChunkQueue(1, "real_time")
    queue.add(np.zeros((8, 1)), 10, 10)
    assert queue.add(np.ones((8, 1)), 12, 14) == 6  # two ticks passed, the old plan ends at tick 18: H - s = 6
    c = np.array([4, 3, 2, 1]) / 5
    expected = [0, 0, *(1 - c * (np.exp(c) - 1) / (np.e - 1)), 1, 1, None]
    assert actions(queue, 12, 21) == pytest.approx(expected)


def test_real_time_without_an_old_plan_is_the_chunk() -> None:
    queue = ChunkQueue(1, "real_time")
    queue.add(ramp(0, 4), 10, 11)
    assert actions(queue, 11, 14) == [1, 2, 3]


# --- prefetch ---------------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    id: int
    asked_at: float
    deadline: float


def prefetch(latency_s: float = 0.12, margin: int = 1, execute_steps: int | None = None) -> Prefetch:
    return Prefetch(20.0, latency_s, margin, retry_s=0.1, execute_steps=execute_steps)


@pytest.mark.parametrize(
    ("latency_s", "margin", "threshold"),
    [(0.1, 0, 2), (0.1, 1, 3), (0.1001, 1, 4), (0.12, 2, 5), (0.05, 0, 1), (0.001, 0, 1), (0.15, 0, 3)],
)
def test_ask_when_the_latency_and_the_margin_remain(latency_s: float, margin: int, threshold: int) -> None:
    ahead = prefetch(latency_s, margin)
    assert ahead.threshold == threshold
    assert ahead.due(threshold, 0, 5.0)
    assert not ahead.due(threshold + 1, 99, 5.0)


def test_ask_after_the_steps_to_execute() -> None:
    ahead = prefetch(execute_steps=4)
    assert [ahead.due(8, since, 5.0) for since in (3, 4, 5)] == [False, True, True]


def test_one_request_in_flight() -> None:
    ahead = prefetch()
    first = ahead.in_flight = Asked(1, 5.0, 6.0)
    assert not ahead.due(0, 99, 5.1)
    assert ahead.answered(Asked(2, 5.0, 6.0), 5.1) is None, "another request's answer"
    assert ahead.answered(first, 5.25) == 0.25
    assert ahead.due(0, 99, 5.25)
    assert ahead.answered(first, 5.3) is None, "a duplicate"


def test_a_deadline_ends_the_wait_and_raises_the_estimate() -> None:
    ahead = prefetch()
    for index in range(ENOUGH):
        ahead.in_flight = Asked(index, 10.0 * index, 10.0 * index + 1)
        assert not ahead.expire(10.0 * index + 1)
        assert ahead.expire(10.0 * index + 1.001)
        assert not ahead.expire(10.0 * index + 1.002)
        assert not ahead.due(0, 99, 10.0 * index + 1.1), "a pause before the next try"
        assert ahead.due(0, 99, 10.0 * index + 1.102)
    assert ahead.latency.p95 == pytest.approx(1.001)


def test_a_failure_says_nothing_about_the_latency() -> None:
    ahead = prefetch()
    first = ahead.in_flight = Asked(1, 5.0, 6.0)
    assert ahead.failed(first, 5.01)
    assert not ahead.failed(first, 5.01)
    assert ahead.latency.p95 == 0.12
    assert not ahead.due(0, 99, 5.1)
    assert ahead.due(0, 99, 5.111)


def test_the_estimate_is_assumed_then_measured_then_follows() -> None:
    estimate = LatencyEstimate(0.5)
    for _ in range(ENOUGH - 1):
        estimate.add(0.1)
    assert estimate.p95 == 0.5
    estimate.add(0.1)
    assert estimate.p95 == 0.1
    for index in range(WINDOW):
        estimate.add(1.0 + index)
    assert estimate.p95 == 1.0 + 60, "of 1 to 64 seconds, the smallest that is at least 95 percent"
