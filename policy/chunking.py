"""Action chunking: turn predicted chunks into one action per control tick (open loop, temporal ensemble, late chunks).

A chunker is called every `steps` ticks. It receives the newest chunk of each robot that needs one, and returns the
actions of that robot's next `steps` ticks. Its memory is separate for each robot ("slot"), so one object serves any
number of robots, which need not run in step.

Shape legend: N slots in this call, K chunk length, A action dimension, T ticks until the next call (`steps`),
C chunks that overlap one tick.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np

from cogvla.policy.chunk_queue import ChunkQueue
from cogvla.policy.interface import Committed


class Chunker(Protocol):
    """Interface of all chunkers; see the module docstring."""

    @property
    def steps(self) -> int:
        """The number of ticks between two chunks."""
        ...

    @property
    def delay(self) -> int:
        """The number of ticks from the observation of a chunk to the first action that it decides."""
        ...

    def reset(self, slot: Hashable) -> None:
        """Forget the chunks of one robot; call it at the start of an episode."""
        ...

    def plan(self, slots: Sequence[Hashable], chunks_NKA: np.ndarray) -> np.ndarray:
        """Return the actions [N,T,A] of the next `steps` ticks, given the newest chunk of each slot.

        Raises:
            ValueError: the number of chunks is not that of the slots, or chunks are shorter than `steps`.
        """
        ...


class OpenLoop:
    """Execute the first `steps` actions of every chunk and drop the rest."""

    delay = 0

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"execute at least one action per chunk, got {steps}")
        self.steps = steps

    def reset(self, slot: Hashable) -> None:
        """Do nothing: there is no memory."""

    def plan(self, slots: Sequence[Hashable], chunks_NKA: np.ndarray) -> np.ndarray:
        """See `Chunker.plan`."""
        _check(slots, chunks_NKA, self.steps)
        return chunks_NKA[:, : self.steps]


class TemporalEnsemble:
    """Average all chunks that cover a tick, with weights exp(-m * i), i = 0 for the oldest (Zhao et al. 2023, ACT).

    A positive `m` gives old predictions more weight, a negative `m` new ones, 0 gives all the same weight.

    Args:
        m: decay of the weights.
        steps: ticks between two chunks; 1 calls the policy at every tick, as in the paper.
    """

    delay = 0

    def __init__(self, m: float = 0.01, steps: int = 1) -> None:
        if steps < 1:
            raise ValueError(f"execute at least one action per chunk, got {steps}")
        if not np.isfinite(m):
            raise ValueError(f"the decay m must be a finite number, got {m}")
        self.m = m
        self.steps = steps
        self._history: dict[Hashable, np.ndarray] = {}  # slot -> [C,K,A], newest first

    def reset(self, slot: Hashable) -> None:
        """Forget the chunks of this slot."""
        self._history.pop(slot, None)

    def plan(self, slots: Sequence[Hashable], chunks_NKA: np.ndarray) -> np.ndarray:
        """See `Chunker.plan`."""
        _check(slots, chunks_NKA, self.steps)
        _, chunk, action_dim = chunks_NKA.shape
        capacity = -(-chunk // self.steps)  # a chunk of c * steps ticks ago covers this tick if c < capacity
        history_NCKA = np.zeros((len(slots), capacity, chunk, action_dim), np.float64)
        filled_N = np.empty(len(slots), int)
        for row, (slot, chunk_KA) in enumerate(zip(slots, chunks_NKA, strict=True)):
            known = [chunk_KA[None]]
            if slot in self._history:
                known.append(self._history[slot][: capacity - 1])
            self._history[slot] = history_CKA = np.concatenate(known)
            filled_N[row] = len(history_CKA)
            history_NCKA[row, : len(history_CKA)] = history_CKA

        age_C = np.arange(capacity)
        index_CT = age_C[:, None] * self.steps + np.arange(self.steps)  # which action of chunk c belongs to tick t
        valid_NCT = (age_C[:, None] < filled_N[:, None, None]) & (index_CT < chunk)
        oldest_N1T = valid_NCT.sum(axis=1, keepdims=True) - 1
        weight_NCT = np.where(valid_NCT, np.exp(-self.m * (oldest_N1T - age_C[:, None])), 0.0)
        weight_NCT /= weight_NCT.sum(axis=1, keepdims=True)
        candidates_NCTA = history_NCKA[:, age_C[:, None], np.minimum(index_CT, chunk - 1)]
        return np.einsum("nct,ncta->nta", weight_NCT, candidates_NCTA).astype(chunks_NKA.dtype)


class Late:
    """Execute chunks that arrive `delay` ticks after their observation, while the world moves on, as on a robot.

        tick      0   1   2   3   4   5   6   7   8
        chunk a   a0  a1  a2  a3  a4  a5                 the robot stands still until its first chunk is there
        chunk b                   b0  b1  b2  b3  b4     steps 4, delay 2: observed at tick 4, there at tick 6
        executed  a0  a1  a2  a3  a4  a5  b2  b3  b4

    Args:
        steps: ticks between two observations.
        delay: ticks from an observation to its chunk; at most `steps`, as one chunk is computed at a time.
        overlap: what happens in ticks that both chunks cover, see `policy.chunk_queue`.
        ensemble_m: decay m of overlap="ensemble".
    """

    def __init__(self, steps: int, delay: int, overlap: str = "replace", ensemble_m: float = 0.01) -> None:
        if not 0 <= delay <= steps:
            raise ValueError(
                f"the policy is asked every {steps} ticks, but a chunk takes {delay}: raise execute_steps, or "
                "lower the latency"
            )
        self.steps, self.delay = steps, delay
        self._overlap, self._m = overlap, ensemble_m
        self._queues: dict[Hashable, tuple[ChunkQueue, int]] = {}  # slot -> queue, next tick

    def reset(self, slot: Hashable) -> None:
        """Forget the chunks of this slot."""
        self._queues.pop(slot, None)

    def committed(self, slot: Hashable) -> Committed | None:
        """Return what this slot executes from its next observation on; None before its first chunk."""
        if slot not in self._queues:
            return None
        queue, tick = self._queues[slot]
        return Committed(queue.plan(tick).astype(np.float32), self.delay)

    def plan(self, slots: Sequence[Hashable], chunks_NKA: np.ndarray) -> np.ndarray:
        """See `Chunker.plan`.

        Raises:
            ValueError: a chunk is too short to last until the next one is there.
        """
        _check(slots, chunks_NKA, self.steps + self.delay)
        planned_NTA = np.empty((len(slots), self.steps, chunks_NKA.shape[2]), chunks_NKA.dtype)
        for planned_TA, slot, chunk_KA in zip(planned_NTA, slots, chunks_NKA, strict=True):
            if slot in self._queues:
                (queue, tick), wait = self._queues[slot], self.delay
            else:
                queue, tick, wait = ChunkQueue(chunks_NKA.shape[2], self._overlap, self._m), 0, 0
            planned_TA[:wait] = queue.plan(tick)[:wait]
            queue.add(chunk_KA, observed=tick, tick=tick + wait)
            planned_TA[wait:] = queue.plan(tick + wait)[: self.steps - wait]
            self._queues[slot] = queue, tick + self.steps
        return planned_NTA


def _check(slots: Sequence[Hashable], chunks_NKA: np.ndarray, steps: int) -> None:
    assert len(set(slots)) == len(slots), f"a slot occurs twice in one call: {slots}"
    if chunks_NKA.ndim != 3 or len(chunks_NKA) != len(slots):
        raise ValueError(f"expected one chunk [K,A] for each of {len(slots)} robots, got shape {chunks_NKA.shape}")
    if chunks_NKA.shape[1] < steps:
        raise ValueError(f"cannot execute {steps} actions of a chunk of {chunks_NKA.shape[1]}; lower execute_steps")
