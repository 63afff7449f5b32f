"""Recorded observations for the commands that measure something on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cogvla.configs.build import build
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.download import local_root
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.device import usable_device
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.threads import use_threads
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.objective import Batch, ObjectiveConfig
from cogvla.scripts.command import check_counts, import_modules

BATCH = 8
"""Frames in one pass."""
NO_LABELS = ObjectiveConfig(
    grounding=0.0, reading=0.0, pointing=0.0, counterfactual=0.0, gripper_state=(), state_dropout=0.5, phase_weights=()
)
"""An objective without labels, so that any data set will do."""


def start(values: Mapping[str, Any], *counts: str) -> tuple[Path, str]:
    """Do what these commands do first; return the checkpoint's folder and the device.

    Args:
        values: configuration of the command.
        counts: keys of numbers that must be at least 1.

    Raises:
        ValueError: one of them is not, or there is no checkpoint.
    """
    import_modules(values["imports"])
    check_counts(values, *counts)
    use_threads(values["threads"])
    return find_checkpoint(values["checkpoint"]), usable_device(values["device"])


def check_data(values: Mapping[str, Any]) -> None:
    """Check the key `data` before a policy is loaded: its values, and that its folders hold data sets.

    Raises:
        ValueError: a value does not fit, or a folder holds none; what is on the hub is not looked up.
    """
    for entry in build(DataConfig, values["data"], "data").entries():
        if entry.config.repo_id is None:
            local_root(entry.config.root, None, entry.config.revision)


def draw_frames(policy: CogVLAPolicy, values: Mapping[str, Any], **counts: int) -> tuple[DemonstrationData, Tensor]:
    """Open the data set `data`, and draw different frames from it with `seed`.

    Args:
        policy: policy that will see them.
        values: configuration of the command.
        counts: how many frames, by the key that says so.

    Returns:
        The data set, and the numbers of all frames, in the order of drawing.

    Raises:
        ValueError: the data set has fewer frames.
    """
    data = open_data(build(DataConfig, values["data"], "data"), policy.embodiment)
    count = sum(counts.values())
    if count > len(data):
        said = " and ".join(f"{name}={number}" for name, number in counts.items())
        need = "need" if len(counts) > 1 else "needs"
        raise ValueError(f"the data set has {len(data)} frames, but {said} {need} {count}")
    generator = torch.Generator().manual_seed(values["seed"])
    return data, torch.randperm(len(data), generator=generator)[:count]


def batches(
    policy: CogVLAPolicy, data: DemonstrationData, rows_N: Tensor, progress: str | None = None
) -> Iterator[Batch]:
    """Yield batches of these frames with the expert's actions; `progress` is the name of a progress bar."""
    drawn, builder = TrainingBatches(data, BATCH, seed=0), BatchBuilder(data, policy.preprocessor, NO_LABELS)
    for rows_B in tqdm(rows_N.split(BATCH), desc=progress, unit="batch", disable=progress is None):
        yield builder.evaluation(drawn.gather(rows_B))
