"""The actions that are known for the coming control ticks.

    tick      10  11  12  13  14  15  16  17  18  19
    chunk a   a0  a1  a2  a3  a4  a5  a6  a7               observed at tick 10
    chunk b                   b0  b1  b2  b3  b4  b5       observed at tick 14, arrives before tick 16
    executed  a0  a1  a2  a3  a4  a5  |  b2 ..             b0 and b1 are dropped: their ticks have passed
                                      |<-overlap->|

A control tick looks up its index and never waits. What happens in the overlap:

- "replace": the newest chunk counts.
- "ensemble": all chunks that cover a tick are averaged, weighted exp(-m * i) with i = 0 for the oldest; the definition
  of `cogvla.policy.chunking.TemporalEnsemble`, for chunks that arrive at any tick.
- "real_time": `soft_mask` fades from the old plan to the new chunk (Black et al. 2025, Real-time execution of action
  chunking flow policies, eq. 5).

Real-time chunking has two halves. The paper's is at the policy: a flow or diffusion head denoises the new chunk under
guidance towards the old plan, with this same mask; for it a `Request` carries the old plan (`committed_NA`) and how
many of its ticks will pass (`delay_ticks`). Such chunks continue the old plan already, so the queue must not fade once
more: use "replace" with a head that does this. A regression head cannot be guided. For it only the other half is
possible, the fade in this queue: "real_time". In both, the ticks that pass during inference are executed from the old
plan, because they have passed when the answer arrives.

Shape legend: K chunk length, A action dimension, N ticks of the plan.
"""

from __future__ import annotations

import numpy as np

KEEP_PASSED = 32
"""Ticks that stay in the plan after they passed, because the observation of a request may be that old."""


def soft_mask(length: int, delay: int, horizon: int) -> np.ndarray:
    """How much of the old plan goes into each action of a new chunk, float64 [K].

    Args:
        length: K.
        delay: d, the first so many actions pass during inference: weight 1.
        horizon: H - s, actions from this index on are not in the old plan: weight 0.

    In between, c * (e^c - 1) / (e - 1) with c = (horizon - i) / (horizon - delay + 1).
    """
    index_K = np.arange(length)
    ramp_K = np.clip((horizon - index_K) / max(horizon - delay + 1, 1), 0.0, 1.0)
    weight_K = ramp_K * np.expm1(ramp_K) / np.expm1(1.0)
    return np.where(index_K < min(delay, horizon), 1.0, weight_K)


class ChunkQueue:
    """See the module docstring. Ticks are absolute: they count calls of `ControlLoop.tick` and never start again."""

    def __init__(self, action_dim: int, overlap: str = "replace", ensemble_m: float = 0.01) -> None:
        self._overlap = overlap
        self._m = ensemble_m
        self._empty_NA = np.empty((0, action_dim))
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._start = 0
        self._plan_NA = self._empty_NA
        self._chunks: list[tuple[int, np.ndarray]] = []

    def get(self, tick: int) -> np.ndarray | None:
        """The action [A] of this tick, or None."""
        index = tick - self._start
        return self._plan_NA[index] if 0 <= index < len(self._plan_NA) else None

    def remaining(self, tick: int) -> int:
        """How many actions there are for this tick and the following ones."""
        return max(0, self._start + len(self._plan_NA) - tick)

    def plan(self, tick: int) -> np.ndarray:
        """The plan [N,A] from this tick on; N is 0 where the tick is not in it."""
        index = tick - self._start
        return self._plan_NA[index:] if index >= 0 else self._empty_NA

    def add(self, actions_KA: np.ndarray, observed: int, tick: int) -> int:
        """Take a chunk.

        Args:
            actions_KA: action i belongs to tick `observed` + i.
            observed: tick of the chunk's observation.
            tick: the next tick to be executed, not before `observed`.

        Returns:
            How many of the chunk's actions can still be executed; 0: the whole chunk is late and changes nothing.
        """
        assert observed <= tick, f"an observation cannot be of tick {observed}, the next one is {tick}"
        passed = tick - observed
        fresh_NA = actions_KA[passed:]
        if not len(fresh_NA):
            return 0
        old_NA = self.plan(tick)
        overlap = min(len(old_NA), len(fresh_NA))
        match self._overlap:
            case "ensemble":
                future_NA = self._ensemble(actions_KA, observed, tick)
            case "real_time" if overlap:
                weight_K1 = soft_mask(len(actions_KA), passed, passed + overlap)[passed:, None]
                future_NA = (1.0 - weight_K1) * fresh_NA
                future_NA[:overlap] += weight_K1[:overlap] * old_NA[:overlap]
            case _:
                future_NA = fresh_NA
        executed_NA = self._plan_NA[max(0, tick - self._start - KEEP_PASSED) : max(0, tick - self._start)]
        if self._start + len(self._plan_NA) < tick:  # starved in between: what was executed does not reach this tick
            executed_NA = self._empty_NA
        self._start = tick - len(executed_NA)
        self._plan_NA = np.concatenate([executed_NA, future_NA])
        return len(fresh_NA)

    def _ensemble(self, actions_KA: np.ndarray, observed: int, tick: int) -> np.ndarray:
        self._chunks = [(start, chunk) for start, chunk in self._chunks if start + len(chunk) > tick]
        self._chunks.append((observed, actions_KA))
        end = max(start + len(chunk) for start, chunk in self._chunks)
        sum_NA = np.zeros((end - tick, actions_KA.shape[1]))
        total_N1 = np.zeros((end - tick, 1))
        rank_N1 = np.zeros((end - tick, 1))  # how many older chunks cover the tick
        for start, chunk_KA in self._chunks:
            first, last = max(start, tick) - tick, start + len(chunk_KA) - tick
            weight_N1 = np.exp(-self._m * rank_N1[first:last])
            sum_NA[first:last] += weight_N1 * chunk_KA[first + tick - start :]
            total_N1[first:last] += weight_N1
            rank_N1[first:last] += 1
        return sum_NA / total_N1
