"""The forecast of the state of a trained policy, for chunks that arrive late (`policy.inputs.forecast`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cogvla.policy.checkpoint import save_forecast
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.inputs.forecast import POOR, Forecast


def fit(data: DemonstrationData, chunk: int) -> Forecast:
    """Fit a forecast for chunks of K actions on recorded frames; ValueError if there are too few, or of several robots.

    The actions are those that were executed, where the data set says so.
    """
    if data.each:
        raise ValueError(
            "with data.statistics=each, robots or units differ; `fit_forecast checkpoint=FOLDER data.root=FOLDER` fits "
            "it on the data set of the robot that the policy will drive"
        )
    executed_NA = data.action_NA if data.executed_NA is None else data.executed_NA
    given = data.state_NS.numpy(), executed_NA.numpy(), data.episode_N.numpy()
    return Forecast.fit(*given, chunk, {"data_set": data.describe()})


def add_forecast(folder: Path, data: DemonstrationData, chunk: int) -> str:
    """Fit a forecast and save it in a trained policy's folder, unless it would be a guess; return a line for the user.

    Raises:
        OSError: see `save_forecast`.
    """
    try:
        forecast = fit(data, chunk)
    except ValueError as error:
        return f"no forecast of the state for late chunks: {error}"
    if not forecast.explained:
        return "no forecast of the state for late chunks: a chunk is one action"
    if poor := poorly_explained(forecast):
        return (
            f"no forecast of the state for late chunks: it explains less than {POOR:.0%} of the change of entries "
            f"{poor}; `fit_forecast checkpoint={folder}` saves it in spite of that"
        )
    save_forecast(folder, forecast)
    least = np.array(forecast.explained)[-1].min()
    return f"for late chunks, a forecast explains {least:.0%} or more of the change of each entry of the state"


def poorly_explained(forecast: Forecast) -> list[int]:
    """Return the entries of the state of whose change after the longest delay less than `POOR` is explained."""
    return np.flatnonzero(np.array(forecast.explained[-1:]) < POOR).tolist()
