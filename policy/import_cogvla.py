"""Published CogVLA weights to ours: the reference's parameter names on the left, our names on the right.

In the reference `featurizer` is DINOv2 and `fused_featurizer` is SigLIP. Weights load into a model whose routing is
`configs/routing/faithful.yaml` and whose head has one token per action dimension.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TOWERS = {"dinov2": "featurizer", "siglip": "fused_featurizer"}
_BLOCK = re.compile(r"blocks\.(\d+)\.block\.(.+)")


def import_weights(
    model: Mapping[str, Tensor], head: Mapping[str, Tensor], proprioception: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict of our model, from the reference's three files.

    Args:
        model: vision backbone, projectors, router and language model.
        head: action head.
        proprioception: projector of the proprioceptive state.

    Returns:
        Names and tensors for `CogVLA.load_state_dict(strict=True)` with `drop_last_block` and zero placeholders.

    Raises:
        ValueError: a file lacks a parameter, so that it is not a published CogVLA.
    """
    try:
        state = {**_language(model), **_fusion(model), **_head(head)}
        for ours, theirs in _TOWERS.items():
            state |= _tower(model, ours, theirs)
        for index, name in ((0, "fc1"), (2, "fc2")):
            state |= _linear(proprioception, name, f"state.{index}")
    except KeyError as missing:
        raise ValueError(f"these are not published CogVLA weights: parameter {missing} is missing") from missing
    return state


def _linear(source: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": source[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def _tower(source: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    prefix = f"vision_backbone.vision_backbone.{theirs}."
    vit = {name.removeprefix(prefix): tensor for name, tensor in source.items() if name.startswith(prefix)}
    depth = 1 + max(int(match[1]) for name in vit if (match := _BLOCK.fullmatch(name)))
    state: dict[str, Tensor] = {}
    for name in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        if name in vit:
            state[f"vision.towers.{ours}.vit.{name}"] = vit[name]
    for name, tensor in vit.items():
        # The last block is computed and thrown away there; it does not exist here.
        if (match := _BLOCK.fullmatch(name)) and int(match[1]) < depth - 1:
            inner = match[2].replace(".scale_factor", ".gamma")
            state[f"vision.towers.{ours}.vit.blocks.{match[1]}.{inner}"] = tensor
    for kind in ("weight", "bias"):
        parts = [vit[f"blocks.{i}.{which}.{kind}"] for i in range(depth - 1) for which in ("scale", "shift")]
        state[f"vision.towers.{ours}.film.project.{kind}"] = torch.cat(parts)
    state[f"vision.towers.{ours}.aggregation.tokens"] = source[f"vision_backbone.vision_aggr_{theirs}"][0]
    return state


def _fusion(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for stream, theirs in enumerate(_TOWERS.values()):
        for index, name in ((0, "fc1"), (2, "fc2")):
            state |= _linear(source, f"{theirs}_proj.{name}", f"vision.fusion.projectors.{stream}.{index}")
    for index in (0, 2):
        state |= _linear(source, f"aggregation_router.router.{index}", f"vision.fusion.weigher.{index}")
    return state


def _language(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in source.items():
        if not name.startswith("language_model.model."):
            continue
        inner = name.removeprefix("language_model.model.")
        if match := re.fullmatch(r"layers\.(\d+)\.router\.(scale|shift|router)\.(.+)", inner):
            layer, part, rest = match.groups()
            state[f"decoder.routers.{layer}.{'logits' if part == 'router' else part}.{rest}"] = tensor
        else:
            state[f"decoder.llm.{inner}"] = tensor
    return state


def _head(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    blocks = len({match[1] for name in source if (match := re.match(r"model\.mlp_resnet_blocks\.(\d+)\.", name))})
    state = {**_linear(source, "model.layer_norm1", "head.net.0"), **_linear(source, "model.fc1", "head.net.1")}
    for block in range(blocks):
        for part in (0, 1):
            theirs, ours = f"model.mlp_resnet_blocks.{block}.ffn.{part}", f"head.net.{3 + block}.ffn.{part}"
            state |= _linear(source, theirs, ours)
    last = 3 + blocks
    return (
        state
        | _linear(source, "model.layer_norm2", f"head.net.{last}")
        | _linear(source, "model.fc2", f"head.net.{last + 1}")
    )
