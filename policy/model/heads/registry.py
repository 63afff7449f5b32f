"""Every action head by its name in `head.kind`. A new one is a file beside this and a line here."""

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
