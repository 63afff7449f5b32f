"""Import OpenVLA, OpenVLA-OFT and Prismatic weights as a base: the published name of each parameter of our model.

Loaded are both towers, the language model, the projector (if `routing.fusion` is `concat`, as in OpenVLA), and from
OpenVLA-OFT the state projector and the action head. FiLM, aggregation tokens, projectors and weights of the streams,
and routers exist in CogVLA only and keep their initial values, as in the training of the published CogVLA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cogvla.files import visible
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.weights.import_cogvla import TOWERS, cogvla_names, one_file, vit_name
from cogvla.policy.weights.import_weights import Names, Renamed, read_pt
from cogvla.policy.weights.safetensor_files import SafetensorFiles

_PROJECTOR = {"0": "fc1", "2": "fc2", "4": "fc3"}
_PRISMATIC_TOWERS = {"dino_featurizer.": "featurizer.", "siglip_featurizer.": "fused_featurizer."}


def openvla_names(model: CogVLA) -> Names:
    """Return the published names of this model's parameters; empty for parameters that OpenVLA does not have."""
    as_in_cogvla = cogvla_names(model)

    def names(ours: str) -> tuple[str, ...]:
        if match := re.fullmatch(r"vision\.towers\.(\w+)\.vit\.(.+)", ours):
            return (f"vision_backbone.{TOWERS[match[1]]}.{vit_name(match[2], wrapped=False)}",)
        if match := re.fullmatch(r"vision\.fusion\.project\.(\d)\.(\w+)", ours):
            return (f"projector.{_PROJECTOR[match[1]]}.{match[2]}",)
        if ours.startswith(("decoder.llm.", "state.", "head.")):
            return tuple(as_in_cogvla(ours))
        return ()

    return names


def openvla_weights(folder: Path) -> Mapping[str, Tensor]:
    """Open the weights of an OpenVLA in the hub's layout (safetensors) or a Prismatic run (`checkpoints/*.pt`).

    Raises:
        ValueError: the folder has neither, or a file is damaged.
    """
    if visible(folder, "*.safetensors"):
        heads = [
            (read_pt(path), f"{name}.".__add__)
            for name in ("action_head", "proprio_projector")
            if (path := one_file(folder, name, required=False))
        ]
        return Renamed((SafetensorFiles(folder), str), *heads)
    runs = visible(folder, "checkpoints/*.pt")
    latest = [run for run in runs if run.name == "latest-checkpoint.pt"] or runs[-1:]
    if not latest:
        raise ValueError(f"no OpenVLA weights in {folder}: neither *.safetensors nor checkpoints/*.pt")
    return Renamed((read_pt(latest[0]), prismatic_name))


def prismatic_name(theirs: str) -> str | None:
    """Convert a name of the Prismatic training code to the hub's naming; None: not a weight of the model."""
    area, _, rest = theirs.removeprefix("model.").partition(".")
    if area == "projector" and (match := re.fullmatch(r"(?:projector\.)?(\d)\.(\w+)", rest)):
        return f"projector.{_PROJECTOR[match[1]]}.{match[2]}"
    if area == "llm_backbone":
        return f"language_model.{rest.removeprefix('llm.')}"
    if area == "vision_backbone":
        for prefix, tower in _PRISMATIC_TOWERS.items():
            if rest.startswith(prefix):
                return f"vision_backbone.{tower}{vit_name(rest.removeprefix(prefix), wrapped=False)}"
    return None
