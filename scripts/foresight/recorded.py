"""Recorded samples for the commands of foresight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cogvla.configs.build import build
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.gripper import map_grippers
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.foresight.windows import EXECUTED_LABEL
from cogvla.policy.interface import Embodiment


def open_recorded(values: Mapping[str, Any], embodiment: Embodiment) -> DemonstrationData:
    """Open the data of a command (`data`), with the actions that were executed (`executed`) as a label.

    Raises:
        ValueError: see `open_data`.
        OSError: see `open_data`.
    """
    config = build(DataConfig, values["data"], "data")
    executed = values["executed"]
    config = replace(config, labels={} if executed is None else {EXECUTED_LABEL: executed}, intervention=None)
    data = open_data(config, embodiment)
    if config.gripper and EXECUTED_LABEL in data.frame_labels:
        label = data.frame_labels[EXECUTED_LABEL].float()
        mapped = {EXECUTED_LABEL: map_grippers(label, config.gripper, embodiment)}
        data = replace(data, frame_labels=data.frame_labels | mapped)
    return data
