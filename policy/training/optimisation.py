"""Optimiser, learning-rate schedule and the exponential moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

OPTIMISERS = ("adamw", "adamw8bit")
BETAS = (0.9, 0.95)
LEARNING_RATE_FLOOR = 0.02
"""Last learning rate as a share of the highest."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters as groups for an optimiser: matrices with weight decay, and all others."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(module: nn.Module, learning_rate: float, weight_decay: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """Build AdamW with weight decay for parameters of two or more dimensions only, so not for norms and biases.

    Args:
        module: module whose parameters with `requires_grad` are trained.
        learning_rate: learning rate until it is changed.
        weight_decay: weight decay of matrices.
        kind: `adamw`, or `adamw8bit` (bitsandbytes), whose moments take 2 bytes per parameter instead of 8.

    Raises:
        ValueError: bitsandbytes is not installed, or does not work on this machine.
    """
    groups = parameter_groups(module, weight_decay)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as error:  # RuntimeError: its library does not fit this CUDA
        raise ValueError(
            f"training.optimiser=adamw8bit needs bitsandbytes ({error}): `uv pip install bitsandbytes`, "
            "or train with training.optimiser=adamw"
        ) from error
    return AdamW8bit(groups, lr=learning_rate, betas=BETAS)


def warmup_cosine(step: int, warmup_steps: int, steps: int, floor: float = LEARNING_RATE_FLOOR) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine down to `floor` at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class ExponentialAverage:
    """Exponential moving average of parameters; the decay increases to its final value over the first steps.

    Args:
        parameters: name -> parameter, the start of the average.
        decay: weight of the old average in each step, in [0,1); 0: the average is the current parameters.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0,1), got {decay}")
        self.decay = decay
        # Without decay, the average shares the memory of the parameters.
        self.average = {name: p.detach().clone() if decay else p.detach() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor], step: int) -> None:
        """Move the average towards the parameters after optimiser step number `step` (from 1)."""
        if not self.decay:
            return
        decay = min(self.decay, step / (step + 10))
        current = [parameters[name].detach() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)
