"""A model small enough for tests, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch

from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.config import CogVLAConfig

ROBOT = Embodiment("toy", (Camera("front", 32, 32), Camera("wrist", 32, 32)), 5, 3, 4, 20.0)
TOWER = {"patch_size": 8, "width": 16, "depth": 3, "heads": 2, "mlp_ratio": 2.0}
MODEL: dict[str, Any] = {
    "vision": {
        "dinov2": {**TOWER, "class_token": True, "registers": 2, "layer_scale": 0.5},
        "siglip": {**TOWER, "width": 24, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "aggregation_tokens": 6,
    },
    "language": {
        "vocab_size": 50,
        "width": 32,
        "intermediate": 48,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "bos_token": 48,
        "stop_token": 49,
        "init_std": 0.15,
        "embedding_std": 1.0,
    },
}


def tiny_config(head: dict[str, Any] | None = None, **routing: Any) -> CogVLAConfig:
    """A small configuration; `routing` options override the defaults."""
    return CogVLAConfig.from_dict({**MODEL, "head": head or {}, "routing": {"film_init": 1.0, **routing}})


def tiny_model(head: dict[str, Any] | None = None, seed: int = 0, **routing: Any) -> CogVLA:
    """A small model with reproducible weights, in which the order of the words counts as after training."""
    torch.manual_seed(seed)
    model = CogVLA(tiny_config(head, **routing), ROBOT)
    if model.order is not None:
        torch.nn.init.normal_(model.order.up.weight, std=0.1)
    return model


def tiny_input(lengths: tuple[int, ...] = (3, 7, 5), seed: int = 0) -> ModelInput:
    """One sample per text length, padded to the longest; the pads hold a real word's id, so that a leak shows."""
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    return ModelInput(
        pixels=torch.randint(0, 256, (batch, 2, 3, 32, 32), dtype=torch.uint8, generator=generator),
        text_ids=torch.randint(1, 48, (batch, longest), generator=generator),
        text_mask=torch.arange(longest) < torch.tensor(lengths)[:, None],
        state=torch.randn(batch, 5, generator=generator),
    )


def alone(inputs: ModelInput, index: int) -> ModelInput:
    """Sample `index` as a batch of one without padding."""
    words = int(inputs.text_mask[index].sum())
    pick = slice(index, index + 1)
    return ModelInput(
        inputs.pixels[pick], inputs.text_ids[pick, :words], inputs.text_mask[pick, :words], inputs.state[pick]
    )
