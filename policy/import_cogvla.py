"""Published CogVLA weights to ours: their parameter names for each of ours.

In the published code `featurizer` is DINOv2 and `fused_featurizer` is SigLIP. Its files are read as one mapping, in
which the names of the action head start with `action_head.` and those of the state's projector with
`proprio_projector.`. The weights belong into a model whose routing is `configs/routing/faithful.yaml` and whose head is
that of `configs/policy/cogvla_7b.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from cogvla.policy.import_weights import Names, load_parameters
from cogvla.policy.model import CogVLA

TOWERS = {"dinov2": "featurizer", "siglip": "fused_featurizer"}
"""Our towers, in the order of the streams, and theirs."""

_FC = {"0": "fc1", "2": "fc2", "4": "fc3"}


def load_cogvla(model: CogVLA, source: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Fill every parameter of the model from published weights, see `load_parameters`.

    Raises:
        ValueError: a tensor is missing or misshapen, or the model has parameters that the published one has not.
    """
    try:
        rest = load_parameters(model, source, cogvla_names(model), dtype)
    except ValueError as error:
        raise ValueError(f"these are not the published CogVLA weights of this configuration: {error}") from error
    if rest:
        raise ValueError(f"published CogVLA weights have no {rest[0]}; use routing=faithful and the head of cogvla_7b")


def cogvla_names(model: CogVLA) -> Names:
    """Published names of the parameters of this model."""
    blocks = {name: tower.computed for name, tower in model.vision.named_towers()}
    last = 3 + model.config.head.blocks

    def names(ours: str) -> tuple[str, ...]:
        area, _, rest = ours.partition(".")
        if area == "vision" and (match := re.fullmatch(r"towers\.(\w+)\.(\w+)\.(.+)", rest)):
            return _tower(match[1], match[2], match[3], blocks[match[1]])
        if match := re.fullmatch(r"vision\.fusion\.projectors\.(\d)\.(\d)\.(\w+)", ours):
            stream = list(TOWERS.values())[int(match[1])]
            return (f"{stream}_proj.{_FC[match[2]]}.{match[3]}",)
        if match := re.fullmatch(r"vision\.fusion\.weigher\.(.+)", ours):
            return (f"aggregation_router.router.{match[1]}",)
        if match := re.fullmatch(r"state\.(\d)\.(\w+)", ours):
            return (f"proprio_projector.{_FC[match[1]]}.{match[2]}",)
        if match := re.fullmatch(r"decoder\.routers\.(\d+)\.(logits|scale|shift)\.(.+)", ours):
            part = "router" if match[2] == "logits" else match[2]
            return (f"language_model.model.layers.{match[1]}.router.{part}.{match[3]}",)
        if match := re.fullmatch(r"decoder\.llm\.(.+)", ours):
            return (f"language_model.model.{match[1]}",)
        return _head(rest, last) if area == "head" else ()

    return names


def vit_name(ours: str, wrapped: bool) -> str:
    """A parameter of a timm tower as published: LayerScale's is renamed, and FiLM has wrapped the blocks."""
    theirs = re.sub(r"\.(ls\d)\.gamma$", r".\1.scale_factor", ours)
    return re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.block.", theirs) if wrapped else theirs


def _tower(tower: str, part: str, rest: str, blocks: int) -> tuple[str, ...]:
    theirs = f"vision_backbone.vision_backbone.{TOWERS[tower]}"
    if part == "vit":
        return (f"{theirs}.{vit_name(rest, wrapped=True)}",)
    if part == "aggregation":
        return (f"vision_backbone.vision_aggr_{TOWERS[tower]}",)
    kind = rest.removeprefix("project.")  # of FiLM, all blocks in one matrix: scale and shift in turn
    return tuple(f"{theirs}.blocks.{i}.{which}.{kind}" for i in range(blocks) for which in ("scale", "shift"))


def _head(ours: str, last: int) -> tuple[str, ...]:
    """Our head is one sequence: norm, linear, ReLU, residual blocks, norm (at `last`), linear."""
    match = re.fullmatch(r"net\.(\d+)\.(?:ffn\.(\d)\.)?(\w+)", ours)
    if match is None:
        return ()
    index, inner, kind = int(match[1]), match[2], match[3]
    if inner is not None:
        return (f"action_head.model.mlp_resnet_blocks.{index - 3}.ffn.{inner}.{kind}",)
    part = {0: "layer_norm1", 1: "fc1", last: "layer_norm2", last + 1: "fc2"}.get(index)
    return () if part is None else (f"action_head.model.{part}.{kind}",)
