"""Statistics of an evaluation: success rates with confidence intervals, a sign test, latency percentiles."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Rate:
    """A success rate: `successes` of `trials`, with its 95 % Wilson interval.

    Attributes:
        successes, trials: counts.
        value: the rate in [0,1]; None without trials.
        low, high: ends of the interval in [0,1]; None without trials.
    """

    successes: int
    trials: int
    value: float | None
    low: float | None
    high: float | None


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a binomial proportion, which lies inside [0, 1].

    Source: E. B. Wilson, JASA 22, 1927.

    Raises:
        ValueError: no trials, more successes than trials, or a confidence outside (0, 1).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials and at least one trial, got {successes} of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - half) / scale  # exactly 0, without rounding errors
    high = 1.0 if successes == trials else (centre + half) / scale
    return low, high


def success_rate(outcomes: Iterable[bool]) -> Rate:
    """Return the share of True, with its 95 % interval."""
    outcomes = list(outcomes)
    successes, trials = sum(outcomes), len(outcomes)
    if not trials:
        return Rate(0, 0, None, None, None)
    return Rate(successes, trials, successes / trials, *wilson_interval(successes, trials))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of wins and losses under the hypothesis that both are equally likely.

    This is the exact binomial form of McNemar's test.
    """
    if min(wins, losses) < 0:
        raise ValueError(f"wins and losses are counts, got {wins} and {losses}")
    trials = wins + losses
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1)) / 2**trials
    return min(1.0, 2 * tail)


@dataclass(frozen=True)
class Latency:
    """Percentiles and mean of `count` latencies in milliseconds; `rate_hz` = 1000 / mean."""

    count: int
    p50: float
    p95: float
    p99: float
    mean: float
    rate_hz: float


def latency(samples_ms: Iterable[float]) -> Latency | None:
    """Return percentiles (with linear interpolation) and mean of samples in milliseconds; None without samples."""
    samples = np.asarray(list(samples_ms), dtype=float)
    if not samples.size:
        return None
    if not np.isfinite(samples).all() or (samples < 0).any():
        raise ValueError("latencies must be finite and not negative")
    p50, p95, p99 = (float(value) for value in np.percentile(samples, (50, 95, 99)))
    mean = float(samples.mean())
    return Latency(samples.size, p50, p95, p99, mean, 1000 / mean if mean > 0 else math.inf)
