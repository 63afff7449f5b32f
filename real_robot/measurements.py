"""What a control loop counted and measured, for diagnostics and reports."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import numpy as np

KEPT = 100_000
"""Samples of each kind; older ones are dropped (83 minutes of ticks at 20 Hz)."""


class Measurements:
    """Samples in milliseconds, and counters.

    Attributes:
        loop_ms: stamp of the observation to the first command of its chunk, one sample per chunk.
        inference_ms: request to answer, one sample per answer.
        jitter_ms: distance of the time between two ticks from the control period, one sample per tick.
        counts: how often each of these happened:
            action, hold, none: commands by kind; limited_*: actions that a safety limit changed;
            requests, chunks, late_chunks (no action left), late_actions (dropped from the front of a chunk),
            old_epoch_chunks, unexpected_chunks (answers that nobody waits for, such as duplicates), refused_chunks;
            deadline_misses, failures (requests); starvations (running out of actions in motion), stale (holds because
            of a sensor), clock_jumps, faults, epochs.
    """

    def __init__(self) -> None:
        self.loop_ms: deque[float] = deque(maxlen=KEPT)
        self.inference_ms: deque[float] = deque(maxlen=KEPT)
        self.jitter_ms: deque[float] = deque(maxlen=KEPT)
        self.counts: Counter[str] = Counter()

    def summary(self) -> dict[str, Any]:
        """Counters, and percentiles of each kind of sample (`percentiles`)."""
        return {
            "counts": dict(sorted(self.counts.items())),
            **{name: percentiles(getattr(self, name)) for name in ("loop_ms", "inference_ms", "jitter_ms")},
        }


def percentiles(samples: Iterable[float]) -> dict[str, float] | None:
    """`count`, `p50`, `p95`, `p99` and `max`, by linear interpolation; None without samples."""
    values = np.fromiter(samples, dtype=float)
    if not values.size:
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
    return {"count": values.size, "p50": p50, "p95": p95, "p99": p99, "max": float(values.max())}
