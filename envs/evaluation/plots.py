"""Draw the figures of a report as SVG text, and one as PNG. The colours are those of `report.html.j2`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD, BAD, ACCENT, SECOND, GRID, TEXT = "#1a9d6b", "#d9534a", "#3461c9", "#b4782a", "#e3e7ee", "#3b4252"

WIDE = 4
"""Ratio of the largest to the smallest cost above which the axis is logarithmic."""


def latency_curves(curves: Sequence[tuple[str, Sequence[float]]], budget_ms: float) -> str:
    """Draw the cumulative distribution of several kinds of latency, on a logarithmic axis.

    Args:
        curves: name and samples in ms of each kind.
        budget_ms: duration of a chunk's actions on the robot.
    """
    figure, axes = _figure(7.2, 3.4)
    for (name, samples), colour in zip(curves, (ACCENT, SECOND, GOOD), strict=False):
        if len(samples):
            axes.step(
                np.sort(samples), 100 * np.arange(1, len(samples) + 1) / len(samples), where="post", color=colour,
                linewidth=1.9, label=name,
            )  # fmt: skip
    axes.axvline(budget_ms, color=BAD, linestyle="--", linewidth=1.2, label=f"duration of a chunk: {budget_ms:.0f} ms")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0, 101)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("% of chunks")
    axes.grid(color=GRID)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
    return _svg(figure)


def length_histogram(successes: Sequence[int], failures: Sequence[int], max_steps: int) -> str:
    """Draw a histogram of the control steps of successes and failures."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(7.2, 3.4)
    edges = np.linspace(0, max_steps, 25)
    axes.hist(
        [list(successes), list(failures)], bins=edges.tolist(), stacked=True, color=[GOOD, BAD],
        label=["success", "failure"], rwidth=0.92,
    )  # fmt: skip
    axes.set_xlabel("control steps")
    axes.set_ylabel("episodes")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="y", color=GRID)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
    return _svg(figure)


def pareto(
    points: Sequence[tuple[str, float, float, float, float]], front: Sequence[int], cost: str, reference: float | None
) -> bytes:
    """Draw success against cost as PNG.

    Args:
        points: name of the router, cost, success, lower and upper end of its interval; rates in [0,1].
        front: indices of the points of the Pareto front, which a line connects.
        cost: label of the cost axis.
        reference: success in [0,1] of the policy with all tokens, drawn as a line; None: no line.
    """
    figure, axes = _figure(7.2, 4.6)
    names = list(dict.fromkeys(name for name, *_ in points))
    for number, name in enumerate(names):
        x, y, low, high = (np.array([p[i] for p in points if p[0] == name]) for i in (1, 2, 3, 4))
        axes.errorbar(
            x, 100 * y, yerr=100 * np.stack([(y - low).clip(0), (high - y).clip(0)]), color=f"C{number % 10}",
            marker="osD^v<>Ph*"[number // 10 % 10], markersize=5, linestyle=":", linewidth=0.8, elinewidth=0.6,
            label=name,
        )  # fmt: skip
    ordered = sorted(front, key=lambda index: points[index][1])
    axes.plot([points[i][1] for i in ordered], [100 * points[i][2] for i in ordered], color=TEXT, linewidth=1.2)
    if reference is not None:
        axes.axhline(100 * reference, color=BAD, linestyle="--", linewidth=1, label="all tokens")
    costs = [x for _, x, *_ in points]
    if max(costs) > WIDE * min(costs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set_ylim(-2, 102)
    axes.set_xlabel(cost)
    axes.set_ylabel("success, %")
    axes.grid(color=GRID, which="both")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def lines(
    curves: Mapping[str, Sequence[float | None]],
    across: str,
    up: str,
    limits: tuple[float, float] | None = None,
    start: int = 1,
) -> str:
    """Draw values against their number, one line for each curve; None values are left out.

    Args:
        curves: name -> values; a curve with an empty name gets no legend.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        limits: lowest and highest value of the vertical axis; None: automatic.
        start: number of the first value.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(5.2, 2.6)
    for number, (name, values) in enumerate(curves.items()):
        known = [(start + index, value) for index, value in enumerate(values) if value is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], "o-", color=f"C{number}", markersize=3, label=name)
    if limits is not None:
        axes.set_ylim(limits[0] - 0.03, limits[1] + 0.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color=GRID)
    if any(curves):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # here, because its import is slow and only the end of an evaluation needs it

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
