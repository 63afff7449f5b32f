"""`analyse_foresight`: show what foresight predicts beside what the cameras showed.

    analyse_foresight foresight=outputs/foresight/tabletop_object
    analyse_foresight foresight=FOLDER data.root=FOLDER

Writes `foresight.html`, a self-contained page with pictures, and `predictions.json` with its numbers. On the data that
the model was fitted to, only held-out episodes are shown.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.analysis.foresight_page import choose, page
from cogvla.files import write_atomic
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.foresight.fitting import FittingConfig
from cogvla.policy.foresight.measure import measure
from cogvla.policy.foresight.model import load_foresight
from cogvla.policy.foresight.monitored_policy import find_foresight
from cogvla.policy.foresight.windows import Windows
from cogvla.policy.provenance import provenance
from cogvla.policy.threads import use_threads
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, plain

DATA, PAGE = "predictions.json", "foresight.html"


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("analyse_foresight"))


def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Measure and draw; write page and numbers, and return the content of `predictions.json`.

    Raises:
        ValueError: there is no foresight, or the data do not fit it.
        OSError: something cannot be written.
    """
    values = plain(config)
    if values["pictures"] < 1:
        raise ValueError(f"pictures must be at least 1, got {values['pictures']}")
    use_threads(values["threads"])
    model, about = load_foresight(find_foresight(Path(values["foresight"])))
    data = open_data(replace(build(DataConfig, values["data"], "data"), labels={}, intervention=None), model.embodiment)
    for note in data.notes:
        print(f"note: {note}")
    fitted = json.dumps(data.describe(), default=str) == json.dumps(about.get("data_set"), default=str)
    if fitted:
        fraction = about.get("validation_fraction", FittingConfig().validation_fraction)
        data = data.split(fraction, about["seed"])[1]
    windows = Windows(data)
    found = {
        "command": command,
        "robot": model.embodiment.name,
        "horizon": windows.horizon,
        "held_out": fitted,
        "episodes": int(data.episode_N[windows.rows].unique().numel()),
        "found": measure(model, windows, values["seed"]),
        "data_set": data.describe(),
        **provenance(),
    }
    chosen = choose(model, windows, values["pictures"], values["seed"])
    found["shown"] = {name: rows_n.tolist() for name, rows_n in chosen.items()}
    output = Path(values["output"])
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / DATA, json.dumps(found, indent=2, default=str) + "\n")
    write_atomic(output / PAGE, page(model, windows, chosen, found))
    print(f"report: {output / PAGE}")
    return found


if __name__ == "__main__":
    console.analyse_foresight()
