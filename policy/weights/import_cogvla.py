"""Import published CogVLA weights: the published name of each parameter of our model.

In the published code `featurizer` is DINOv2 and `fused_featurizer` is SigLIP. Its files are read as one mapping, in
which names of the action head start with `action_head.` and names of the state projector with `proprio_projector.`.
The weights fit a model with the routing of `configs/routing/faithful.yaml` and the head of
`configs/policy/cogvla_7b.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cogvla.files import visible
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.weights.import_weights import Names, Renamed, load_parameters, read_pt
from cogvla.policy.weights.lora import LoraMerged, read_lora
from cogvla.policy.weights.safetensor_files import SafetensorFiles

TOWERS = {"dinov2": "featurizer", "siglip": "fused_featurizer"}
"""Our names of the towers, in the order of the streams -> published names."""

_FC = {"0": "fc1", "2": "fc2", "4": "fc3"}


def load_cogvla(model: CogVLA, source: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Fill every parameter of the model from published weights, see `load_parameters`.

    Raises:
        ValueError: a tensor is missing or has the wrong shape, or the model has parameters without published weights.
    """
    try:
        rest = load_parameters(model, source, cogvla_names(model), dtype)
    except ValueError as error:
        raise ValueError(f"these are not the published CogVLA weights of this configuration: {error}") from error
    if rest:
        raise ValueError(f"published CogVLA weights have no {rest[0]}; use routing=faithful and the head of cogvla_7b")


def cogvla_names(model: CogVLA) -> Names:
    """Return the published names of this model's parameters."""
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
    """Return the published name of a timm tower's parameter: LayerScale is renamed, and FiLM wraps the blocks."""
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
    """Return the published name of a parameter of our head: norm, linear, ReLU, blocks, norm (index `last`), linear."""
    match = re.fullmatch(r"net\.(\d+)\.(?:ffn\.(\d)\.)?(\w+)", ours)
    if match is None:
        return ()
    index, inner, kind = int(match[1]), match[2], match[3]
    if inner is not None:
        return (f"action_head.model.mlp_resnet_blocks.{index - 3}.ffn.{inner}.{kind}",)
    part = {0: "layer_norm1", 1: "fc1", last: "layer_norm2", last + 1: "fc2"}.get(index)
    return () if part is None else (f"action_head.model.{part}.{kind}",)


def cogvla_weights(
    folder: Path, base: Mapping[str, Tensor] | None = None, merge_adapter: bool | None = None
) -> Renamed:
    """Open all weights of a published CogVLA as one mapping.

        *.safetensors                        language model with routers, projectors; LoRA is merged
        vision_backbone--N_checkpoint.pt     both towers with FiLM and aggregation tokens; LoRA is not merged
        action_head--N_checkpoint.pt, proprio_projector--N_checkpoint.pt
        lora_adapter/                        rank and alpha, and updates of a base model; by default the updates are
                                             merged only in a folder without *.safetensors, as training writes it
        non_lora_trainables--N_checkpoint.pt routers and projectors of such a folder

    Args:
        folder: folder of the release.
        base: weights of the base model (OpenVLA) of the adapter, for a folder without *.safetensors.
        merge_adapter: merge the updates of `lora_adapter/`; None: only in a folder without *.safetensors.

    Raises:
        ValueError: a file is missing, there are several of one kind, or one is damaged.
    """
    whole = bool(visible(folder, "*.safetensors"))
    adapter = folder / "lora_adapter"
    if whole and base is not None:
        raise ValueError(f"{folder} has merged weights (*.safetensors), so base= has no use; leave it out")
    if merge_adapter is None:
        merge_adapter = not whole and adapter.is_dir()
    if whole:
        weights: Mapping[str, Tensor] = SafetensorFiles(folder)
    elif base is not None:
        weights = base
    else:
        raise ValueError(
            f"no *.safetensors in {folder}: its adapter needs the weights of its base; give base=FOLDER_OR_HUB_ID"
        )
    if rest := one_file(folder, "non_lora_trainables", required=False):
        weights = Renamed((weights, str), (read_pt(rest), lambda name: name.removeprefix("base_model.model.")))
    vision = "vision_backbone"
    path = one_file(folder, vision, required=f"{vision}.vision_aggr_featurizer" not in weights)
    towers: Mapping[str, Tensor] | None = None if path is None else read_pt(path)
    elsewhere: set[str] = set()
    if towers is not None and any(".lora_" in name or ".base_layer." in name for name in towers):
        towers = merged = LoraMerged(towers, None, read_lora(adapter, check_targets=False))
        elsewhere = {f"{vision}.{name}" for name in merged.targets}  # the adapter has them too
    if merge_adapter:
        weights = LoraMerged(weights, SafetensorFiles(adapter), read_lora(adapter), elsewhere)
    parts: list[tuple[Mapping[str, Tensor], Callable[[str], str | None]]] = [(weights, str)]
    parts += [
        (read_pt(path), f"{name}.".__add__)
        for name in ("action_head", "proprio_projector")
        if (path := one_file(folder, name, required=True))
    ]
    if towers is not None:
        parts.append((towers, f"{vision}.".__add__))
    return Renamed(*parts)


def one_file(folder: Path, name: str, required: bool) -> Path | None:
    """Return the file `NAME--N_checkpoint.pt`; None if there is none.

    Raises:
        ValueError: there are several such files, or none although it is required.
    """
    found = sorted(folder.glob(f"{name}--*checkpoint.pt"))
    if len(found) > 1:
        raise ValueError(f"{folder} has several {name}--*_checkpoint.pt: keep only the one of the step that you want")
    if required and not found:
        raise ValueError(f"{folder} has no {name}--N_checkpoint.pt; download all files of the release")
    return found[0] if found else None
