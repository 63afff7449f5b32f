"""`export_policy`: write a checkpoint as files for another runtime, and compare their actions with the checkpoint's.

    export_policy checkpoint=FOLDER                                     # ONNX, in FOLDER/onnx
    export_policy checkpoint=FOLDER format=openvino precision=int8 data.root=outputs/demonstrations/tabletop_object
    eval_libero checkpoint=FOLDER/onnx
    policy_server checkpoint=FOLDER/onnx/policy_16.onnx

Images, state and text ids go in, actions in physical units come out; `exported.json` beside the files describes them.
Refuses to write a policy whose actions are not those of the checkpoint.

Shape legend: B = 1 observation, V views, H, W image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.export.export import ExportConfig, export
from cogvla.policy.export.exported import ExportedPolicy
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.inputs.resize import resize
from cogvla.policy.interface import Embodiment, Observation
from cogvla.policy.threads import use_threads
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, import_modules, plain

OPTIONS = ("format", "precision", "text_tokens", "camera_size", "opset")


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("export_policy"))


def run(config: DictConfig, command: str) -> ExportedPolicy:
    """Export the policy, and print the comparison.

    Raises:
        ValueError: a value does not fit, or see `policy.export.export.export`.
    """
    values = plain(config)
    import_modules(values["imports"])
    use_threads(values["threads"])
    checkpoint = find_checkpoint(values["checkpoint"])
    options = build(ExportConfig, {name: values[name] for name in OPTIONS}, "export")
    if values["compared"] < 1 or values["calibrated"] < 1:
        raise ValueError("compared and calibrated must be at least 1")
    if values["output"] is None and not Path(values["checkpoint"]).is_dir():
        raise ValueError("give output=FOLDER: without it, the files are written into the checkpoint's folder")
    output = Path(values["output"] or checkpoint / options.format)
    policy = load_policy(checkpoint, "cpu", statistics=values["statistics"])
    calibrated = values["calibrated"] if options.precision == "int8" else 0
    seen, calibration, recorded = _observations(values, policy.embodiment, options.camera_size, calibrated)
    exported, checked = export(policy, checkpoint, output, options, seen, calibration, recorded, command)
    print(
        f"{output}: {options.format}, {options.precision}, instructions of up to {options.text_tokens[-1]} tokens\n"
        f"normalised actions differ from the checkpoint's by {checked['mean']:.1e} on average, {checked['max']:.1e} at "
        f"most, on {len(seen)} {'random observations' if recorded is None else 'recorded frames'}"
    )
    return exported


def _observations(
    values: dict[str, Any], robot: Embodiment, camera_size: tuple[int, int] | None, calibrated: int
) -> tuple[list[Observation], list[Observation], str | None]:
    """Return observations to compare, others to calibrate, and the data set that they are from."""
    source = build(DataConfig, values["data"], "data")
    compared = values["compared"]
    if source.root is not None and source.repo_id is None and not Path(source.root).exists():
        if calibrated:
            raise ValueError(f"precision=int8 needs recorded frames, and there are none at data.root={source.root}")
        print(f"note: no data set at data.root={source.root}: actions are compared on random observations")
        random = [robot.fake_observation(1, seed) for seed in range(compared)]
        return [_resized(each, camera_size) for each in random], [], None
    data, count = open_data(source, robot), compared + calibrated
    if count > len(data):
        raise ValueError(f"the data set has {len(data)} frames, asked for are {count}: lower compared or calibrated")
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(values["seed"]))[:count]
    recorded = [_resized(_frame(data, row, robot), camera_size) for row in data.all_rows[rows].tolist()]
    return recorded[:compared], recorded[compared:], source.repo_id or source.root


def _frame(data: DemonstrationData, row: int, robot: Embodiment) -> Observation:
    """Return a frame of a data set as an observation."""
    views = rearrange(data.frames.take(np.array([row])), "b v c h w -> v b h w c")
    instruction = data.instructions[int(data.instruction_N[row])]
    images = dict(zip(robot.camera_names, views, strict=True))
    return Observation(images, data.state_NS[row : row + 1].numpy(), [instruction])


def _resized(observation: Observation, size: tuple[int, int] | None) -> Observation:
    """Return an observation with images of this height and width; None: as they are."""
    if size is None:
        return observation
    views = {
        name: rearrange(torch.from_numpy(image), "b h w c -> b c h w") for name, image in observation.images.items()
    }
    images = {name: rearrange(resize(view, size), "b c h w -> b h w c").numpy() for name, view in views.items()}
    return Observation(images, observation.state, observation.instruction)


if __name__ == "__main__":
    console.export_policy()
