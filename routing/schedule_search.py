"""Offline search of keep schedules (VFlowOpt): find the shares of vision tokens to keep before the language model and
at some of its layers, for a given mean share, such that the policy's answers change least.

Shares decrease: s_0 of the tokens enter the language model, s_1 are left from layer l_1 on, and so on. Their mean over
the layers is the budget, so the last share follows from the others. With a number of `tokens`, shares are whole tokens
of a view, and their mean is at most the budget: if they were rounded later, those that round up would be the best.
Options of the router, such as a threshold, can be searched at the same time. `search_schedule` is the command.

Two methods, of 300 evaluations. The first 27 are random points, as in the paper, but for the very first: equal shares.
A random share lies between the mean that is left for it and all later ones, and what leaves them the least.

- `gaussian`, the paper's: a Gaussian process is fitted to all values so far, and the point with the largest expected
  improvement is evaluated next. The process is scikit-learn's (Matern 5/2 with a length per number, and noise). Our
  choice: the improvement is compared on 512 random schedules, a quarter of which lie around the best one.
- `random`, ours, which needs no other package: random steps around the best point, which become smaller.

Shape legend: E points evaluated, C candidates, U numbers of a schedule that are searched.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cogvla.routing.router import RouterConfig

FIRST_POINTS, STEP, LEAST = 27, 0.3, 0.01
CANDIDATES, NEAR = 512, 4
"""Candidates for the expected improvement, one of `NEAR` of which is around the best point."""
METHODS = ("gaussian", "random")


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


def _below(share: float, tokens: int) -> float:
    """Return the largest share of whole tokens that is not above this one."""
    return math.floor(share * tokens + 1e-6) / tokens


def search(
    objective: Callable[[Schedule], float],
    layers: tuple[int, ...],
    depth: int,
    budget: float,
    options: Mapping[str, tuple[float, float]] | None = None,
    evaluations: int = 300,
    seed: int = 0,
    method: str = "random",
    watch: Callable[[Schedule, float], None] | None = None,
    tokens: int | None = None,
) -> tuple[Schedule, float]:
    """Search for the best schedule; return it and its value.

    Args:
        objective: value of a schedule, higher is better. For example the cosine between the states of the action tokens
            with and without routing (`policy.model.routers.schedule_objective`).
        layers: see `Schedule`.
        depth: number of layers of the language model.
        budget: mean share of tokens over all layers.
        options: ranges of numerical router options that are searched too.
        evaluations: number of calls of the objective.
        seed: seed of the random points.
        method: one of `METHODS`.
        watch: function called with every schedule and its value; None: none.
        tokens: tokens of a view, of which shares are whole ones; None: any shares.

    Raises:
        ValueError: layers, budget or evaluations out of range; unknown method, or scikit-learn is missing for it.
    """
    check_search(layers, budget, options, evaluations, method, depth, tokens)
    process = _process() if method == "gaussian" else None
    draw, ranges = random.Random(seed), dict(options or {})
    equal = (budget if tokens is None else _below(budget, tokens),) * (len(layers) + 1)
    flat = Schedule(layers, equal, {name: (a + b) / 2 for name, (a, b) in ranges.items()})
    near = partial(_near, depth=depth, budget=budget, tokens=tokens, ranges=ranges, draw=draw)
    tried: list[tuple[Schedule, float]] = []
    best, value = flat, float("-inf")
    for number in range(evaluations):
        spread = STEP * (1 - number / evaluations)
        if number == 0:
            candidate = flat
        elif number < FIRST_POINTS:
            candidate = near(best, None)
        elif process is None:
            candidate = near(best, spread)
        else:
            spreads = [spread if index % NEAR == 0 else None for index in range(CANDIDATES)]
            candidates = [near(best, each) for each in spreads]
            candidate = candidates[_most_promising(process, tried, candidates, ranges)]
        found = objective(candidate)
        tried.append((candidate, found))
        if watch is not None:
            watch(candidate, found)
        if found > value:
            best, value = candidate, found
    return best, value


def check_search(
    layers: tuple[int, ...],
    budget: float,
    options: Mapping[str, tuple[float, float]] | None = None,
    evaluations: int = 300,
    method: str = "random",
    depth: int | None = None,
    tokens: int | None = None,
) -> None:
    """Check arguments of `search`, for which see there, also before the `depth` of the policy is known (None).

    Raises:
        ValueError: see `search`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
    if method == "gaussian":
        _process()
    beyond = depth is not None and layers[-1:] >= (depth,)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1 or beyond:
        most = "" if depth is None else f" to at most {depth - 1}"
        raise ValueError(f"layers must increase, from 1{most}, got {layers}")
    if not isinstance(budget, int | float) or not LEAST < budget < 1 or evaluations < 1:
        raise ValueError(
            f"the budget must be between {LEAST} and 1, and evaluations at least 1; got {budget} and {evaluations}"
        )
    if tokens is not None and budget * tokens < 1 - 1e-6:
        raise ValueError(f"a mean of {budget} of {tokens} tokens is less than one token: give {1 / tokens:.4g} or more")
    for name, (low, high) in (options or {}).items():
        if not low < high:
            raise ValueError(f"the range of {name} must be [low, high] with low < high, got {[low, high]}")


