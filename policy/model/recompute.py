"""Gradient checkpointing: store only the input of a block, and compute the block again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def call(recompute: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)`; with `recompute`, intermediate results are not stored for the backward pass.

    Gradients are the same. The function runs twice then, so it must not have side effects.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
