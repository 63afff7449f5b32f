"""Offline search of keep schedules (VFlowOpt): find the shares of vision tokens to keep before the language model and
at some of its layers, for a given mean share, such that the policy's answers change least.

Shares decrease: s_0 of the tokens enter the language model, s_1 are left from layer l_1 on, and so on. Their mean over
the layers is the budget, so the last share follows from the others. The paper searches with a Gaussian process (27
initial points, 300 evaluations). Here the same number of random points comes first, then random steps around the best
point, which become smaller; that is enough for three to five numbers. Options of the router, such as a threshold, can
be searched at the same time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cogvla.routing.router import RouterConfig

FIRST_POINTS, STEP, LEAST = 27, 0.3, 0.01


@dataclass(frozen=True)
class Schedule:
    """Shares of vision tokens to keep, and options of the router.

    Attributes:
        layers: language layers before which tokens are removed, ascending.
        shares: s_0 before the language model, then one for each of `layers`.
        options: numerical options of the router.
    """

    layers: tuple[int, ...]
    shares: tuple[float, ...]
    options: Mapping[str, float] = field(default_factory=dict)

    def mean(self, depth: int) -> float:
        """Return the mean share over all `depth` layers."""
        spans = zip(self.shares, (0, *self.layers), (*self.layers, depth), strict=True)
        return sum(share * (end - start) for share, start, end in spans) / depth

    def applied(self, router: RouterConfig) -> RouterConfig:
        """Return the router's configuration with this schedule."""
        options = {**(router.options or {}), **self.options}
        return replace(
            router, budget=self.shares[0], layers=self.layers, layer_budgets=self.shares[1:], options=options or None
        )


def completed(
    layers: tuple[int, ...], shares: tuple[float, ...], depth: int, budget: float
) -> tuple[float, ...] | None:
    """Append the last share, such that the mean over all layers is the budget.

    Args:
        layers: see `Schedule`.
        shares: all shares but the last.
        depth: number of layers of the language model.
        budget: mean share.

    Returns:
        All shares, or None if the last one would be larger than the one before it, or too small.
    """
    spent = sum(share * (end - start) for share, start, end in zip(shares, (0, *layers[:-1]), layers, strict=True))
    last = (budget * depth - spent) / (depth - layers[-1])
    return (*shares, last) if LEAST <= last <= shares[-1] + 1e-9 else None


def search(
    objective: Callable[[Schedule], float],
    layers: tuple[int, ...],
    depth: int,
    budget: float,
    options: Mapping[str, tuple[float, float]] | None = None,
    evaluations: int = 300,
    seed: int = 0,
) -> tuple[Schedule, float]:
    """Search for the best schedule; return it and its value.

    Args:
        objective: value of a schedule, higher is better. For example the cosine between the states of the action tokens
            with and without routing (`policy.model.schedule_objective`).
        layers: see `Schedule`.
        depth: number of layers of the language model.
        budget: mean share of tokens over all layers.
        options: ranges of numerical router options that are searched too.
        evaluations: number of calls of the objective.
        seed: seed of the random points.

    Raises:
        ValueError: layers, budget or evaluations out of range.
    """
    if not layers or list(layers) != sorted(set(layers)) or not 0 < layers[0] <= layers[-1] < depth:
        raise ValueError(f"layers must increase, from 1 to at most {depth - 1}, got {layers}")
    if not LEAST < budget < 1 or evaluations < 1:
        raise ValueError(
            f"the budget must be between {LEAST} and 1, and evaluations at least 1; got {budget} and {evaluations}"
        )
    draw, ranges = random.Random(seed), dict(options or {})
    flat = Schedule(layers, (budget,) * (len(layers) + 1), {name: (a + b) / 2 for name, (a, b) in ranges.items()})
    best, value = flat, objective(flat)
    for number in range(1, evaluations):
        spread = None if number < FIRST_POINTS else STEP * (1 - number / evaluations)
        candidate = _near(best, spread, depth, budget, ranges, draw)
        if (found := objective(candidate)) > value:
            best, value = candidate, found
    return best, value


def _near(
    best: Schedule,
    spread: float | None,
    depth: int,
    budget: float,
    ranges: Mapping[str, tuple[float, float]],
    draw: random.Random,
) -> Schedule:
    """Draw a random schedule with the given budget: around the best one, or anywhere if `spread` is None."""
    while True:
        free = best.shares[:-1]
        drawn = [draw.uniform(LEAST, 1) if spread is None else s + draw.gauss(0, spread) for s in free]
        shares = tuple(sorted((min(max(share, LEAST), 1.0) for share in drawn), reverse=True))
        if whole := completed(best.layers, shares, depth, budget):
            break
    options = {}
    for name, (low, high) in ranges.items():
        moved = best.options[name] + draw.gauss(0, (spread or 0) * (high - low))
        options[name] = draw.uniform(low, high) if spread is None else min(max(moved, low), high)
    return Schedule(best.layers, whole, options)
