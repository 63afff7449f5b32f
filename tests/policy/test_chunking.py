"""Chunk execution: open loop is a slice, the ensemble equals its definition written as a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.policy.chunking import Late, OpenLoop, TemporalEnsemble


def naive_ensemble(chunks: list[np.ndarray], m: float, steps: int) -> np.ndarray:
    """The actions after the last of `chunks` (oldest first, one every `steps` ticks), straight from the definition."""
    now = (len(chunks) - 1) * steps
    actions = []
    for tick in range(now, now + steps):
        covering = [c[tick - i * steps] for i, c in enumerate(chunks) if 0 <= tick - i * steps < len(c)]
        weights = [np.exp(-m * i) for i in range(len(covering))]
        actions.append(sum(w * a for w, a in zip(weights, covering, strict=True)) / sum(weights))
    return np.array(actions)


@settings(deadline=None, max_examples=60)
@given(
    chunk=st.integers(1, 9),
    data=st.data(),
    calls=st.integers(1, 12),
    m=st.floats(-1, 1),
    seed=st.integers(0, 1000),
)
def test_ensemble_equals_its_definition(chunk: int, data: st.DataObject, calls: int, m: float, seed: int) -> None:
    steps = data.draw(st.integers(1, chunk))
    rng = np.random.default_rng(seed)
    ensemble = TemporalEnsemble(m, steps)
    chunks = [rng.standard_normal((chunk, 3)) for _ in range(calls)]
    for n, new in enumerate(chunks, start=1):
        planned = ensemble.plan(["robot"], new[None])
        np.testing.assert_allclose(planned[0], naive_ensemble(chunks[:n], m, steps), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(schedule=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=10), seed=st.integers(0, 100))
def test_robots_out_of_step_do_not_touch_each_other(schedule: list[set[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    together = TemporalEnsemble(0.1)
    alone = {slot: TemporalEnsemble(0.1) for slot in range(4)}
    for slots in map(sorted, schedule):
        chunks = rng.standard_normal((len(slots), 5, 2))
        planned = together.plan(slots, chunks)
        for row, slot in enumerate(slots):
            np.testing.assert_allclose(planned[row], alone[slot].plan([0], chunks[row : row + 1])[0])


@settings(deadline=None, max_examples=30)
@given(chunk=st.integers(1, 10), robots=st.integers(1, 5), data=st.data())
def test_open_loop_is_the_start_of_the_chunk(chunk: int, robots: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, chunk))
    chunks = np.random.default_rng(0).standard_normal((robots, chunk, 2)).astype(np.float32)
    planned = OpenLoop(steps).plan(list(range(robots)), chunks)
    assert planned.dtype == np.float32
    np.testing.assert_array_equal(planned, chunks[:, :steps])


def test_equal_chunks_pass_unchanged_and_dtype_is_kept() -> None:
    ensemble = TemporalEnsemble()
    for _ in range(6):
        planned = ensemble.plan([0], np.full((1, 4, 2), 0.25, np.float32))
        assert planned.dtype == np.float32
        np.testing.assert_allclose(planned, 0.25)


def test_known_weights() -> None:
    ensemble = TemporalEnsemble(m=0.5)
    ensemble.plan([0], np.full((1, 3, 1), 1.0))
    old, new = 1.0, np.exp(-0.5)
    assert ensemble.plan([0], np.full((1, 3, 1), 3.0))[0, 0, 0] == pytest.approx((old * 1 + new * 3) / (old + new))


def test_reset_forgets_one_robot_only() -> None:
    ensemble = TemporalEnsemble(0.0)
    ensemble.plan([0, 1], np.zeros((2, 4, 1)))
    ensemble.reset(0)
    planned = ensemble.plan([0, 1], np.ones((2, 4, 1)))
    assert planned[:, 0, 0].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("chunker", [OpenLoop(5), TemporalEnsemble(0.01, steps=5)])
def test_a_chunk_shorter_than_the_steps_is_refused(chunker: OpenLoop | TemporalEnsemble) -> None:
    with pytest.raises(ValueError, match="lower execute_steps"):
        chunker.plan([0], np.zeros((1, 4, 2)))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one action"):
        OpenLoop(0)
    with pytest.raises(ValueError, match="finite"):
        TemporalEnsemble(float("nan"))
    with pytest.raises(ValueError, match="one chunk"):
        OpenLoop(1).plan([0, 1], np.zeros((1, 4, 2)))


def naive_late(chunks: list[np.ndarray], steps: int, delay: int) -> np.ndarray:
    """All actions: at each tick, that of the newest chunk that is there; the robot waits for its first chunk only."""
    actions = []
    for tick in range(len(chunks) * steps):
        there = [i for i in range(len(chunks)) if (i * steps + delay if i else 0) <= tick]
        actions.append(chunks[there[-1]][tick - there[-1] * steps])
    return np.array(actions)


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 6), data=st.data(), more=st.integers(0, 3), calls=st.integers(1, 6))
def test_late_chunks_decide_when_they_are_there(steps: int, data: st.DataObject, more: int, calls: int) -> None:
    delay = data.draw(st.integers(0, steps))
    rng = np.random.default_rng(calls)
    chunks = [rng.standard_normal((steps + delay + more, 2)) for _ in range(calls)]
    for overlap in ("replace", "real_time", "ensemble"):
        late = Late(steps, delay, overlap)
        late.plan(["other"], chunks[-1][None])
        planned = np.concatenate([late.plan(["robot"], chunk[None])[0] for chunk in chunks])
        if overlap == "replace":
            np.testing.assert_array_equal(planned, naive_late(chunks, steps, delay))
        for call in range(1, calls):  # in whatever way chunks are blended: what passes while one is computed stands
            standing = slice(call * steps, call * steps + delay)
            without = Late(steps, delay, overlap)
            for chunk in chunks[:call]:
                without.plan(["robot"], chunk[None])
            other = without.plan(["robot"], rng.standard_normal(chunks[call].shape)[None])[0]
            np.testing.assert_allclose(planned[standing], other[:delay])
        late.reset("robot")
        np.testing.assert_array_equal(late.plan(["robot"], chunks[0][None])[0], chunks[0][:steps])


@pytest.mark.parametrize("overlap", ["replace", "real_time"])
def test_without_a_delay_late_chunks_are_the_open_loop(overlap: str) -> None:
    chunks = np.random.default_rng(0).standard_normal((5, 1, 4, 3))
    late = Late(4, 0, overlap)
    np.testing.assert_allclose([late.plan(["a"], chunk)[0] for chunk in chunks], chunks[:, 0])


def test_late_chunks_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="asked every 2 ticks, but a chunk takes 3: raise execute_steps, or lower the"):
        Late(2, 3)
    with pytest.raises(ValueError, match="cannot execute 6 actions of a chunk of 5"):
        Late(4, 2).plan(["a"], np.zeros((1, 5, 1)))


@given(st.integers(2, 5), st.data(), st.integers(0, 3), st.sampled_from(["replace", "real_time", "ensemble"]))
def test_late_chunks_are_announced_what_is_executed_until_they_are_there(
    steps: int, data: st.DataObject, more: int, overlap: str
) -> None:
    delay = data.draw(st.integers(0, steps))
    late, rng = Late(steps, delay, overlap), np.random.default_rng(0)
    assert late.committed("a") is None, "it stands still until its first chunk"
    for call in range(4):
        told = late.committed("a")
        executed_TA = late.plan(["a"], rng.normal(size=(1, steps + delay + more, 2)))[0]
        if call:
            assert told is not None
            assert told.delay == delay
            assert len(told.actions) >= delay
            np.testing.assert_allclose(told.actions[:delay], executed_TA[:delay], rtol=1e-6)
    late.reset("a")
    assert late.committed("a") is None
