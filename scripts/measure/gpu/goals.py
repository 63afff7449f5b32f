"""Goals of a GPU report, and published numbers to stand beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows with numbers, by part."""


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Attributes:
        text: what is measured.
        bound: the goal.
        unit: its unit.
        at_most: the goal is an upper bound; False: a lower bound.
        find: function that returns the measured number from the rows; None: not measured.
    """

    text: str
    bound: float
    unit: str
    at_most: bool
    find: Callable[[Rows], float | None]

    def reached(self, found: float) -> bool:
        """Return whether a number reaches the goal."""
        return found <= self.bound if self.at_most else found >= self.bound


def milliseconds(rows: Rows, preset: str, *variants: str) -> float | None:
    """Return the shortest median at batch 1 among some variants of a preset."""
    found = [
        row["p50"]
        for row in rows.get("latency", ())
        if row["preset"] == preset and row["batch"] == 1 and row["variant"] in variants
    ]
    return min(found, default=None)


def ratio(over: float | None, under: float | None) -> float | None:
    """Return the quotient; None if one of both is missing."""
    return None if over is None or under is None else over / under


def fastest(rows: Rows, variant: str) -> float | None:
    """Return the most training samples per second of 7 B with a variant."""
    training = (row for row in rows.get("training", ()) if row["preset"] == BIG and row["variant"] == variant)
    return max((row["samples_per_s"] for row in training), default=None)


ENGINE = ("drop", "bypass", "faithful, engine")
BIG = "cogvla_7b"
GOALS = (
    Goal("7 B, batch 1, bfloat16", 15, "ms", True, lambda rows: milliseconds(rows, BIG, *ENGINE)),
    Goal("7 B, batch 1, FP8", 10, "ms", True, lambda rows: milliseconds(rows, BIG, "drop, float8")),
    Goal(
        "7 B, batch 1, bfloat16, against the faithful eager pass",
        4,
        "times",
        False,
        lambda rows: ratio(milliseconds(rows, BIG, "faithful"), milliseconds(rows, BIG, *ENGINE)),
    ),
    Goal(
        "7 B, faithful eager pass, against OpenVLA as published (paper: 2.8)",
        2.8,
        "times",
        False,
        lambda rows: ratio(milliseconds(rows, BIG, "OpenVLA as published"), milliseconds(rows, BIG, "faithful")),
    ),
    Goal(
        "7 B, training with LoRA, against all off (paper: 2.5)",
        2.5,
        "times",
        False,
        lambda rows: ratio(fastest(rows, "bypass"), fastest(rows, "all off")),
    ),
    Goal("`small`, batch 1", 5, "ms", True, lambda rows: milliseconds(rows, "small", *ENGINE)),
)
ANCHORS = (
    ("pi0.5, 2 views", "17.6", "RTX 5090, FP8"),
    ("pi0.5, 2 views", "27 to 29", "RTX 4090"),
    ("GR00T N1.7 3 B, 1 view", "27.9", "H100, TensorRT"),
    ("OpenVLA-OFT with ADP", "51.8", "-"),
    ("CogVLA, its paper", "91", "A800"),
    ("CogVLA, lower bound (`count_flops`)", "4.4", "H200"),
)
"""Name, milliseconds at batch 1, machine; by their authors, except the last."""
