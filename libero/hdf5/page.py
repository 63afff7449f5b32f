"""Summarise a conversion, and write the summary as the data set's README.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cogvla.libero.hdf5.jobs import ReplayOutcome

QUANTILES = {"min": 0.0, "q01": 0.01, "median": 0.5, "q99": 0.99, "max": 1.0}
DIMENSIONS = {
    "action": ("x", "y", "z", "turn x", "turn y", "turn z", "gripper"),
    "observation.state": ("x (m)", "y (m)", "z (m)", "axis-angle x", "y", "z", "finger (m)", "finger (m)"),
}


def summary(
    instructions: Sequence[str], outcomes: Sequence[tuple[int, ReplayOutcome]], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return the numbers of a conversion, ready for JSON.

    Args:
        instructions: instructions of all tasks of the suite.
        outcomes: (task, outcome) of every demonstration.
        arrays: feature -> all kept frames [N,D].

    Returns:
        `total` and `tasks`: demonstrations kept and dropped, lengths, no-ops; `features`: ranges and quantiles.
    """
    present = sorted({task for task, _ in outcomes})
    tasks = [
        {"task": task, "instruction": instructions[task], **_counts([o for t, o in outcomes if t == task])}
        for task in present
    ]
    features = {
        name: {
            **{key: np.quantile(values, q, axis=0).tolist() for key, q in QUANTILES.items()},
            "mean": values.mean(axis=0, dtype=np.float64).tolist(),
            "std": values.std(axis=0, dtype=np.float64).tolist(),
        }
        for name, values in arrays.items()
    }
    return {"total": _counts([outcome for _, outcome in outcomes]), "tasks": tasks, "features": features}


def _counts(outcomes: Sequence[ReplayOutcome]) -> dict[str, Any]:
    lengths = [outcome.steps for outcome in outcomes if outcome.kept]
    return {
        "kept": len(lengths),
        "dropped": len(outcomes) - len(lengths),
        "reasons": dict(Counter(outcome.reason for outcome in outcomes if not outcome.kept)),
        "noops": sum(outcome.noops for outcome in outcomes if outcome.kept),
        "frames": sum(lengths),
        "steps": [min(lengths), float(np.median(lengths)), max(lengths)] if lengths else None,
    }


def page(request: Mapping[str, Any], found: Mapping[str, Any], warnings: Sequence[str] = ()) -> str:
    """Return the page in Markdown, from the request of the conversion, its `summary` and warnings."""
    total, simulation = found["total"], request["simulation"]
    lines = [
        f"# {request['suite']}",
        "",
        f"LIBERO's demonstrations as a LeRobotDataset v3. `convert_libero` replayed their {request['replay']} with "
        f"images of {request['image_size']} x {request['image_size']} pixels.",
        "",
        f"{total['kept']} demonstrations with {total['frames']} frames were kept, {total['dropped']} were dropped. "
        + ("No-op steps were kept." if request["keep_noops"] else f"{total['noops']} no-op steps were left out."),
        "",
        "| | task | kept | dropped | frames | steps min / median / max | no-ops |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['task']} | {row['instruction']} | {row['kept']} | {row['dropped']} | {row['frames']} | "
        f"{_steps(row['steps'])} | {row['noops']} |"
        for row in found["tasks"]
    ]
    if warnings:
        lines += ["", "Warnings:", "", *(f"- {warning}" for warning in warnings)]
    if total["reasons"]:
        lines += ["", "Dropped:", ""]
        lines += [f"- {count}: {reason}" for reason, count in sorted(total["reasons"].items())]
    for name, values in found["features"].items():
        lines += ["", f"## `{name}`", "", "| | min | q01 | median | q99 | max | mean | std |", "|---" * 8 + "|"]
        for index, dimension in enumerate(DIMENSIONS[name]):
            numbers = [values[key][index] for key in (*QUANTILES, "mean", "std")]
            lines.append(f"| {dimension} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |")
    lines += ["", "## Simulation", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in simulation.items()]
    lines += [
        "",
        "Images are rotated by 180 degrees from robosuite's images. Gripper actions: -1 opens, +1 closes. States are "
        "position, axis-angle and two finger joints. `meta/conversion.json` holds these numbers and the source of each "
        "episode; `meta/initial_states.json` holds the initial state of each episode, to play it again.",
    ]
    return "\n".join(lines) + "\n"


def _steps(steps: Sequence[float] | None) -> str:
    return "-" if steps is None else " / ".join(f"{value:.0f}" for value in steps)
