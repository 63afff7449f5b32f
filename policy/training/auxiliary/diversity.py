"""Attention diversity: the tokens of a picture should not all attend to the same few tokens.

Source: ADL of "Robustifying Token Attention for Vision Transformers" (Guo et al. 2023), with weight 1.0. In each layer,
A is the attention [n,n], mean over heads, and m the mean of its rows. In both, values up to 2/n are set to 0:

    loss = mean over layers and rows of cos(m, A_row)

It is reported to make networks more robust to camera noise. It also spreads the attention, which changes the choice of
token routers that use attention.

Here the loss covers all tokens of both vision towers. In the last block with stage 1, only the rows of the aggregation
tokens are computed, so only those count. The paper's other part, pooling (TAP), is the router
`token_pooling`.

The attention is computed in addition to the fused kernels, n x n numbers per head and block, which makes this the most
expensive loss in `policy/training/auxiliary`. With `training.gradient_checkpointing`, it is not stored for the backward
pass.

Shape legend: X rows (samples times views), S tokens with all prefixes, Q rows of the attention, F tower width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from cogvla.policy.model.recompute import call
from cogvla.policy.model.routers.attention_probe import mean_attention
from cogvla.policy.model.vision import DualVision, VisionTower

THRESHOLD = 2.0
"""Smallest attention that counts, in units of uniform attention, 1/n."""


class AttentionDiversity:
    """An `Observer` that collects the loss of every block in one forward pass."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def __call__(self, tower: VisionTower, index: int, x_XSF: Tensor) -> None:
        rows = x_XSF.shape[1]
        if tower.aggregation is not None and index == tower.computed - 1:
            rows = len(tower.aggregation.tokens)
        self.terms.append(call(tower.recompute, _block_similarity, tower.vit.blocks[index], x_XSF, rows))

    def loss(self) -> Tensor:
        """Return the mean over the blocks of both towers, in [0,1]."""
        return torch.stack(self.terms).mean()


def row_similarity(attention_XQS: Tensor) -> Tensor:
    """Return the mean cosine between the rows and their mean, in [0,1]; a row without values above the threshold has 0.

    Args:
        attention_XQS: attention, mean over heads; each row sums to 1.
    """
    threshold = THRESHOLD / attention_XQS.shape[-1]
    mean_X1S = attention_XQS.mean(1, keepdim=True)
    mean_X1S, rows_XQS = (torch.where(x > threshold, x, 0.0) for x in (mean_X1S, attention_XQS))
    return F.cosine_similarity(mean_X1S, rows_XQS, dim=-1).mean()


def check_readable(vision: DualVision) -> None:
    """Check that the attention of both towers can be computed.

    Raises:
        ValueError: a tower uses another attention module than timm's `Attention`.
    """
    for name, tower in vision.named_towers():
        for block in tower.vit.blocks[: tower.computed]:
            if type(block.attn) is not Attention:
                raise ValueError(
                    f"objective.diversity cannot read the attention of the vision tower {name}, which is a "
                    f"{type(block.attn).__name__}; set it to 0, or choose another tower"
                )


def _block_similarity(block: Any, x_XSF: Tensor, rows: int) -> Tensor:
    return row_similarity(mean_attention(block, x_XSF, slice(x_XSF.shape[1] - rows, None)))
