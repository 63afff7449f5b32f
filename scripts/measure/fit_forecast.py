"""`fit_forecast`: fit the forecast of the state that lets a policy act while its chunks are late.

`train_policy` does this at its end; this command is for other checkpoints, and for other recordings of the robot.

    fit_forecast checkpoint=checkpoints/FOLDER suite=tabletop_object
    eval_libero checkpoint=FOLDER latency=100 protocol.execute_steps=2

Adds `forecast.json` to the checkpoint (`policy.inputs.forecast`). It depends on the robot and its controller, not on
the weights.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.policy.checkpoint import EVERY, load_policy, save_forecast
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.hub.download import hub_source
from cogvla.policy.inputs.forecast import POOR, Forecast
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain
from cogvla.scripts.measure.recorded import check_data
from cogvla.scripts.training.forecast import fit, poorly_explained


def main(config: DictConfig) -> None:
    """Fit and save the forecast, and print how much it explains.

    Raises:
        ValueError: there is no such folder, or the data set does not fit the policy or is too small.
    """
    import_modules(config.imports)
    values = plain(config)
    if not Path(values["checkpoint"]).is_dir() and (hub := hub_source(values["checkpoint"])):
        raise ValueError(
            f"the forecast is written into the checkpoint: `hf download {hub[0]} --local-dir FOLDER`, then give "
            "checkpoint=FOLDER"
        )
    check_data(values)
    folder = Path(values["checkpoint"])
    robot = load_policy(folder, statistics=EVERY).embodiment
    data = open_data(build(DataConfig, values["data"], "data"), robot)
    forecast = fit(data, robot.chunk)
    save_forecast(folder, forecast)
    print(summary(forecast))
    print(f"{folder} now reads committed actions")


def summary(forecast: Forecast) -> str:
    """Return a line for each delay, with the share of the change of each state entry that is explained."""
    lines = [
        f"after {delay} steps: " + ", ".join(f"{share:.0%}" for share in shares)
        for delay, shares in enumerate(forecast.explained, start=1)
    ]
    if poor := poorly_explained(forecast):
        lines.append(
            f"note: less than {POOR:.0%} of state entries {poor} is explained: their state after a delay is a guess"
        )
    return "explained change of each state entry\n" + "\n".join(lines)


if __name__ == "__main__":
    console.fit_forecast()
