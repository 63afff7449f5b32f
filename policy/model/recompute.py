"""Gradient checkpointing: keep the input of a block only, and compute the block again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def call(recompute: bool, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; with `recompute`, what it computes inside is not kept for the backward pass.

    Gradients are the same. Whatever the function returns counts; what it changes in passing happens twice.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
