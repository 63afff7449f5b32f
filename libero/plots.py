"""The figures of a report, as SVG text. Colours are those of `report.html.j2`."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cogvla.libero.statistics import Rate

GOOD, BAD, ACCENT, SECOND, GRID, TEXT = "#1a9d6b", "#d9534a", "#3461c9", "#b4782a", "#e3e7ee", "#3b4252"


def success_bars(names: Sequence[str], rates: Sequence[Rate]) -> str:
    """One bar per task with its 95 % interval."""
    figure, axes = _figure(7.2, 0.9 + 0.34 * len(names))
    for row, rate in enumerate(rates):
        if rate.value is None or rate.low is None or rate.high is None:
            axes.text(1, row, "no episode", va="center", color=TEXT, fontsize=9)
            continue
        axes.barh(row, 100 * rate.value, height=0.58, color=ACCENT, alpha=0.85)
        axes.plot([100 * rate.low, 100 * rate.high], [row, row], color="#16223f", linewidth=1.6)
        axes.plot([100 * rate.low, 100 * rate.high], [row, row], "|", color="#16223f", markersize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 103)
    axes.set_xlabel("success, %")
    axes.grid(axis="x", color=GRID)
    axes.tick_params(axis="y", length=0)
    return _svg(figure)


def latency_curves(curves: Sequence[tuple[str, Sequence[float]]], budget_ms: float) -> str:
    """The share of chunks that took at most so long, for several kinds of latency, on a logarithmic axis.

    Args:
        curves: name and samples in ms.
        budget_ms: how long a chunk's actions last on the robot.
    """
    figure, axes = _figure(7.2, 3.3)
    for (name, samples), colour in zip(curves, (ACCENT, SECOND, GOOD), strict=False):
        if len(samples):
            axes.step(
                np.sort(samples), 100 * np.arange(1, len(samples) + 1) / len(samples), where="post", color=colour,
                linewidth=1.9, label=name,
            )  # fmt: skip
    axes.axvline(budget_ms, color=BAD, linestyle="--", linewidth=1.2, label=f"a chunk lasts {budget_ms:.0f} ms")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0, 101)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("% of chunks")
    axes.grid(color=GRID)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
    return _svg(figure)


def length_histogram(successes: Sequence[int], failures: Sequence[int], max_steps: int) -> str:
    """Control steps of successes and failures."""
    figure, axes = _figure(7.2, 2.7)
    edges = np.linspace(0, max_steps, 25)
    axes.hist(
        [list(successes), list(failures)], bins=edges.tolist(), stacked=True, color=[GOOD, BAD],
        label=["success", "failure"], rwidth=0.92,
    )  # fmt: skip
    axes.set_xlabel("control steps")
    axes.set_ylabel("episodes")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=GRID)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c4cad6")
    axes.tick_params(colors=TEXT, labelsize=9)
    axes.xaxis.label.set(color=TEXT, fontsize=9)
    axes.yaxis.label.set(color=TEXT, fontsize=9)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
