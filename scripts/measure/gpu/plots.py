"""The plots of a GPU report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from cogvla.policy.cost.timing import Measured, Peaks
from cogvla.scripts.measure.gpu.journal import Journal, Row
from cogvla.scripts.measure.roofline_plot import draw_roofline

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def draw(journal: Journal, folder: Path) -> None:
    """Write a plot for each part that has rows to draw."""
    latency = journal.rows("latency")
    for preset in dict.fromkeys(row["preset"] for row in latency):
        rows = [row for row in latency if row["preset"] == preset]
        _save(folder / f"latency_{preset}.png", _bars, [row for row in rows if row["batch"] == 1], "p50", "ms, batch 1")
        _save(folder / f"roofline_{preset}.png", _roofline, rows)
    if training := journal.rows("training"):
        named = [{**row, "row": f"{row['row']}, checkpointing {row['checkpointing']}"} for row in training]
        _save(folder / "training.png", _bars, named, "samples_per_s", "samples/s")
    if learning := journal.rows("learning"):
        _save(folder / "learning.png", _curves, learning)


def _save(path: Path, draw_axes: Any, *given: Any) -> None:
    figure, axes = plt.subplots(figsize=(8, 5))
    draw_axes(axes, *given)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[Row], key: str, label: str) -> None:
    bars = axes.barh([row["row"] for row in rows], [row[key] for row in rows])
    axes.bar_label(bars, fmt="%.3g")
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _curves(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        axes.plot(*zip(*row["curve"], strict=True), label=row["row"])
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss")
    axes.legend()


def _roofline(axes: Any, rows: Sequence[Row]) -> None:
    names = Measured.__dataclass_fields__
    measured = [
        Measured(**{**{name: row[name] for name in names}, "row": row["variant"], "peaks": Peaks(**row["peaks"])})
        for row in rows
    ]
    draw_roofline(axes, measured)
