"""Render a comparison of token routers as one self-contained HTML file, with tables and Pareto plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogvla.envs.analysis.router_comparison import ALL_TOKENS, CONTROLS, CellReport, pareto_front
from cogvla.envs.evaluation.plots import pareto
from cogvla.envs.evaluation.report import template
from cogvla.envs.evaluation.robustness import CLEAN
from cogvla.envs.evaluation.statistics import Rate


@dataclass(frozen=True)
class Budget:
    """The rows of one budget, the best first; `share` is None for routers without a budget."""

    share: int | float | None
    rows: tuple[CellReport, ...]


def render_comparison(rows: Sequence[CellReport], data: Mapping[str, Any]) -> str:
    """Return the HTML page.

    Args:
        rows: rows of all cells, including those that have not been played.
        data: contents of `comparison.json`.
    """
    played = [row for row in rows if row.outcome is not None and row.outcome.success.value is not None]
    fastest = {row.cell.key for row in _front(played, _milliseconds)}
    return template("routers.html.j2").render(
        data=data,
        budgets=_budgets(rows),
        matrices=_matrices(rows, data["suites"], data["conditions"]),
        controls=CONTROLS,
        missing=sum(len(row.outcomes) < len(data["conditions"]) for row in rows),
        episodes=max((row.outcome.success.trials for row in played if row.outcome), default=0),
        on_front=fastest,
        figures={
            "p50 of a chunk, ms": _figure(played, _milliseconds, "latency per chunk (p50), ms"),
            "GFLOP": _figure(played, _gflop, "GFLOP per chunk, including the router"),
        },
    )


def _milliseconds(row: CellReport) -> float:
    return row.cost.latency.p50


def _gflop(row: CellReport) -> float:
    return row.cost.flops / 1e9


def _value(row: CellReport) -> float:
    assert row.outcome is not None
    assert row.outcome.success.value is not None
    return row.outcome.success.value


def _front(rows: Sequence[CellReport], cost: Any) -> list[CellReport]:
    return [rows[index] for index in pareto_front([(cost(row), _value(row)) for row in rows])]


def _figure(rows: Sequence[CellReport], cost: Any, label: str) -> bytes | None:
    if not rows:
        return None
    points = []
    for row in rows:
        assert row.outcome is not None
        success = row.outcome.success
        points.append((row.cell.label, cost(row), _value(row), success.low or 0.0, success.high or 0.0))
    reference = next((_value(row) for row in rows if row.cell.label == ALL_TOKENS), None)
    return pareto(points, pareto_front([point[1:3] for point in points]), label, reference)


def _budgets(rows: Sequence[CellReport]) -> list[Budget]:
    by_share: dict[str, list[CellReport]] = {}
    for row in rows:
        by_share.setdefault(str(_share(row)), []).append(row)

    def best_first(row: CellReport) -> tuple[float, float]:
        return (-_value(row) if row.outcome and row.outcome.success.trials else 1.0, row.cost.latency.p50)

    return [Budget(_share(same[0]), tuple(sorted(same, key=best_first))) for same in by_share.values()]


def _share(row: CellReport) -> int | float | None:
    """Return the budget of a row, None without one; as text it tells 1, one token, from 1.0, all of them."""
    return row.cell.router.budget if row.cell.budgeted else None


@dataclass(frozen=True)
class Matrix:
    """Success of every router (`lines`, by label) at every budget (`shares`); None: not played."""

    heading: str
    shares: tuple[int | float, ...]
    lines: Mapping[str, Sequence[Rate | None]]


def _matrices(rows: Sequence[CellReport], suites: Sequence[str], conditions: Sequence[str]) -> list[Matrix]:
    """Return the success in all suites together, in each of several suites, and with each perturbation."""
    found = [_matrix(rows, "")]
    if len(suites) > 1:
        found += [_matrix(rows, suite, suite=suite) for suite in suites]
    return found + [_matrix(rows, name, condition=name) for name in conditions if name != CLEAN]


def _matrix(rows: Sequence[CellReport], heading: str, condition: str = CLEAN, suite: str | None = None) -> Matrix:
    known = {str(row.cell.router.budget): row.cell.router.budget for row in rows if row.cell.budgeted}
    shares = sorted(known.values(), reverse=True)
    lines: dict[str, dict[str, Rate]] = {row.cell.label: {} for row in rows}
    for row in rows:
        if (outcome := row.outcomes.get(condition)) is not None:
            rate = outcome.success if suite is None else outcome.of_suite(suite)
            lines[row.cell.label][str(_share(row))] = rate
    table = {label: [found.get(str(share), found.get("None")) for share in shares] for label, found in lines.items()}
    return Matrix(heading, tuple(shares), table)
