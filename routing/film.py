"""Feature-wise linear modulation (FiLM): the instruction scales and shifts features (EFA step 1).

Shape legend: B batch, V views, X = B*V, N tokens, E summary width, F feature width, L blocks.
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
        """Return `1 + scale` and shift, both [L,B,1,F], for the summaries [B,E]."""
        film_2LB1F = rearrange(
            self.project(summary_BE), "b (l two w) -> two l b 1 w", two=2, l=self.blocks, w=self.width
        )
        return film_2LB1F[0] + 1, film_2LB1F[1]


def modulate(x_XNF: Tensor, scale_B1F: Tensor, shift_B1F: Tensor) -> Tensor:
    """Return `x * scale + shift` for the tokens [B*V,N,F] of all views; `scale` already includes the 1."""
    x_BVNF = x_XNF.unflatten(0, (len(scale_B1F), -1))
    return torch.addcmul(shift_B1F[:, None], x_BVNF, scale_B1F[:, None]).flatten(0, 1)
