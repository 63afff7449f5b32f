"""When to ask for the next chunk, so that it is there before the last action is executed.

    queue   |#########........|        # actions left
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
"""Latencies that the running percentile is taken of."""
ENOUGH = 8
"""Latencies from which on the percentile is the measured one."""


class InFlight(Protocol):
    """What a request is to this file."""

    @property
    def id(self) -> int: ...

    @property
    def asked_at(self) -> float: ...

    @property
    def deadline(self) -> float: ...


class LatencyEstimate:
    """Running 95th percentile of request to answer, in seconds; `assumed` until `ENOUGH` were measured."""

    def __init__(self, assumed: float) -> None:
        self._samples: deque[float] = deque(maxlen=WINDOW)
        self.p95 = assumed

    def add(self, seconds: float) -> None:
        self._samples.append(seconds)
        if len(self._samples) >= ENOUGH:
            self.p95 = float(np.percentile(np.array(self._samples), 95, method="higher"))


class Prefetch:
    """Decides when to ask, and keeps the one request in flight.

    Args:
        rate: control ticks per second.
        latency_s, margin_ticks, retry_s, execute_steps: as in `LoopSettings`.
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
        """Ticks that pass while a request is answered, at the 95th percentile."""
        return math.ceil(self.latency.p95 * self._rate - 1e-9)

    @property
    def threshold(self) -> int:
        """Ask when so many actions or fewer remain."""
        return self.latency_ticks + self._margin

    def due(self, remaining: int, since_observed: int, now: float) -> bool:
        """Whether to ask now.

        Args:
            remaining: actions in the queue.
            since_observed: ticks since the observation of the newest chunk.
            now: seconds.
        """
        if self.in_flight is not None or now < self._retry_at:
            return False
        return remaining <= self.threshold or (
            self._execute_steps is not None and since_observed >= self._execute_steps
        )

    def answered(self, request: InFlight, now: float) -> float | None:
        """The latency in seconds if this is the answer that is waited for, else None."""
        if self.in_flight is None or self.in_flight.id != request.id:
            return None
        self.in_flight = None
        seconds = max(0.0, now - request.asked_at)
        self.latency.add(seconds)
        return seconds

    def failed(self, request: InFlight, now: float) -> bool:
        """The request will not be answered; False: nobody waited for it. Says nothing about the latency."""
        if self.in_flight is None or self.in_flight.id != request.id:
            return False
        self.in_flight = None
        self._retry_at = now + self._retry_s
        return True

    def expire(self, now: float) -> bool:
        """Give up a request past its deadline; True if that happened just now. At least so slow is the policy."""
        request = self.in_flight
        if request is None or now <= request.deadline:
            return False
        self.failed(request, now)
        self.latency.add(now - request.asked_at)
        return True

    def forget(self) -> None:
        """Wait for nothing, because times of another clock mean nothing."""
        self.in_flight = None
        self._retry_at = -math.inf
