"""Compare token routers: the cells to play, their cost, and their results against each other.

All routers play the same episodes. Two routers are compared episode by episode (`against`), which needs far fewer
episodes than a comparison of two rates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvla.configs.build import build
from cogvla.envs.contract import picture
from cogvla.envs.evaluation.robustness import CLEAN
from cogvla.envs.evaluation.statistics import Latency, Rate, latency, sign_test, success_rate
from cogvla.envs.suite import Suite
from cogvla.policy.cost.flops import REPEATED, count_flops
from cogvla.policy.engine.engine import Engine, starting
from cogvla.policy.interface import Embodiment, Observation
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.heads.committed import none_committed
from cogvla.policy.model.routers.policy_router import PolicyRouter
from cogvla.policy.model.stopwatch import Stopwatch
from cogvla.policy.policy import CogVLAPolicy
from cogvla.routing.registry import registered_routers
from cogvla.routing.router import RouterConfig

CONTROLS = ("random", "spatial_pool")
"""Baselines that every router is compared with."""
ALL_TOKENS = "identity"
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"name": "diversity", "options": {"variant": "maxsum"}},
    {"name": "semantic_tokens", "options": {"variant": "free"}},
)
"""Routers to compare, in addition to every router with its defaults."""
ROUNDS = 5
"""Rounds of timing. Routers take turns, so that a busy minute of the machine does not affect one router only."""
ROUTER_CALLS = 4
"""Timed calls of each round for the router's own part."""


@dataclass(frozen=True)
class Cell:
    """One router at one budget.

    Attributes:
        label: label of the router in tables: its name and options.
        router: configuration of the router.
        budgeted: False if the budget changes nothing, as for `identity`.
    """

    label: str
    router: RouterConfig
    budgeted: bool = True

    @property
    def key(self) -> str:
        """The name of the cell's folder."""
        safe = "".join(letter if letter.isalnum() or letter in "_-." else "_" for letter in self.label)
        return f"{safe}_{self.router.budget}" if self.budgeted else safe


@dataclass(frozen=True)
class Cost:
    """Cost of a chunk at batch size 1 with a known instruction.

    Attributes:
        latency: latency of `Policy.act`.
        router_ms: median time of the router in ms, including everything that is computed only for it; without the
            engine, which runs it together with the rest.
        flops: FLOPs of one pass, as torch counts its matrix products, including those of the router.
        router_flops: FLOPs of the router, including everything that is computed only for it.
        tokens: number of vision tokens that enter the language model.
    """

    latency: Latency
    router_ms: float
    flops: int
    router_flops: int
    tokens: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cost:
        return cls(**{**values, "latency": Latency(**values["latency"])})


