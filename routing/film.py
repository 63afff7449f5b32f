"""Feature-wise linear modulation (FiLM): the instruction scales and shifts features (EFA step 1).

Shape legend: B batch, V views, X = B*V, N tokens, E summary width, W feature width, L blocks.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


class FiLM(nn.Module):
    """Scale and shift of `x * (1 + W_s e) + W_b e`, for all blocks of a stack with one matrix product.

    Args:
        summary_width: E.
        width: W.
        blocks: L.
        init: standard deviation of scale and shift before training, for a summary of unit variance. 0: the identity;
            None: PyTorch's default for linear layers.
    """

    def __init__(self, summary_width: int, width: int, blocks: int, init: float | None = None) -> None:
        super().__init__()
        self.width, self.blocks = width, blocks
        self.project = nn.Linear(summary_width, blocks * 2 * width)
        if init is not None:
            nn.init.normal_(self.project.weight, std=init * summary_width**-0.5)
            nn.init.zeros_(self.project.bias)

    def forward(self, summary_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Return `1 + scale` and shift, both [L,B,1,W], for the summaries [B,E]."""
        film_2LB1W = rearrange(
            self.project(summary_BE), "b (l two w) -> two l b 1 w", two=2, l=self.blocks, w=self.width
        )
        return film_2LB1W[0] + 1, film_2LB1W[1]


def modulate(x_XNW: Tensor, scale_B1W: Tensor, shift_B1W: Tensor) -> Tensor:
    """Return `x * scale + shift` for the tokens [B*V,N,W] of all views; `scale` already includes the 1."""
    x_BVNW = x_XNW.unflatten(0, (len(scale_B1W), -1))
    return torch.addcmul(shift_B1W[:, None], x_BVNW, scale_B1W[:, None]).flatten(0, 1)
