"""The page of the robustness benchmark: success in each perturbed cell against the clean run, episode by episode."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogvla.envs.contract import Perturbable, required
from cogvla.envs.evaluation.report import Report, template
from cogvla.envs.evaluation.statistics import Rate, sign_test
from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, OF_THE_PLAYER, Perturbation
from cogvla.envs.perturbation.sensor import Sensor
from cogvla.envs.suite import Suite
from cogvla.files import write_atomic

CLEAN = "clean"
PICTURE_SIZE = 128


@dataclass(frozen=True)
class Cell:
    """One cell against the clean run, over the episodes that both have played.

    Attributes:
        perturbation: dimension and level.
        success: success rate of the cell.
        difference: success rate minus that of the same episodes in the clean run.
        won, lost: episodes that succeed only in the cell, and only in the clean run.
        p: two-sided p-value of the sign test of these episodes.
        errors: episodes without a result.
    """

    perturbation: Perturbation
    success: Rate
    difference: float | None
    won: int
    lost: int
    p: float
    errors: int


@dataclass(frozen=True)
class Robustness:
    """The benchmark of one suite.

    Attributes:
        suite: name of the suite.
        clean: success rate without perturbation.
        cells: the cells that were played.
        levels: level -> mean success over its dimensions, each with the same weight.
        dimensions: dimension -> mean success over its levels.
        mean: mean success over all cells.
        reproduce: that of the clean report.
    """

    suite: str
    clean: Rate
    cells: tuple[Cell, ...]
    levels: Mapping[int, float | None]
    dimensions: Mapping[str, float | None]
    mean: float | None
    reproduce: Mapping[str, Any]

    def cell(self, dimension: str, level: int) -> Cell | None:
        """Return a cell; None: it was not played."""
        return next((c for c in self.cells if c.perturbation == Perturbation(dimension, level)), None)


def chosen_cells(name: str, level: int | None, suite: Suite) -> list[Perturbation]:
    """Return the cells that a command asks for.

    Args:
        name: a dimension, or `all`: those that the suite supports.
        level: a level; None: all.
        suite: the suite.

    Raises:
        ValueError: there is no such dimension or level, or the suite does not support it.
    """
    dimensions = [d for d in DIMENSIONS if d in suite.perturbations] if name == "all" else [name]
    cells = [Perturbation(d, each) for d in dimensions for each in (LEVELS if level is None else (level,))]
    for cell in cells:
        suite.magnitudes(cell)
    return cells


def compare(clean: Report, perturbed: Mapping[Perturbation, Report]) -> Robustness:
    """Compare reports of cells with that of the clean run."""
    before = {(e.task, e.initial_state): e.success for e in clean.episodes if e.error is None}
    cells = []
    for perturbation, report in perturbed.items():
        played = [(e.success, before.get((e.task, e.initial_state))) for e in report.episodes if e.error is None]
        pairs = [(now, then) for now, then in played if then is not None]
        won, lost = sum(now and not then for now, then in pairs), sum(then and not now for now, then in pairs)
        difference = (won - lost) / len(pairs) if pairs else None
        cells.append(
            Cell(perturbation, report.total.success, difference, won, lost, sign_test(won, lost), report.total.errors)
        )
    levels = {level: _mean([c for c in cells if c.perturbation.level == level]) for level in LEVELS}
    dimensions = {name: _mean([c for c in cells if c.perturbation.dimension == name]) for name in DIMENSIONS}
    return Robustness(clean.suite, clean.total.success, tuple(cells), levels, dimensions, _mean(cells), clean.reproduce)


def _mean(cells: list[Cell]) -> float | None:
    values = [cell.success.value for cell in cells if cell.success.value is not None]
    return float(np.mean(values)) if values else None


def table(found: Robustness) -> str:
    """Return the benchmark as a table of text: a row for each dimension, a column for each level."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f} %"

    rows = [["", *(f"level {level}" for level in LEVELS), "mean"]]
    for name in DIMENSIONS:
        cells = [found.cell(name, level) for level in LEVELS]
        if any(cells):
            values = [share(cell.success.value if cell else None) for cell in cells]
            rows.append([name, *values, share(found.dimensions[name])])
    rows.append(["mean", *(share(found.levels[level]) for level in LEVELS), share(found.mean)])
    head = f"{found.suite}: clean {share(found.clean.value)} of {found.clean.trials} episodes"
    return "\n".join([head, *("  ".join(f"{text:>10}" for text in row) for row in rows)])


def write_page(found: Robustness, suite: Suite, output: Path, folders: Mapping[str, str]) -> Path:
    """Write `NAME_robustness.html`, with a picture of each cell, and `.json`; return the path of the page.

    Args:
        found: the benchmark.
        suite: the suite, which renders the pictures.
        output: folder of the files.
        folders: name of a cell, and `clean` -> folder of its report, relative to `output`.
    """
    pictures = _pictures(suite, [cell.perturbation for cell in found.cells])
    body = {
        "suite": found.suite,
        "clean": asdict(found.clean),
        "cells": [asdict(cell) for cell in found.cells],
        "levels": found.levels,
        "dimensions": found.dimensions,
        "mean": found.mean,
        "reproduce": found.reproduce,
    }
    write_atomic(output / f"{found.suite}_robustness.json", json.dumps(body, indent=1, default=str) + "\n")
    page = output / f"{found.suite}_robustness.html"
    shown = {"found": found, "pictures": pictures, "folders": folders, "dimensions": DIMENSIONS, "levels": LEVELS}
    write_atomic(page, template("robustness.html.j2").render(shown))
    return page


def _pictures(suite: Suite, cells: list[Perturbation]) -> dict[str, bytes]:
    """Return the first image of each cell, and of the clean run, as PNG: agentview and wrist of task 0, state 0."""
    env: Any = suite.make(image_size=PICTURE_SIZE)
    pictures = {}
    try:
        for cell in (None, *cells):
            changes_scene = cell is not None and cell.dimension not in OF_THE_PLAYER
            if changes_scene or set(suite.perturbations) - set(OF_THE_PLAYER):
                required(env, Perturbable, "perturbation").perturbation = cell if changes_scene else None
            observation, _ = env.reset(options={"task": 0, "initial_state": 0})
            images = {name: observation[name] for name in ("agentview", "wrist")}
            if cell is not None and cell.dimension == "sensor":
                images = Sensor(cell.level, cell.seed(suite.name, 0, 0), 0)(images, 0)
            buffer = io.BytesIO()
            Image.fromarray(np.concatenate(list(images.values()), axis=1)).save(buffer, "PNG")
            pictures[CLEAN if cell is None else str(cell)] = buffer.getvalue()
    finally:
        env.close()
    return pictures
