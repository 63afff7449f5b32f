"""Render a comparison of token routers as one self-contained HTML file, with tables and Pareto plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogvla.envs.analysis.router_comparison import ALL_TOKENS, CONTROLS, CellReport, pareto_front
from cogvla.envs.evaluation.plots import pareto
from cogvla.envs.evaluation.report import template


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
        matrix=_matrix(rows),
        controls=CONTROLS,
        missing=len(rows) - len(played),
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
    by_share: dict[int | float | None, list[CellReport]] = {}
    for row in rows:
        by_share.setdefault(row.cell.router.budget if row.cell.budgeted else None, []).append(row)

    def best_first(row: CellReport) -> tuple[float, float]:
        return (-_value(row) if row.outcome and row.outcome.success.trials else 1.0, row.cost.latency.p50)

    return [Budget(share, tuple(sorted(same, key=best_first))) for share, same in by_share.items()]


def _matrix(rows: Sequence[CellReport]) -> tuple[list[int | float], list[tuple[str, list[CellReport | None]]]]:
    """Return the budgets, and for each router its label and its rows in the order of the budgets."""
    shares = sorted({row.cell.router.budget for row in rows if row.cell.budgeted}, reverse=True)
    lines = []
    for label in dict.fromkeys(row.cell.label for row in rows):
        own = {row.cell.router.budget: row for row in rows if row.cell.label == label and row.cell.budgeted}
        alone = next((row for row in rows if row.cell.label == label and not row.cell.budgeted), None)
        lines.append((label, [own.get(share, alone) for share in shares]))
    return shares, lines
