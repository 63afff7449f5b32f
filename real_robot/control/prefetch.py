"""Decide when to ask for the next chunk, so that it arrives before the queue runs empty.

    queue   |#########........|        # = actions left
                  ^ ask here: remaining <= ceil(p95 of the latency * rate) + margin
                  |--- request in flight, one at a time, each with a deadline ---> answer

Shape legend: none; this file knows ticks and seconds only.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

import numpy as np

WINDOW = 64
"""Number of latest latencies in the running percentile."""
ENOUGH = 8
"""Number of latencies after which the measured percentile replaces the assumed one."""


class InFlight(Protocol):
    """Fields of a request that `Prefetch` reads: its number, and the times of request and deadline in seconds."""

    @property
    def id(self) -> int: ...

    @property
    def asked_at(self) -> float: ...

    @property
    def deadline(self) -> float: ...


class LatencyEstimate:
    """Running 95th percentile of the time from request to answer.

    Args:
        assumed: value in seconds until `ENOUGH` latencies were measured.

    Attributes:
        p95: 95th percentile in seconds.
    """

    def __init__(self, assumed: float) -> None:
        self._samples: deque[float] = deque(maxlen=WINDOW)
        self.p95 = assumed

    def add(self, seconds: float) -> None:
        self._samples.append(seconds)
        if len(self._samples) >= ENOUGH:
            self.p95 = float(np.percentile(np.array(self._samples), 95, method="higher"))


class Prefetch:
    """Schedule of requests, and the one request in flight.

    Args:
        rate: control ticks per second.
        latency_s: assumed latency until enough are measured, see `LoopSettings`.
        margin_ticks: see `LoopSettings`.
        retry_s: see `LoopSettings`.
        execute_steps: see `LoopSettings`.

    Attributes:
        latency: estimate of the time from request to answer.
        in_flight: request that waits for its answer, or None.
    """

    def __init__(
        self, rate: float, latency_s: float, margin_ticks: int, retry_s: float, execute_steps: int | None
    ) -> None:
        self._rate = rate
        self._margin = margin_ticks
        self._retry_s = retry_s
        self._execute_steps = execute_steps
        self._retry_at = -math.inf
        self.latency = LatencyEstimate(latency_s)
        self.in_flight: InFlight | None = None

    @property
    def latency_ticks(self) -> int:
        """Ticks that pass during one request, at the 95th percentile of the latency."""
        return math.ceil(self.latency.p95 * self._rate - 1e-9)

    @property
    def threshold(self) -> int:
        """Number of remaining actions at which to ask for the next chunk."""
        return self.latency_ticks + self._margin

    def due(self, remaining: int, since_observed: int, now: float) -> bool:
        """Return True if it is time to ask.

        Args:
            remaining: number of actions in the queue.
            since_observed: ticks since the observation of the newest chunk.
            now: time in seconds.
        """
        if self.in_flight is not None or now < self._retry_at:
            return False
        return remaining <= self.threshold or (
            self._execute_steps is not None and since_observed >= self._execute_steps
        )

    def answered(self, request: InFlight, now: float) -> float | None:
        """Record an answer. Return its latency in seconds, or None if `request` is not the one in flight."""
        if self.in_flight is None or self.in_flight.id != request.id:
            return None
        self.in_flight = None
        seconds = max(0.0, now - request.asked_at)
        self.latency.add(seconds)
        return seconds

    def failed(self, request: InFlight, now: float) -> bool:
        """Record a failure, without a latency sample. Return False if `request` is not the one in flight."""
        if self.in_flight is None or self.in_flight.id != request.id:
            return False
        self.in_flight = None
        self._retry_at = now + self._retry_s
        return True

    def expire(self, now: float) -> bool:
        """Give up the request in flight if its deadline has passed; return True if so.

        The time that it waited counts as a latency sample, because the policy takes at least that long.
        """
        request = self.in_flight
        if request is None or now <= request.deadline:
            return False
        self.failed(request, now)
        self.latency.add(now - request.asked_at)
        return True

    def forget(self) -> None:
        """Drop the request in flight and the pause after a failure. Call it after a jump of the clock."""
        self.in_flight = None
        self._retry_at = -math.inf
