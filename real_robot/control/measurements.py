"""Counters and latency percentiles of a control loop, for diagnostics and reports."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

KEPT = 100_000
"""Largest number of samples of each kind; older ones are dropped (83 minutes of ticks at 20 Hz)."""
RECENT = 1000
"""Number of samples in live diagnostics: enough for percentiles, and few enough to sort between two ticks."""


class Measurements:
    """Latency samples in milliseconds, and counters.

    Attributes:
        loop_ms: time from the observation's stamp to the first command of its chunk, one sample per chunk.
        inference_ms: time from request to answer, one sample per answer.
        jitter_ms: absolute difference between a tick's interval and the control period, one sample per tick.
        counts: number of events by name:
            action, teleop, hold, none: commands by kind; take_overs: by the operator;
            limited_*: actions that a safety limit changed;
            requests: requests to the policy; deadline_misses, failures: requests without an answer;
            chunks: chunks in use; late_actions: actions dropped from the front of a chunk; late_chunks: chunks whose
            actions were all too late; old_epoch_chunks: answers to a request of an older epoch;
            unexpected_chunks: answers to a request that was answered or given up before; refused_chunks: answers with
            a wrong shape or NaN;
            starvations: no action left while the arm moved; stale: holds because of a sensor;
            clock_jumps, faults, epochs; alarms: of a monitor;
            of a `Bridge`: late_ticks: ticks more than a period late (the missed ticks are skipped); dry_run: commands
            that were only shown; unsent: commands that a newer one replaced before a robot of lerobot took them.
    """

    def __init__(self) -> None:
        self.loop_ms: deque[float] = deque(maxlen=KEPT)
        self.inference_ms: deque[float] = deque(maxlen=KEPT)
        self.jitter_ms: deque[float] = deque(maxlen=KEPT)
        self.counts: Counter[str] = Counter()

    def summary(self, newest: int = KEPT) -> dict[str, Any]:
        """Return the counters, and the `percentiles` of the newest samples of each kind."""
        return {
            "counts": dict(sorted(self.counts.items())),
            **{
                name: percentiles(islice(reversed(getattr(self, name)), newest))
                for name in ("loop_ms", "inference_ms", "jitter_ms")
            },
        }


def percentiles(samples: Iterable[float]) -> dict[str, float] | None:
    """Return `count`, `p50`, `p95`, `p99` and `max` of samples, linearly interpolated; None without samples."""
    values = np.fromiter(samples, dtype=float)
    if not values.size:
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
    return {"count": values.size, "p50": p50, "p95": p95, "p99": p99, "max": float(values.max())}


def latency_table(measurements: Measurements, control_hz: float) -> str:
    """Return a table of latencies and counters for a terminal."""
    rows = {
        "observation to command": measurements.loop_ms,
        "request to answer": measurements.inference_ms,
        f"tick jitter ({control_hz:g} Hz)": measurements.jitter_ms,
    }
    lines = [f"{'milliseconds':<26}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>9}{'samples':>9}"]
    for name, samples in rows.items():
        found = percentiles(samples)
        if found is None:
            lines.append(f"{name:<26}{'nothing measured':>42}")
        else:
            values = "".join(f"{found[key]:>8.1f}" for key in ("p50", "p95", "p99"))
            lines.append(f"{name:<26}{values}{found['max']:>9.1f}{found['count']:>9}")
    named = (
        "action",
        "teleop",
        "hold",
        "late_ticks",
        "unsent",
        "deadline_misses",
        "starvations",
        "late_chunks",
        "failures",
        "faults",
    )
    lines.append("  ".join(f"{name} {measurements.counts[name]}" for name in named))
    return "\n".join(lines)
