"""VFlowOpt's offline search: which share of the vision tokens to keep before the language model and at some of its
layers, so that a mean budget is met and the answers change least.

The shares fall: s_0 of the tokens enter, s_1 are left from layer l_1 on, and so on. Their mean over the layers is the
budget; the last share follows from the others. The paper searches with a Gaussian process (27 points to begin with, 300
evaluations); here it is as many random points, then steps around the best one that become smaller, which is enough for
three to five numbers. Numbers of the router itself, such as a threshold, can be searched with them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cogvla.routing.router import RouterConfig

FIRST_POINTS, STEP, LEAST = 27, 0.3, 0.01


@dataclass(frozen=True)
class Schedule:
    """What is searched for.

    Attributes:
        layers: before which tokens are left out, ascending.
        shares: s_0 before the language model, then one for each layer.
        options: numbers of the router.
    """

    layers: tuple[int, ...]
    shares: tuple[float, ...]
    options: Mapping[str, float] = field(default_factory=dict)

    def mean(self, depth: int) -> float:
        """Mean share over so many layers."""
        spans = zip(self.shares, (0, *self.layers), (*self.layers, depth), strict=True)
        return sum(share * (end - start) for share, start, end in spans) / depth

    def applied(self, router: RouterConfig) -> RouterConfig:
        """A router's configuration with this schedule."""
        options = {**(router.options or {}), **self.options}
        return replace(
            router, budget=self.shares[0], layers=self.layers, layer_budgets=self.shares[1:], options=options or None
        )


def completed(
    layers: tuple[int, ...], shares: tuple[float, ...], depth: int, budget: float
) -> tuple[float, ...] | None:
    """All shares, the last one such that their mean is the budget; None where no falling shares have it."""
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
    """The best schedule found, and its value.

    Args:
        objective: how good a schedule is, higher is better; the cosine of the states of the action tokens with and
            without routing, for instance (`policy.model.schedule_objective`).
        layers: where tokens are left out, see `Schedule`.
        depth: layers of the language model.
        budget: mean share of tokens over all layers.
        options: numbers of the router with their ranges.
        evaluations: calls of the objective.
        seed: of the random points.
    """
    if not layers or list(layers) != sorted(set(layers)) or not 0 < layers[0] <= layers[-1] < depth:
        raise ValueError(f"layers must rise within 1 to {depth - 1}, got {layers}")
    if not LEAST < budget < 1 or evaluations < 1:
        raise ValueError(f"needs a budget between {LEAST} and 1 and evaluations, got {budget} and {evaluations}")
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
    """A random schedule that keeps to the budget, anywhere or around the best one."""
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
