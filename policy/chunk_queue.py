"""Queue of action chunks for asynchronous inference: one action per control tick, with blending of overlapping chunks.

The control loop of a robot uses it, and evaluation with a latency (`policy.chunking.Late`).

    tick      10  11  12  13  14  15  16  17  18  19
    chunk a   a0  a1  a2  a3  a4  a5  a6  a7               observed at tick 10
    chunk b                   b0  b1  b2  b3  b4  b5       observed at tick 14, arrives before tick 16
    executed  a0  a1  a2  a3  a4  a5  |  b2 ..             b0 and b1 are dropped: their ticks have passed
                                      |<-overlap->|

A control tick looks up its action and never waits. Three ways to treat the overlap:

- "replace": take the actions of the newest chunk.
- "ensemble": average all chunks that cover a tick, with weights exp(-m * i), i = 0 for the oldest chunk. This is
  `cogvla.policy.chunking.TemporalEnsemble` for chunks that arrive at any tick.
- "real_time": fade from the old plan to the new chunk with `soft_mask` (Black et al. 2025, Real-time execution of
  action chunking flow policies, eq. 5).

Which one to use for real-time chunking depends on the action head:

- A policy that was trained with committed actions (`head.prefix`, every head) continues the old plan by itself, from
  the first action that is not certain: use "replace".
- A flow or diffusion head can do it without such a training, as in the paper: it denoises the new chunk with guidance
  towards the old plan, with the same mask. Use "replace", too.
- Another regression head cannot be guided. Use "real_time", the fade in this queue.

For the first two, `Observation.committed` carries the old plan and the number of its actions that will have passed.

Both execute the old plan during inference, because these ticks have passed when the answer arrives.

Shape legend: K chunk length, A action dimension, N ticks of the plan.
"""

from __future__ import annotations

import numpy as np

OVERLAPS = ("replace", "ensemble", "real_time")
"""Ways to treat ticks that several chunks cover, see the module docstring."""
KEEP_PASSED = 32
"""Number of past ticks that the plan keeps, because the observation of a request may be that old."""


def soft_mask(length: int, delay: int, horizon: int) -> np.ndarray:
    """Return the weight of the old plan in each action of a new chunk, float64 [K], from 1 (old) to 0 (new).

    Args:
        length: chunk length K.
        delay: number of actions that pass during inference, d in the paper; their weight is 1.
        horizon: first index that the old plan does not cover, H - s in the paper; the weight is 0 from there on.

    Between them, action i has the weight c * (e^c - 1) / (e - 1) with c = (horizon - i) / (horizon - delay + 1).
    """
    index_K = np.arange(length)
    ramp_K = np.clip((horizon - index_K) / max(horizon - delay + 1, 1), 0.0, 1.0)
    weight_K = ramp_K * np.expm1(ramp_K) / np.expm1(1.0)
    return np.where(index_K < min(delay, horizon), 1.0, weight_K)


class ChunkQueue:
    """Actions of the coming control ticks. Ticks are absolute: they count all calls of `ControlLoop.tick`.

    Args:
        action_dim: action dimension A.
        overlap: "replace", "ensemble" or "real_time", see the module docstring.
        ensemble_m: decay m of the ensemble's weights.
    """

    def __init__(self, action_dim: int, overlap: str = "replace", ensemble_m: float = 0.01) -> None:
        self._overlap = overlap
        self._m = ensemble_m
        self._empty_NA = np.empty((0, action_dim))
        self.clear()

    def clear(self) -> None:
        """Remove all actions and chunks."""
        self._start = 0
        self._plan_NA = self._empty_NA
        self._chunks: list[tuple[int, np.ndarray]] = []

    def get(self, tick: int) -> np.ndarray | None:
        """Return the action [A] of a tick, or None if there is none."""
        index = tick - self._start
        return self._plan_NA[index] if 0 <= index < len(self._plan_NA) else None

    def remaining(self, tick: int) -> int:
        """Return the number of actions for this tick and the following ones."""
        return max(0, self._start + len(self._plan_NA) - tick)

    def plan(self, tick: int) -> np.ndarray:
        """Return the plan [N,A] from this tick on; N is 0 if the plan does not contain the tick."""
        index = tick - self._start
        return self._plan_NA[index:] if index >= 0 else self._empty_NA

    def add(self, actions_KA: np.ndarray, observed: int, tick: int) -> int:
        """Add a chunk and blend it with the plan.

        Args:
            actions_KA: actions [K,A]; action i belongs to tick `observed` + i.
            observed: tick of the chunk's observation.
            tick: next tick to execute, not before `observed`.

        Returns:
            Number of the chunk's actions that can still be executed. 0 means that the whole chunk is late; it changes
            nothing then.
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
        if self._start + len(self._plan_NA) < tick:  # the queue ran empty before this tick: the old plan has a gap
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
        rank_N1 = np.zeros((end - tick, 1))  # number of older chunks that cover the tick
        for start, chunk_KA in self._chunks:
            first, last = max(start, tick) - tick, start + len(chunk_KA) - tick
            weight_N1 = np.exp(-self._m * rank_N1[first:last])
            sum_NA[first:last] += weight_N1 * chunk_KA[first + tick - start :]
            total_N1[first:last] += weight_N1
            rank_N1[first:last] += 1
        return sum_NA / total_N1
