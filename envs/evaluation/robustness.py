"""The page of the robustness benchmark: success in each perturbed cell against the clean run, episode by episode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogvla.envs.evaluation.episode_log import EPISODES, REPORT, RUN, check_simulators, read_episodes, read_run
from cogvla.envs.evaluation.perturbed import PICTURE
from cogvla.envs.evaluation.report import Report, build_report, template
from cogvla.envs.evaluation.statistics import Rate, sign_test
from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, Perturbation
from cogvla.envs.suite import Suite
from cogvla.files import write_atomic

CLEAN = "clean"
BODY = REPORT[1]


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
        instruction: what the policy was told in the first episode.
    """

    perturbation: Perturbation
    success: Rate
    difference: float | None
    won: int
    lost: int
    p: float
    errors: int
    instruction: str


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

    @property
    def drop(self) -> float | None:
        """Success without perturbation minus the mean of all cells."""
        return None if self.mean is None or self.clean.value is None else self.clean.value - self.mean

    def cell(self, dimension: str, level: int) -> Cell | None:
        """Return a cell; None: it was not played."""
        return next((c for c in self.cells if c.perturbation == Perturbation(dimension, level)), None)


def chosen_cells(
    names: str | Sequence[str] | None, levels: int | Sequence[int] | None, suite: Suite
) -> list[Perturbation]:
    """Return the cells that a command asks for.

    Args:
        names: a dimension or a list of them, or `all`: those that the suite supports; None: no cells.
        levels: a level or a list of them; None: all.
        suite: the suite.

    Raises:
        ValueError: there is no such dimension or level, the suite does not support it, or there are levels alone.
    """
    if names is None:
        if levels is not None:
            raise ValueError("level= needs perturbation=NAME, or perturbation=all")
        return []
    chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if "all" in chosen:
        chosen = [name for name in DIMENSIONS if name in suite.perturbations]
    wanted = LEVELS if levels is None else levels if isinstance(levels, list | tuple) else [levels]
    cells = [Perturbation(name, level) for name in chosen for level in dict.fromkeys(wanted)]
    if not cells:
        raise ValueError("perturbation and level must not be empty lists")
    for cell in cells:
        suite.magnitudes(cell)
    return cells


def finished_cells(clean: Report, suite: Suite, output: Path) -> dict[Perturbation, Report]:
    """Return the cells in `output` that are finished and were played as the clean run there, over its episodes.

    A note names the cells that are there and are not such ones.
    """
    fingerprint, sessions = read_run(output / suite.name)
    keys = [(episode.task, episode.initial_state) for episode in clean.episodes]
    found = {}
    for cell in chosen_cells("all", None, suite):
        folder = output / f"{suite.name}_{cell}"
        if not (folder / RUN).exists():
            continue
        expected = fingerprint | {"perturbation": {"cell": str(cell), **suite.magnitudes(cell)}}
        try:
            theirs, their_sessions = read_run(folder)
            check_simulators([*sessions, *their_sessions], "")
            results, body = read_episodes(folder / EPISODES), json.loads((folder / BODY).read_text())
            fits = theirs == json.loads(json.dumps(expected, default=str)) and results.keys() >= set(keys)
        except (ValueError, OSError):
            fits = False
        if not fits:
            print(
                f"note: {cell} is not on the page of {suite.name}: it was played otherwise or lacks episodes of the "
                f"clean run; perturbation={cell.dimension} level={cell.level} plays them or says what is different"
            )
            continue
        rules = body["reproduce"]["protocol"]
        hz = 1000 * rules["execute_steps"] / clean.chunk_ms
        found[cell] = build_report(suite, [results[key] for key in keys], body["batch_1_ms"], hz, body["reproduce"])
    return found


def compare(clean: Report, perturbed: Mapping[Perturbation, Report]) -> Robustness:
    """Compare reports of cells with that of the clean run."""
    before = {(e.task, e.initial_state): e.success for e in clean.episodes if e.error is None}
    cells = []
    for perturbation, report in perturbed.items():
        played = [(e.success, before.get((e.task, e.initial_state))) for e in report.episodes if e.error is None]
        pairs = [(now, then) for now, then in played if then is not None]
        won, lost = sum(now and not then for now, then in pairs), sum(then and not now for now, then in pairs)
        difference = (won - lost) / len(pairs) if pairs else None
        total, told = report.total, next((e.instruction for e in report.episodes if e.instruction), "")
        cells.append(Cell(perturbation, total.success, difference, won, lost, sign_test(won, lost), total.errors, told))
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


def write_page(found: Robustness, output: Path, folders: Mapping[str, str]) -> Path:
    """Write `NAME_robustness.html`, with a picture of each cell, and `.json`; return the path of the page.

    Args:
        found: the benchmark.
        output: folder of the files.
        folders: name of a cell, and `clean` -> folder of its report and picture, relative to `output`.
    """
    files = {str(cell.perturbation): output / folders[str(cell.perturbation)] / PICTURE for cell in found.cells}
    pictures = {name: file.read_bytes() for name, file in files.items() if file.exists()}
    body = {
        "suite": found.suite,
        "clean": asdict(found.clean),
        "cells": [asdict(cell) for cell in found.cells],
        "levels": found.levels,
        "dimensions": found.dimensions,
        "mean": found.mean,
        "drop": found.drop,
        "reproduce": found.reproduce,
    }
    write_atomic(output / f"{found.suite}_robustness.json", json.dumps(body, indent=1, default=str) + "\n")
    page = output / f"{found.suite}_robustness.html"
    shown = {"found": found, "pictures": pictures, "folders": folders, "dimensions": DIMENSIONS, "levels": LEVELS}
    write_atomic(page, template("robustness.html.j2").render(shown))
    return page
