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

from collections.abc import Mapping
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
from cogvla.policy.export.export import ExportConfig, export
from cogvla.policy.inputs.resize import resize
from cogvla.policy.interface import Embodiment, Observation
from cogvla.policy.policy import CogVLAPolicy
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, plain
from cogvla.scripts.measure.recorded import draw_frames, start

OPTIONS = ("format", "precision", "text_tokens", "camera_size", "opset")


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("export_policy"))


def run(config: DictConfig, command: str) -> None:
    """Export the policy, and print the comparison.

    Raises:
        ValueError: a value does not fit, or see `policy.export.export.export`.
    """
    values = plain(config)
    checkpoint, _ = start({**values, "device": "cpu"}, "compared", "calibrated")
    options = build(ExportConfig, {name: values[name] for name in OPTIONS}, "export")
    if values["output"] is None and not Path(values["checkpoint"]).is_dir():
        raise ValueError("give output=FOLDER: without it, the files are written into the checkpoint's folder")
    output = Path(values["output"] or checkpoint / options.format)
    source = build(DataConfig, values["data"], "data")
    there = source.root is None or source.repo_id is not None or Path(source.root).exists()
    if options.precision == "int8" and not there:
        raise ValueError(f"precision=int8 needs recorded frames, and there are none at data.root={source.root}")
    policy = load_policy(checkpoint, "cpu", statistics=values["statistics"])
    seen, calibration, recorded = _observations(values, policy, options, source if there else None)
    checked = export(policy, checkpoint, output, options, seen, calibration, recorded, command)
    print(
        f"{output}: {options.format}, {options.precision}, instructions of up to {options.text_tokens[-1]} tokens\n"
        f"normalised actions differ from the checkpoint's by {checked['mean']:.1e} on average, {checked['max']:.1e} at "
        f"most, on {len(seen)} {'random observations' if recorded is None else 'recorded frames'}"
    )
    if lengths := checked["unchecked_text_tokens"]:
        said = ", ".join(map(str, lengths))
        print(f"note: unchecked are the files of text_tokens {said}: all instructions of these observations are longer")


def _observations(
    values: Mapping[str, Any], policy: CogVLAPolicy, options: ExportConfig, source: DataConfig | None
) -> tuple[list[Observation], list[Observation], str | None]:
    """Return observations to compare, others to calibrate, and the data set that they are from; None: random ones."""
    robot = policy.embodiment
    counts = {name: values[name] for name in ("compared", "calibrated")}
    if options.precision != "int8":
        del counts["calibrated"]
    if source is None:
        print(f"note: no data set at data.root={values['data']['root']}: actions are compared on random observations")
        random = [robot.fake_observation(1, seed) for seed in range(counts["compared"])]
        return [_resized(each, options.camera_size) for each in random], [], None
    data, rows_N = draw_frames(policy, values, **counts)
    recorded = [_resized(_frame(data, row, robot), options.camera_size) for row in data.all_rows[rows_N].tolist()]
    return recorded[: counts["compared"]], recorded[counts["compared"] :], source.repo_id or source.root


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