def _process() -> Callable[[int], Any]:
    """Return a function that builds a Gaussian process for a number of dimensions."""
    try:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    except ImportError as error:
        raise ValueError(
            "method=gaussian needs scikit-learn: install the extra `search` (`uv sync --extra search`), or use "
            "method=random"
        ) from error

    def build(dimensions: int) -> Any:
        lengths = Matern([0.3] * dimensions, (0.01, 10.0), nu=2.5)
        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * lengths + WhiteKernel(1e-3, (1e-6, 1.0))
        return GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)

    return build


def _most_promising(
    process: Callable[[int], Any],
    tried: Sequence[tuple[Schedule, float]],
    candidates: Sequence[Schedule],
    ranges: Mapping[str, tuple[float, float]],
) -> int:
    """Return the index of the candidate with the largest expected improvement over the best value so far."""

    def numbers(schedule: Schedule) -> list[float]:
        scaled = [(schedule.options[name] - low) / (high - low) for name, (low, high) in ranges.items()]
        return [*schedule.shares[:-1], *scaled]

    known_EU, new_CU = [numbers(schedule) for schedule, _ in tried], [numbers(schedule) for schedule in candidates]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a length at its bound: that number does not matter
        fitted = process(len(new_CU[0])).fit(known_EU, [value for _, value in tried])
    mean_C, deviation_C = (torch.as_tensor(x) for x in fitted.predict(new_CU, return_std=True))
    return int(expected_improvement(mean_C, deviation_C, max(value for _, value in tried)).argmax())


def expected_improvement(mean_C: Tensor, deviation_C: Tensor, best: float) -> Tensor:
    """Return the expected improvement [C] of normally distributed values over the best one, higher is better."""
    gain_C, deviation_C = mean_C - best, deviation_C.clamp_min(1e-12)
    scaled_C = gain_C / deviation_C
    density_C = torch.exp(-0.5 * scaled_C**2) / (2 * torch.pi) ** 0.5
    return gain_C * torch.special.ndtr(scaled_C) + deviation_C * density_C


def _near(
    best: Schedule,
    spread: float | None,
    depth: int,
    budget: float,
    tokens: int | None,
    ranges: Mapping[str, tuple[float, float]],
    draw: random.Random,
) -> Schedule:
    """Draw a random schedule with the given budget: around the best one, or anywhere if `spread` is None."""
    spans = [end - start for start, end in zip((0, *best.layers), (*best.layers, depth), strict=True)]
    left, least, shares = budget * depth, LEAST if tokens is None else 1 / tokens, [1.0]
    for index, span in enumerate(spans):
        later = sum(spans[index + 1 :])
        high = min(shares[-1], (left - least * later) / span)
        low = min(left / (span + later), high)  # later shares are at most this one
        if spread is None:
            share = draw.uniform(low, high)
        else:
            share = _mirrored(min(max(best.shares[index], low), high) + draw.gauss(0, spread), low, high)
        if tokens is not None:
            most = math.floor(high * tokens + 1e-6)
            share = min(max(round(share * tokens), math.ceil(low * tokens - 1e-6)), most) / tokens
        shares.append(share)
        left -= share * span
    options = {}
    for name, (low, high) in ranges.items():
        moved = best.options[name] + draw.gauss(0, (spread or 0) * (high - low))
        options[name] = draw.uniform(low, high) if spread is None else min(max(moved, low), high)
    return Schedule(best.layers, tuple(shares[1:]), options)


def _mirrored(value: float, low: float, high: float) -> float:
    """Return the value, mirrored at the ends of the range until it is in it."""
    if low >= high:
        return high
    beyond = (value - low) % (2 * (high - low))
    return low + min(beyond, 2 * (high - low) - beyond)
