"""What turns predicted chunks into the actions that are executed, one per control tick.

A chunker is asked every `steps` ticks: it is given the newest chunk of each robot that waits for one and answers the
actions of that robot's next `steps` ticks. It keeps its memory by robot ("slot"), so one object serves any number of
robots that run out of step with each other.

Shape legend: N slots in this call, K chunk length, A action dimension, T ticks until the next call (`steps`),
C chunks that overlap one tick.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np


class Chunker(Protocol):
    """See the module docstring."""

    @property
    def steps(self) -> int:
        """Ticks between two chunks."""
        ...

    def reset(self, slot: Hashable) -> None:
        """Forget one robot's chunks, because a new episode starts there."""
        ...

    def plan(self, slots: Sequence[Hashable], chunks_NKA: np.ndarray) -> np.ndarray:
        """The actions [N,T,A] of the next `steps` ticks, given the newest chunk of each slot."""
        ...


class OpenLoop:
    """Executes the first `steps` actions of every chunk and drops the rest."""

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"execute at least one action per chunk, got {steps}")
        self.steps = steps

    def reset(self, slot: Hashable) -> None:
        """Nothing to forget."""

    def plan(self, slots: Sequence[Hashable], chunks_NKA: np.ndarray) -> np.ndarray:
        """See `Chunker.plan`; ValueError when the chunk is shorter than `steps`."""
        _check(slots, chunks_NKA, self.steps)
        return chunks_NKA[:, : self.steps]


class TemporalEnsemble:
    """Averages all chunks that cover a tick, weighted exp(-m * i) with i = 0 for the oldest (Zhao et al. 2023, ACT).

    Positive `m` trusts old predictions more, negative `m` new ones, 0 all the same.

    Args:
        m: decay of the weights.
        steps: ticks between two chunks; 1 asks the policy at every tick, as in the paper.
    """

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
        """See `Chunker.plan`; ValueError when the chunk is shorter than `steps`."""
        _check(slots, chunks_NKA, self.steps)
        _, chunk, action_dim = chunks_NKA.shape
        capacity = -(-chunk // self.steps)  # a chunk that began c * steps ticks ago still covers now if c < capacity
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


def _check(slots: Sequence[Hashable], chunks_NKA: np.ndarray, steps: int) -> None:
    assert len(set(slots)) == len(slots), f"a slot occurs twice in one call: {slots}"
    if chunks_NKA.ndim != 3 or len(chunks_NKA) != len(slots):
        raise ValueError(f"expected one chunk [K,A] for each of {len(slots)} robots, got shape {chunks_NKA.shape}")
    if chunks_NKA.shape[1] < steps:
        raise ValueError(f"cannot execute {steps} actions of a chunk of {chunks_NKA.shape[1]}; lower execute_steps")
