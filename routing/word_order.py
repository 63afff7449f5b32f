"""The order of the words, for the summary of the instruction that conditions the vision towers (EFA).

The mean of the word embeddings is a bag of words: "stack the red cube on the blue cube" and "stack the blue cube on the
red cube" have the same mean, so the towers cannot know which cube to look for. One transformer layer over the words,
with their positions, adds what their order says. The addition is zero before training, so that existing weights compute
what they did.

Shape legend: B batch, T words, D language width, E inner width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cogvla.routing.attention_block import AttentionBlock

INNER_WIDTH = 256
"""Largest width of the layer; embeddings of wide language models are projected down."""
HEAD_WIDTH = 32


class WordOrder(nn.Module):
    """Adds the order of the words to their mean.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = min(width, INNER_WIDTH)
        self.norm, self.down = nn.LayerNorm(width), nn.Linear(width, inner)
        heads = inner // HEAD_WIDTH if inner % HEAD_WIDTH == 0 else 1
        self.block, self.out_norm = AttentionBlock(inner, heads), nn.LayerNorm(inner)
        self.up = nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, words_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the addition to the mean [B,D]; padding, where the mask is False, changes nothing."""
        x_BTE = self.down(self.norm(words_BTD))
        x_BTE = self.block(x_BTE + positions(x_BTE), mask=mask_BT[:, None])
        weight_BT1 = mask_BT[..., None].to(x_BTE.dtype)
        return self.up((self.out_norm(x_BTE) * weight_BT1).sum(1) / weight_BT1.sum(1))


def positions(x_BTE: Tensor) -> Tensor:
    """Return the sine and cosine encoding [T,E] of the positions 0 to T-1, with the type and device of `x_BTE`."""
    length, width = x_BTE.shape[-2:]
    half = (width + 1) // 2
    rate_e = torch.exp(torch.arange(half, device=x_BTE.device) * (-math.log(10000.0) / half))
    angle_Te = torch.arange(length, device=x_BTE.device)[:, None] * rate_e
    return torch.cat((angle_Te.sin(), angle_Te.cos()), dim=-1)[:, :width].to(x_BTE.dtype)
