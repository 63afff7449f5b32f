"""Attention diversity: tokens of a picture should not all look at the same few others.

Source: ADL of "Robustifying Token Attention for Vision Transformers" (Guo et al. 2023), whose weight is 1.0. In every
layer, A is the attention [n,n], mean over heads, and m the mean of its rows. In both, what is not above 2/n becomes 0:

    loss = mean over layers and rows of cos(m, A_row)

A network with this loss is said to stand camera noise better. It also spreads attention, so that token routers that go
by attention choose others: an experiment in itself.

Ours: it is asked of both vision towers, and of all tokens in them. In the last block with stage 1, only the rows of
the aggregation tokens are computed, and only those count. The paper's other part, attention over pooled tokens (TAP),
changes the network and is not here.

The attention is computed in addition to the fused kernels, n x n numbers per head and block. This makes it the most
expensive objective in `policy/training/auxiliary`. With `training.gradient_checkpointing` it is not kept for the
backward pass.

Shape legend: X rows (samples times views), S tokens with all prefixes, Q rows of the attention, F tower width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from cogvla.policy.model.attention_probe import mean_attention
from cogvla.policy.model.recompute import call
from cogvla.policy.model.vision import DualVision, VisionTower

THRESHOLD = 2.0
"""In units of even attention, 1/n."""


class AttentionDiversity:
    """An `Observer` of one forward pass that adds up the loss of every block it is shown."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def __call__(self, tower: VisionTower, index: int, x_XSF: Tensor) -> None:
        rows = x_XSF.shape[1]
        if tower.aggregation is not None and index == tower.computed - 1:
            rows = len(tower.aggregation.tokens)
        self.terms.append(call(tower.recompute, _block_similarity, tower.vit.blocks[index], x_XSF, rows))

    def loss(self) -> Tensor:
        """Mean over the blocks of both towers, between 0 and 1."""
        return torch.stack(self.terms).mean()


def row_similarity(attention_XQS: Tensor) -> Tensor:
    """Mean cosine of the rows to their mean, in [0,1]; a row without an entry above the threshold counts as 0.

    Args:
        attention_XQS: mean over heads, rows sum to 1.
    """
    threshold = THRESHOLD / attention_XQS.shape[-1]
    mean_X1S = attention_XQS.mean(1, keepdim=True)
    mean_X1S, rows_XQS = (torch.where(x > threshold, x, 0.0) for x in (mean_X1S, attention_XQS))
    return F.cosine_similarity(mean_X1S, rows_XQS, dim=-1).mean()


def check_readable(vision: DualVision) -> None:
    """ValueError where a tower's attention is of a kind that cannot be computed beside it."""
    for name, tower in vision.named_towers():
        for block in tower.vit.blocks[: tower.computed]:
            if type(block.attn) is not Attention:
                raise ValueError(
                    f"objective.diversity reads the attention of the vision towers, and {name} has a "
                    f"{type(block.attn).__name__}, which does not show it; set it to 0, or choose another tower"
                )


def _block_similarity(block: Any, x_XSF: Tensor, rows: int) -> Tensor:
    return row_similarity(mean_attention(block, x_XSF, slice(x_XSF.shape[1] - rows, None)))
