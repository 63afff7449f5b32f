"""`fit_foresight` and `calibrate_monitor` for the tabletop arm, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cogvla.envs.recording.recorder import record
from cogvla.scripts.command import compose
from cogvla.scripts.foresight import calibrate_monitor, fit_foresight
from cogvla.tests.support.paths import SHIPPED

STEPS = 100


def recorded(root: Path) -> Path:
    """Ten episodes of the expert in `demonstrations` of a folder; the folder."""
    record("tabletop_object", 10, root / "demonstrations", workers=0)
    return root


def fitting(root: Path, output: Path) -> list[str]:
    """The command line of a fit to `recorded(root)`."""
    return [
        f"data.root={root}/demonstrations",
        f"data.cache={root}/cache",
        f"output={output}",
        f"steps={STEPS}",
        "batch_size=8",
        "save_every=10",
        "threads=1",
    ]


def fit(root: Path, output: Path, *more: str) -> dict[str, Any]:
    return fit_foresight.run(compose("fit_foresight", [*fitting(root, output), *more]), "fit_foresight")


def calibrate(folder: Path, *more: str) -> dict[str, Any]:
    """Thresholds from ten roll-outs of the shipped policy."""
    overrides = [
        f"foresight={folder}",
        f"checkpoint={SHIPPED}",
        "episodes=14",
        "alpha=0.9",
        "measured=0",
        "workers=0",
        "threads=1",
        "device=cpu",
    ]
    return calibrate_monitor.run(compose("calibrate_monitor", [*overrides, *more]), "calibrate_monitor")
