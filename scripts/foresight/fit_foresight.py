"""`fit_foresight`: learn what the cameras will show after the next chunk, from recorded demonstrations.

    fit_foresight suite=tabletop_object
    fit_foresight data=my_robot embodiment=my_robot output=outputs/foresight/my_robot
    fit_foresight suite=tabletop_object actions=false output=outputs/foresight/no_actions             (a comparison)

Needs no labels of a simulator and no policy. Writes a folder with the model and `report.json`: its error on held-out
episodes, of that of copying the last frame, and how much larger it is with the actions of other samples. The same
command resumes a stopped run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cogvla.configs.build import build, take
from cogvla.files import write_atomic
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.foresight.fitting import FittingConfig, fit
from cogvla.policy.foresight.measure import measure
from cogvla.policy.foresight.model import Foresight, ForesightConfig, save_foresight
from cogvla.policy.foresight.monitor import Normal
from cogvla.policy.foresight.windows import Windows
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.interface import Embodiment
from cogvla.policy.provenance import provenance
from cogvla.policy.threads import use_threads
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, plain

REPORT = "report.json"


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("fit_foresight"))


def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Fit, measure and save; print a table, and return the report.

    Raises:
        ValueError: the data do not fit the embodiment or the horizon, or the output holds another run.
        OSError: something cannot be written.
    """
    values = plain(config)
    use_threads(values["threads"])
    embodiment = build(Embodiment, values["embodiment"], "embodiment")
    fitting = take(FittingConfig, values)
    data = open_data(replace(build(DataConfig, values["data"], "data"), labels={}, intervention=None), embodiment)
    for note in data.notes:
        print(f"note: {note}")
    training, held_out = data.split(fitting.validation_fraction, fitting.seed)
    windows, unseen = (Windows(part, values["executed"]) for part in (training, held_out))
    rows = training.all_rows
    statistics = {
        "state": Statistics.of(data.state_NS[rows].numpy()),
        "action": Statistics.of(windows.action_NA[rows].numpy()),
    }
    model = Foresight(take(ForesightConfig, values), embodiment, statistics)
    folder = Path(values["output"])
    identity = {"data set": data.content(), "executed actions": statistics["action"].to_dict()}
    losses = fit(model.train(), windows, fitting, folder, identity, values["resume"])
    report = {
        "command": command,
        "parameters": sum(p.numel() for p in model.parameters()),
        "horizon": embodiment.chunk,
        "held_out": measure(model.eval(), unseen, fitting.seed),
        "loss": sum(losses[-100:]) / len(losses[-100:]),
        "normal": asdict(Normal.of(model, unseen, fitting.seed)),
        "seed": fitting.seed,
        "validation_fraction": fitting.validation_fraction,
        "data_set": data.describe(),
        **provenance(),
    }
    save_foresight(folder, model, report)
    write_atomic(folder / REPORT, json.dumps(report, indent=2, default=str) + "\n")
    print(table(report))
    print(f"foresight: {folder}")
    return report


def table(report: dict[str, Any]) -> str:
    """Return the measurements as lines: the error of that of copying the last frame, on changed patches."""
    found = {name: values for name, values in report["held_out"].items() if isinstance(values, dict)}
    width = max(map(len, found))
    lines = [f"{'':{width}}  changed  error/copy  other actions  gap"]
    for name, values in found.items():
        numbers = [values[key] for key in ("changed", "copy_ratio", "shuffled_ratio", "shuffle_gap")]
        said = ["-" if number is None else f"{number:.3f}" for number in numbers]
        lines.append(f"{name:{width}}  {said[0]:>7}  {said[1]:>10}  {said[2]:>13}  {said[3]}")
    return "\n".join(lines)


if __name__ == "__main__":
    console.fit_foresight()
