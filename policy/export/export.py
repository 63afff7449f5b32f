"""Export a checkpoint, and compare what was written with it.

Shape legend: D action dimension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvla.files import file_hash, visible
from cogvla.policy.checkpoint import atomic_folder, weights_hash
from cogvla.policy.checkpoint_folder import STATISTICS
from cogvla.policy.export.exported import (
    FORMAT,
    MANIFEST,
    ExportedPolicy,
    InputFormat,
    file_name,
    open_files,
)
from cogvla.policy.export.formats import FORMATS, OPSETS, quantise, to_openvino, write
from cogvla.policy.export.graph import PolicyGraph
from cogvla.policy.inputs.tokenizer import TOKENIZER_FILES, PretrainedTokenizer
from cogvla.policy.interface import Camera, InstructionError, Observation
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance

PRECISIONS = ("float32", "int8")
OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of normalised actions in float32."""


@dataclass(frozen=True)
class ExportConfig:
    """Settings of an export.

    Attributes:
        format: onnx, openvino or torch_export.
        precision: float32; or int8, for onnx and openvino: matrix products in 8 bits.
        text_tokens: text lengths in tokens, one file for each; an instruction is padded to the next of them.
        camera_size: (height, width) of the images that the files take; None: those of the policy's cameras.
        opset: version of ONNX's operators, for onnx and openvino.
    """

    format: str = "onnx"
    precision: str = "float32"
    text_tokens: tuple[int, ...] = (8, 16, 32)
    camera_size: tuple[int, int] | None = None
    opset: int = OPSET

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_tokens", tuple(self.text_tokens))
        if self.camera_size is not None:
            object.__setattr__(self, "camera_size", tuple(self.camera_size))
            if len(self.camera_size) != 2 or not _positive(self.camera_size):
                raise ValueError(f"camera_size must be [HEIGHT,WIDTH] in pixels, got {list(self.camera_size)}")
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}; one of {', '.join(FORMATS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; one of {', '.join(PRECISIONS)}")
        if self.precision == "int8" and self.format == "torch_export":
            raise ValueError("precision=int8 needs format=onnx or format=openvino")
        lengths = self.text_tokens
        if not lengths or not _positive(lengths) or sorted(set(lengths)) != list(lengths):
            raise ValueError(f"text_tokens must be increasing positive lengths, got {list(self.text_tokens)}")
        if self.opset not in OPSETS or type(self.opset) is not int:
            raise ValueError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}")


def _positive(numbers: Sequence[Any]) -> bool:
    return all(type(number) is int and number > 0 for number in numbers)


def export(
    policy: CogVLAPolicy,
    checkpoint: Path,
    output: Path,
    config: ExportConfig,
    seen: Sequence[Observation],
    calibration: Sequence[Observation] = (),
    recorded: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Write an exported policy atomically, and compare its actions with the checkpoint's.

    Args:
        policy: the policy, on the CPU and without an engine; it is converted to float32.
        checkpoint: the folder that it was loaded from.
        output: folder to write; an exported policy there is replaced.
        config: what is exported.
        seen: observations, of the size that the files take, on which actions are compared.
        calibration: other observations, from which int8 takes the ranges of its inputs.
        recorded: data set of the observations; None: they are random.
        command: command line, for the manifest.

    Returns:
        The comparison: mean and largest difference of the normalised actions, on what, and which files it left out.

    Raises:
        ValueError: a part of the policy cannot be exported, or a library is missing.
        RuntimeError: the actions of what was written differ.
    """
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.float()
    router = policy.model.router
    if config.format != "torch_export" and router is not None and router.draws_numbers:
        raise ValueError(
            f"router {router.config.name!r} draws numbers, and the whole numbers of ONNX overflow in another "
            "way than torch, so that it would draw others: give format=torch_export, or export another router"
        )
    graph = PolicyGraph(policy, config.camera_size).eval()
    cameras = tuple(
        Camera(camera.name, height, width)
        for camera, (height, width) in zip(policy.embodiment.cameras, graph.sizes, strict=True)
    )
    inputs = InputFormat(replace(policy.embodiment, cameras=cameras), policy.preprocessor.tokenizer, config.text_tokens)
    _check_output(output)
    with atomic_folder(output) as draft:
        for length in config.text_tokens:
            _write(graph, inputs, config, length, draft, calibration)
        if isinstance(policy.preprocessor.tokenizer, PretrainedTokenizer):
            policy.preprocessor.tokenizer.save(draft)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "kind": config.format,
            "precision": config.precision,
            "opset": None if config.format == "torch_export" else config.opset,
            "inputs": graph.inputs,
            "embodiment": asdict(inputs.embodiment),
            "resize_kernel": policy.resize_kernel,
            "tokenizer": policy.preprocessor.tokenizer.to_dict(),
            "statistics": json.loads((checkpoint / STATISTICS).read_text()),
            "description": {
                key: value for key, value in policy.describe().items() if key not in ("engine", "dtype", "device")
            },
            "weights_sha256": weights_hash(checkpoint),
            "files": {
                str(length): {path.name: file_hash(path) for path in sorted(draft.glob(f"policy_{length}.*"))}
                for length in config.text_tokens
            },
            "tokenizer_files": {
                path.name: file_hash(path) for path in sorted(draft.iterdir()) if not path.name.startswith("policy_")
            },
            "checked": {},
            "command": command,
            **provenance(),
        }
        difference = _compared(policy, open_files(manifest, draft), seen)
        limit = TOLERANCE if config.precision == "float32" else math.inf
        if not difference["max"] < limit:
            raise RuntimeError(
                f"the exported policy's normalised actions differ by {difference['max']:.1e}, not by less than "
                f"{limit:g}; nothing was written"
            )
        checked = {"observations": len(seen), "recorded": recorded, **difference}
        # Last, so that nothing is taken for an exported policy that was not compared.
        (draft / MANIFEST).write_text(json.dumps({**manifest, "checked": checked}, indent=2) + "\n")
    return checked


def _check_output(output: Path) -> None:
    """Check that a new export replaces nothing but an older one."""
    if not output.exists():
        return
    if not (output / MANIFEST).is_file():
        raise ValueError(f"{output} exists and is no exported policy; give another output")
    ours = (MANIFEST, *(f"policy_*{ending}*" for ending in (*FORMATS.values(), ".bin")), *TOKENIZER_FILES)
    others = [path.name for path in visible(output, "*") if not any(fnmatchcase(path.name, each) for each in ours)]
    if others:
        raise ValueError(f"{output} also holds {', '.join(others[:3])}, which would be lost; give another output")


def _write(
    graph: PolicyGraph,
    inputs: InputFormat,
    config: ExportConfig,
    length: int,
    folder: Path,
    calibration: Sequence[Observation],
) -> None:
    """Write the file for one text length."""
    tensors = [torch.from_numpy(array) for array in inputs.example(length).values()]
    graph.check(tensors)
    path = folder / file_name(config.format, length)
    if config.precision == "float32":
        return write(config.format, graph, tensors, path, config.opset)
    only = replace(inputs, lengths=(length,))
    shorter = [only.of(each, 0)[1] for each in calibration if only.fits(each.instruction[0])]
    if not shorter:
        raise ValueError(
            f"no instruction of the recorded frames has up to {length} tokens, so int8 cannot be measured for them: "
            "leave this length out of text_tokens"
        )
    whole, small = (folder / f"{kind}_{length}.onnx" for kind in ("whole", "small"))
    write("onnx", graph, tensors, whole, config.opset)
    quantise(whole, small, shorter)
    whole.unlink()
    if config.format == "onnx":
        small.rename(path)
    else:
        to_openvino(small, path)
        small.unlink()
    return None


def _compared(policy: CogVLAPolicy, exported: ExportedPolicy, seen: Sequence[Observation]) -> dict[str, Any]:
    """Compare each file on all instructions that it takes.

    Returns:
        Mean and largest difference of the normalised actions; and the text lengths for which no instruction was short
        enough, so that their files are unchecked.
    """
    normaliser = policy.preprocessor.action_normaliser
    scale_D = torch.where(normaliser.constant_D, torch.ones_like(normaliser.scale_D), normaliser.scale_D).numpy()
    wanted = [policy.act(one).actions for one in seen]
    files = exported.by_file()
    each: dict[int, list[np.ndarray]] = {}
    for length, file in files.items():
        each[length] = []
        for one, actions_1KD in zip(seen, wanted, strict=True):
            try:
                each[length].append(np.abs(actions_1KD - file.act(one).actions) / scale_D)
            except InstructionError:
                if length == max(files):
                    raise
    found = [one for of_file in each.values() for one in of_file]
    unchecked = [length for length, of_file in each.items() if not of_file]
    return {"mean": float(np.mean(found)), "max": float(np.max(found)), "unchecked_text_tokens": unchecked}
