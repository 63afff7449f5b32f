"""Read a reference folder: a small CogVLA with published names, inputs, and the results of the published code.

    fixture.json                    sizes, schedule, normalisation
    norm_stats.json                 statistics of action and state
    model.safetensors               vision backbone with FiLM, projectors, routers, language model
    action_head.safetensors, proprio_projector.safetensors
    cases.safetensors               inputs of each case and the expected output of every stage

Shape legend: B batch (1), V views, H, W image, T text tokens, S state, K chunk, A action dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvla.files import read_object
from cogvla.policy.inputs.normalise import Normaliser, Statistics
from cogvla.policy.inputs.tokenizer import EMPTY_TOKEN
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.weights.import_cogvla import TOWERS, load_cogvla
from cogvla.policy.weights.import_weights import Renamed
from cogvla.policy.weights.safetensor_files import AGAIN

STOP_TOKEN = 2

NORMALISATIONS = {"bounds_q99": "q99", "bounds": "min_max"}
PERIOD = 31
"""Layers of the published keep schedules, which do not depend on the depth of the language model."""


@dataclass(frozen=True)
class Reference:
    """A reference folder: our model with its weights, inputs and expected results.

    Attributes:
        model: our model with the folder's weights, in float32.
        unnormalise: normaliser whose inverse maps normalised actions to physical units.
        cases: tensors of all cases in `cases.safetensors`, by name.
        count: number of cases.
    """

    model: CogVLA
    unnormalise: Normaliser
    cases: Mapping[str, Tensor]
    count: int


def load_reference(folder: Path) -> Reference:
    """Read the folder and build its model.

    Raises:
        ValueError: a file is missing or damaged, sizes contradict each other, or a tensor is missing or has the wrong
            shape.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}; give one with fixture.json and its weights")
    sizes, statistics = (read_object(folder / f"{name}.json", AGAIN) for name in ("fixture", "norm_stats"))
    parts = {name: _tensors(folder / f"{name}.safetensors") for name in ("model", "action_head", "proprio_projector")}
    cases = _tensors(folder / "cases.safetensors")
    try:
        embodiment = _embodiment(sizes, statistics["action"])
        _place_prefix_tokens(parts["model"], (sizes["image_size"] // sizes["patch_size"]) ** 2)
        model = CogVLA(_config(sizes, parts["model"], cases), embodiment).eval()
        unnormalise = Normaliser(
            embodiment.action_normalisation,
            _statistics(statistics["action"], embodiment.action_dim),
            embodiment.action_normalise_mask,
        )
        count = int(sizes["cases"])
    except KeyError as missing:
        raise ValueError(f"{folder} is not a complete reference folder: {missing} is missing") from missing
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/fixture.json or norm_stats.json has a value of a wrong type: {error}") from error
    if count < 1:
        raise ValueError(f"{folder}/fixture.json names no cases")
    source = Renamed(
        (parts["model"], lambda name: name),
        (parts["action_head"], lambda name: f"action_head.{name}"),
        (parts["proprio_projector"], lambda name: f"proprio_projector.{name}"),
    )
    load_cogvla(model, source)
    return Reference(model, unnormalise, cases, count)


def text_ids(expected_length: int, input_ids_BT: Tensor, model: CogVLA, vision_tokens: int) -> Tensor:
    """Return the tokens [B,T] of a prompt with the empty token at the end, without bos, which the layout adds.

    Args:
        expected_length: length of the reference's whole sequence; it shows if `input_ids_BT` lacks the empty token.
        input_ids_BT: prompt, with bos.
        model: our model; gives the number of action tokens.
        vision_tokens: number of vision tokens of all views.
    """
    words_BT = input_ids_BT[:, 1:]
    around = 1 + vision_tokens + 1 + model.action_tokens + 1  # bos, vision, state, actions, stop
    if expected_length == around + words_BT.shape[1] + 1:
        words_BT = torch.cat((words_BT, words_BT.new_full((len(words_BT), 1), EMPTY_TOKEN)), dim=1)
    return words_BT


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _embodiment(sizes: Mapping[str, Any], action: Mapping[str, Any]) -> Embodiment:
    kind = NORMALISATIONS.get(sizes["normalization"])
    if kind is None:
        raise ValueError(
            f"unknown normalization {sizes['normalization']!r} in fixture.json; one of {', '.join(NORMALISATIONS)}"
        )
    side, actions = sizes["image_size"], sizes["action_dim"]
    return Embodiment(
        name="reference",
        cameras=tuple(Camera(f"view{view}", side, side) for view in range(sizes["images"])),
        state_dim=sizes["proprio_dim"],
        action_dim=actions,
        chunk=sizes["chunk"],
        control_hz=1.0,
        action_normalisation=kind,
        action_normalise_mask=tuple(action.get("mask", [True] * actions)),
    )


def _statistics(values: Mapping[str, Any], dim: int) -> Statistics:
    """Return the statistics; those that are absent, and therefore not used, are a plausible range."""
    given = {name: tuple(values[name]) for name in ("q01", "q99", "min", "max") if name in values}
    low = given.get("min", given.get("q01", (0.0,) * dim))
    high = given.get("max", given.get("q99", (1.0,) * dim))
    filled = {"q01": low, "min": low, "mean": low, "q99": high, "max": high, "std": (0.0,) * dim}
    return Statistics(**{**filled, **given})


def _place_prefix_tokens(model: dict[str, Tensor], patches: int) -> None:
    """Add the positions of class token and registers to these tokens, in place, if the reference has such positions.

    Our towers have positions for patches only; the sum of token and position stays the same.
    """
    for theirs in TOWERS.values():
        prefix = f"vision_backbone.vision_backbone.{theirs}."
        position_1PF = model[f"{prefix}pos_embed"]
        extra = position_1PF.shape[1] - patches
        tokens = [f"{prefix}{name}" for name in ("cls_token", "reg_token") if f"{prefix}{name}" in model]
        if extra > 0 and extra == sum(model[name].shape[1] for name in tokens):
            model[f"{prefix}pos_embed"] = position_1PF[:, extra:]
            start = 0
            for name in tokens:
                stop = start + model[name].shape[1]
                model[name] = model[name] + position_1PF[:, start:stop]
                start = stop


def _config(sizes: Mapping[str, Any], model: Mapping[str, Tensor], cases: Mapping[str, Tensor]) -> CogVLAConfig:
    head_width = sizes["hidden"] // sizes["llm_heads"]
    schedule = sizes["lfp_type"] or "none"
    return CogVLAConfig.from_dict(
        {
            "vision": {
                "dinov2": _tower(sizes, sizes["dino_dim"], model, TOWERS["dinov2"]),
                "siglip": _tower(sizes, sizes["siglip_dim"], model, TOWERS["siglip"]),
                "aggregation_tokens": sizes["agg"],
            },
            "language": {
                "vocab_size": sizes["vocab_size"],
                "width": sizes["hidden"],
                "intermediate": sizes["inter"],
                "layers": sizes["layers"],
                "heads": sizes["llm_heads"],
                "kv_heads": model["language_model.model.layers.0.self_attn.k_proj.weight"].shape[0] // head_width,
                "rms_norm_eps": sizes["rms_norm_eps"],
                "rope_theta": float(sizes.get("rope_theta", 10000.0)),
                "bos_token": int(cases["0.input_ids"][0, 0]),
                "stop_token": STOP_TOKEN,
            },
            "head": {"tokens_per_step": "action_dim", "placeholder": "zero", "shifted": True},
            "routing": {
                "summary": "faithful",
                "schedule": schedule,
                "mean_keep": sizes["lfp_avg"],
                "period": PERIOD,
                "position_policy": "renumber",
                "scale": "all",
            },
        }
    )


def _tower(sizes: Mapping[str, Any], width: int, model: Mapping[str, Tensor], theirs: str) -> dict[str, Any]:
    prefix = f"vision_backbone.vision_backbone.{theirs}."
    hidden = model[f"{prefix}blocks.0.block.mlp.fc1.weight"].shape[0]
    registers = model.get(f"{prefix}reg_token")
    return {
        "patch_size": sizes["patch_size"],
        "width": width,
        "depth": sizes["vit_depth"],
        "heads": sizes["vit_heads"],
        "mlp_ratio": math.nextafter(hidden / width, math.inf),  # its product with the width is rounded down
        "class_token": f"{prefix}cls_token" in model,
        "registers": 0 if registers is None else registers.shape[1],
        "layer_scale": 1.0 if f"{prefix}blocks.0.block.ls1.scale_factor" in model else None,
        "mean": [0.0, 0.0, 0.0],  # the reference's pixels are already normalised
        "std": [1.0, 1.0, 1.0],
    }