@dataclass(frozen=True)
class CellOutcome:
    """Results of a cell's episodes in one condition: as they are, or with a perturbation.

    Attributes:
        success: success rate of all episodes.
        errors: number of episodes that could not be played.
        episodes: "suite/task/initial state" -> success.
    """

    success: Rate
    errors: int
    episodes: Mapping[str, bool]

    def of_suite(self, suite: str) -> Rate:
        """Return the success rate of a suite's episodes."""
        return success_rate(solved for key, solved in self.episodes.items() if key.startswith(f"{suite}/"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellOutcome:
        return cls(**{**values, "success": Rate(**values["success"])})


@dataclass(frozen=True)
class Paired:
    """Comparison of two cells: episodes that only the first (wins) or the second (losses) solved, and a sign test."""

    wins: int
    losses: int
    p: float


def against(outcome: CellOutcome, other: CellOutcome) -> Paired:
    """Compare two outcomes, over the episodes that both have played."""
    both = [(outcome.episodes[key], other.episodes[key]) for key in outcome.episodes if key in other.episodes]
    wins, losses = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
    return Paired(wins, losses, sign_test(wins, losses))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto front of points (cost, success).

    No other point is at least as good in both numbers and better in one.
    """

    def dominated(index: int) -> bool:
        cost, success = points[index]
        return any(c <= cost and s >= success and (c < cost or s > success) for c, s in points)

    return [index for index in range(len(points)) if not dominated(index)]


def wanted_routers(names: Sequence[str | Mapping[str, Any]] | None, layer: int) -> dict[str, RouterConfig]:
    """Return label -> router without its budget.

    Args:
        names: names, or values of `RouterConfig` without a budget; None: all registered routers, and `VARIANTS`.
        layer: language layer for routers that work only in a language layer.

    Raises:
        ValueError: a name or value is unknown, a router is listed twice, or has a budget.
    """
    found: dict[str, RouterConfig] = {}
    known = registered_routers()
    items: Sequence[str | Mapping[str, Any]] = (*known, *VARIANTS) if names is None else names
    if isinstance(names, str | Mapping):
        items = [names]
    if not items:
        raise ValueError("routers is empty; give names, or leave it out for all")
    for item in items:
        values: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"name": item}
        name = values.get("name")
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"routers names {name!r}; possible are {', '.join(known)}")
        if "budget" in values:
            raise ValueError(
                f"routers gives {name!r} a budget: every router is played with all `budgets`, so remove it"
            )
        if known[name].stages == ("llm_layer",) and values.get("stage") in (None, "llm_layer"):
            values = {"layers": (layer,), **values}
        router = build(RouterConfig, values, "routers")
        shown = {k: v for k, v in values.items() if k not in ("name", "options")} | dict(router.options or {})
        label = " ".join([name, *(f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in shown.items())])
        if label in found:
            raise ValueError(f"routers names {label!r} twice")
        found[label] = router
    return found


def cells_for(
    model: CogVLA, routers: Mapping[str, RouterConfig], budgets: Sequence[int | float], trained: bool
) -> tuple[list[Cell], dict[str, str]]:
    """Return the cells that this policy can play, ordered by budget, and router -> reason for those left out.

    Args:
        model: model without a router.
        routers: label -> router.
        budgets: budgets for each router.
        trained: True if routers are trained first, so that routers with weights can be compared.
    """
    cells: list[tuple[int, Cell]] = []  # with the number of the budget
    left_out: dict[str, str] = {}
    for label, router in routers.items():
        built: list[tuple[int, PolicyRouter]] = []
        refused: dict[str, str] = {}
        for number, budget in enumerate(budgets):
            try:
                built.append((number, _built(model, replace(router, budget=budget))))
            except ValueError as error:
                refused[f"{label} at {budget}"] = str(error)
        left_out |= refused if built else {label: next(iter(refused.values()))}
        if not trained and any(list(one.parameters()) for _, one in built):
            left_out[label] = "has weights of its own, which only regime=fine_tuned trains"
            continue
        whole = replace(router, budget=1.0)
        if label == ALL_TOKENS or (len(built) > 1 and _all_leave_as_many(model, whole, [one for _, one in built])):
            cells.append((-1, Cell(label, whole, budgeted=False)))
            continue
        first: dict[tuple[int, ...], int | float] = {}
        for number, one in built:
            budget = budgets[number]
            if _kept(one) in first:
                left_out[f"{label} at {budget}"] = f"leaves as many tokens as at {first[_kept(one)]}"
            else:
                first[_kept(one)] = budget
                cells.append((number, Cell(label, replace(router, budget=budget))))
    return [cell for _, cell in sorted(cells, key=lambda each: each[0])], left_out


def _all_leave_as_many(model: CogVLA, whole: RouterConfig, built: Sequence[PolicyRouter]) -> bool:
    """Return whether these routers leave as many tokens as one with the whole budget."""
    try:
        everything = _kept(_built(model, whole))
    except ValueError:  # it does not support this budget
        return False
    return all(_kept(one) == everything for one in built)


def _built(model: CogVLA, config: RouterConfig) -> PolicyRouter:
    router = model.with_router(config).router
    assert router is not None, "it has a name"
    return router


def _kept(router: PolicyRouter) -> tuple[int, ...]:
    """Return the numbers of tokens that enter the language model, and that each router in it leaves."""
    return (router.tokens, *router.left.values())


def first_observations(suite: Suite, embodiment: Embodiment, count: int) -> list[Observation]:
    """Return the first observation of each of the first `count` tasks, batch size 1.

    Raises:
        ValueError: the suite lacks a camera.
    """
    size = max(max(camera.height, camera.width) for camera in embodiment.cameras)
    env, observations = suite.make(image_size=size), []
    try:
        for task in range(min(count, len(suite.tasks))):
            seen, info = env.reset(seed=0, options={"task": task, "initial_state": 0})
            if missing := [name for name in embodiment.camera_names if name not in seen]:
                there = ", ".join(name for name in seen if name != "state")
                raise ValueError(
                    f"the policy sees {', '.join(missing)}, and suite {suite.name!r} has {there}: choose another suite"
                )
            images = {name: picture(seen, name)[None] for name in embodiment.camera_names}
            observations.append(Observation(images, np.asarray(seen["state"])[None], [str(info["instruction"])]))
    finally:
        env.close()
    return observations


def costs(
    policy: CogVLAPolicy, cells: Sequence[Cell], observations: Sequence[Observation], calls: int
) -> dict[str, Cost]:
    """Measure the cost of all cells in turns; return key of the cell -> cost.

    Args:
        policy: policy without a router, whose weights all cells share; with an engine, or without.
            Times do not depend on weights.
        cells: the cells to measure.
        observations: observations to use in turns.
        calls: least number of timed calls of each cell; rounded up to whole rounds.
    """
    plain = {
        cell.key: CogVLAPolicy(policy.model.with_router(cell.router).eval(), policy.preprocessor) for cell in cells
    }
    routed = {key: _in_engine(each, policy.engine) for key, each in plain.items()}
    stopwatch = Stopwatch()
    samples: dict[str, list[float]] = {key: [] for key in plain}
    own: dict[str, list[float]] = {key: [] for key in plain}
    for key, each in routed.items():
        each.warm_up(1, [observation.instruction[0] for observation in observations])
        plain[key].reset()
    for _ in range(ROUNDS):
        for key in plain:
            for call in range(-1, math.ceil(calls / ROUNDS)):
                started = time.perf_counter()
                routed[key].act(observations[0])
                if call >= 0:  # the first call has other weights in the cache, and a new instruction
                    samples[key].append(1e3 * (time.perf_counter() - started))
            router = plain[key].model.router
            assert router is not None
            usual, router.stopwatch = router.stopwatch, stopwatch  # only now: it waits for a GPU
            for call in range(-1, ROUTER_CALLS):
                stopwatch.seconds = 0.0
                plain[key].act(observations[0])
                if call >= 0:
                    own[key].append(1e3 * stopwatch.seconds)
            router.stopwatch = usual
        observations = [*observations[1:], observations[0]]
    found: dict[str, Cost] = {}
    for cell in cells:
        each, spent = plain[cell.key], latency(samples[cell.key])
        assert spent is not None, "at least one call was timed"
        flops, without = _flops(each, observations[0])
        router = each.model.router
        assert router is not None
        found[cell.key] = Cost(spent, float(np.median(own[cell.key])), flops, max(flops - without, 0), router.tokens)
    return found


def _in_engine(policy: CogVLAPolicy, engine: Engine | None) -> CogVLAPolicy:
    """Return the policy with this engine of the same model without a router; None: without an engine."""
    if engine is None:
        return policy
    with torch.inference_mode():
        return CogVLAPolicy(policy.model, policy.preprocessor, engine=engine.with_router(policy.model))


@torch.no_grad()
def _flops(policy: CogVLAPolicy, observation: Observation) -> tuple[int, int]:
    """Return the FLOPs of a pass with a known instruction: as torch counts them, and without those of the router."""
    model = policy.model
    inputs = starting(model, policy.preprocessor.observation(observation))
    if model.committed is not None:  # `count_flops` counts this input, too
        robot = model.embodiment
        inputs = replace(inputs, committed=none_committed(1, robot.chunk, robot.action_dim, inputs.state.device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # torch's counter fails for modules with parameters that need gradients
        parameter.requires_grad_(False)
    # torch's counter knows the unfused attention, but not the fused one for CPUs.
    with sdpa_kernel(SDPBackend.MATH):
        text = model.encode_text(inputs.text_ids, inputs.text_mask)
        with FlopCounterMode(display=False) as counter:
            model(inputs, text)
    for parameter in trained:
        parameter.requires_grad_(True)
    rows = count_flops(model.config, model.embodiment, inputs.text_ids.shape[1])
    (known,) = (row for row in rows if row.stage == REPEATED)
    return counter.get_total_flops(), known.flops


@dataclass(frozen=True)
class CellReport:
    """A line of the table: a cell with its cost and results.

    Attributes:
        outcomes: condition -> outcome, of those that have been played.
        controls: condition -> label of a control -> comparison with it at the same budget.
    """

    cell: Cell
    cost: Cost
    outcomes: Mapping[str, CellOutcome]
    controls: Mapping[str, Mapping[str, Paired]]

    @property
    def outcome(self) -> CellOutcome | None:
        """Outcome without a perturbation; None: it has not been played."""
        return self.outcomes.get(CLEAN)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return {
            "label": self.cell.label, "key": self.cell.key, "budgeted": self.cell.budgeted,
            "router": asdict(self.cell.router), "cost": asdict(self.cost),
            "outcomes": {name: asdict(each) for name, each in self.outcomes.items()},
            "against": {
                name: {label: asdict(each) for label, each in paired.items()} for name, paired in self.controls.items()
            },
        }  # fmt: skip


def rows(
    cells: Sequence[Cell], cost: Mapping[str, Cost], outcomes: Mapping[str, Mapping[str, CellOutcome]]
) -> list[CellReport]:
    """Build the table. Each cell is compared with `CONTROLS` at the same budget.

    Args:
        cells: the cells.
        cost: key of a cell -> cost.
        outcomes: key of a cell -> condition -> outcome, of what has been played.
    """
    table = []
    for cell in cells:
        others = [  # at the same budget: 1 is one token, 1.0 all of them
            other
            for other in cells
            if other.label in CONTROLS
            and other.label != cell.label
            and str(other.router.budget) == str(cell.router.budget)
        ]
        controls = {
            condition: {
                other.label: against(outcome, outcomes[other.key][condition])
                for other in others
                if cell.budgeted and condition in outcomes[other.key]
            }
            for condition, outcome in outcomes[cell.key].items()
        }
        table.append(CellReport(cell, cost[cell.key], outcomes[cell.key], controls))
    return table
