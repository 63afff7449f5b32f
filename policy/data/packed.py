"""One file of demonstrations: frames as JPEG, everything else as it is; it is read without pyarrow and lerobot.

The file is in the format of safetensors: the bytes of all JPEGs in one row, with the end of each.

Shape legend: N frames, V views, H, W image, S state, A action.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cogvla.configs.build import build
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.frames import ArrayFrames, Frames
from cogvla.policy.data.interventions import Teaching
from cogvla.policy.interface import Embodiment

QUALITY = 90
LABEL = "label/"
COLUMNS = {"state", "action", "episode", "instruction"}


def pack(data: DemonstrationData, robot: Embodiment, path: Path, limit: int, quality: int = QUALITY) -> tuple[int, int]:
    """Write as many whole episodes as fit into `limit` bytes, evenly spread over the data set.

    Returns:
        The number of episodes in the file, and its size in bytes.

    Raises:
        ValueError: not even two episodes fit.
    """
    episodes = data.episode_N.unique()
    count = len(episodes)
    while True:
        chosen = episodes[torch.linspace(0, len(episodes) - 1, count).round().long()]
        rows = torch.isin(data.episode_N, chosen).nonzero().flatten()
        pictures = _compress(data.frames, rows, quality, limit)
        if pictures is not None:
            break
        if count <= 2:
            raise ValueError(f"not even two episodes fit into {limit / 1e6:.0f} MB")
        count = max(2, count * 4 // 5)
    labels = {LABEL + name: values[rows].contiguous() for name, values in data.frame_labels.items()}
    columns = {
        "state": data.state_NS[rows],
        "action": data.action_NA[rows],
        "episode": data.episode_N[rows],
        "instruction": data.instruction_N[rows],
    }
    if data.executed_NA is not None:
        columns["executed"] = data.executed_NA[rows]
    if data.teaching is not None:
        columns |= {"taught": data.teaching.actions_N[rows], "weight": data.teaching.weight_N[rows]}
    about = {"instructions": json.dumps(data.instructions), "embodiment": json.dumps(asdict(robot))}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")
    save_file({**columns, **labels, **_joined(pictures)}, draft, about)
    os.replace(draft, path)
    return count, path.stat().st_size


def unpack(path: Path) -> tuple[DemonstrationData, Embodiment]:
    """Read a file from `pack`; return its demonstrations and the robot.

    Raises:
        ValueError: it is not such a file.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        robot = build(Embodiment, json.loads(about["embodiment"]), "embodiment")
        ends = tensors.pop("ends").tolist()
        jpeg = tensors.pop("jpeg").numpy()
        instructions = json.loads(about["instructions"])
        if missing := COLUMNS - tensors.keys():
            raise KeyError(*missing)
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is no file of demonstrations ({error}); make one with `gpu_report --pack`") from error
    pictures = [_decode(jpeg[start:end].tobytes()) for start, end in zip([0, *ends], ends, strict=False)]
    _check(tensors, len(pictures) // len(robot.cameras), len(instructions), robot, path)
    teaching = Teaching(tensors.pop("taught"), tensors.pop("weight")) if "taught" in tensors else None
    data = DemonstrationData(
        frames=ArrayFrames(np.stack(pictures).reshape(-1, len(robot.cameras), *pictures[0].shape)),
        state_NS=tensors.pop("state"),
        action_NA=tensors.pop("action"),
        episode_N=tensors.pop("episode"),
        instruction_N=tensors.pop("instruction"),
        instructions=instructions,
        executed_NA=tensors.pop("executed", None),
        teaching=teaching,
        frame_labels={name.removeprefix(LABEL): values for name, values in tensors.items()},
        chunk=robot.chunk,
    )
    episodes = int(data.episode_N.unique().numel())
    return replace(data, provenance={"name": path.name, "episodes": episodes, "frames": len(data)}), robot


def _check(tensors: Mapping[str, Tensor], frames: int, instructions: int, robot: Embodiment, path: Path) -> None:
    """Raise ValueError if the columns do not fit the frames, the robot or the list of instructions."""
    dims = {"state": robot.state_dim, "action": robot.action_dim}
    if {len(values) for values in tensors.values()} != {frames} or any(
        tensors[name].shape != (frames, dim) for name, dim in dims.items()
    ):
        raise ValueError(f"{path} is damaged: its columns do not have the size of {frames} frames; pack it again")
    numbers = tensors["instruction"]
    if not (int(numbers.min()) >= 0 and int(numbers.max()) < instructions):
        raise ValueError(f"{path} is damaged: a frame has an instruction that is not in the file; pack it again")
    if not all(tensors[name].isfinite().all() for name in dims):
        raise ValueError(f"{path} holds NaN or infinite states or actions; record the data set again")


def _compress(frames: Frames, rows: Tensor, quality: int, limit: int) -> Sequence[bytes] | None:
    """Return the JPEGs of these frames, view by view; None if they take more than `limit` bytes."""
    pictures: list[bytes] = []
    total = 0
    for row in rows.numpy():
        for view_CHW in frames.take(row[None])[0]:
            buffer = io.BytesIO()
            Image.fromarray(view_CHW.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality)
            pictures.append(buffer.getvalue())
            total += len(pictures[-1])
        if total > 0.95 * limit:  # the rest is for everything else
            return None
    return pictures


def _joined(pictures: Sequence[bytes]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(picture) for picture in pictures])
    return {"jpeg": torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8), "ends": lengths.cumsum(0)}


def _decode(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as opened:
        return np.ascontiguousarray(np.asarray(opened).transpose(2, 0, 1))
