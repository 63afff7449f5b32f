"""The action heads by their names in `head.kind`; to add one, write a file in this folder and add a line here."""

from __future__ import annotations

from cogvla.policy.model.heads.denoising import DiffusionHead, FlowHead
from cogvla.policy.model.heads.discrete import DiscreteHead
from cogvla.policy.model.heads.interface import ActionHead
from cogvla.policy.model.heads.regression import L1Head

HEADS: dict[str, type[ActionHead]] = {
    "l1": L1Head,
    "diffusion": DiffusionHead,
    "flow": FlowHead,
    "discrete": DiscreteHead,
}
