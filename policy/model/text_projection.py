"""Projects the states of a pretrained text encoder to the language model's width, in place of word embeddings.

Shape legend: B batch, T text tokens, E width of the encoder, D width of the language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TextProjection(nn.Module):
    """Standardise states [B,T,E] with the mean and deviation of the training instructions, LayerNorm, linear: [B,T,D].

    All states of a language model have much in common. Standardised, held-out wordings are understood better with
    SmolLM2, and equally well with MiniLM (docs/finetune.md).

    Args:
        encoder: E.
        width: D.
        std: standard deviation of the outputs at the start.

    Attributes:
        mean_E: mean of the states of all words, saved with the weights.
        std_E: their standard deviation.
    """

    mean_E: Tensor
    std_E: Tensor

    def __init__(self, encoder: int, width: int, std: float) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(encoder))
        self.register_buffer("std_E", torch.ones(encoder))
        self.norm = nn.LayerNorm(encoder)
        self.linear = nn.Linear(encoder, width)
        nn.init.normal_(self.linear.weight, std=std / encoder**0.5)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def fit(self, states_BTE: Tensor, mask_BT: Tensor) -> None:
        """Set mean and deviation to those of these words (mask: False on padding)."""
        words_WE = states_BTE[mask_BT]
        std_E = words_WE.std(0, correction=0)
        self.mean_E.copy_(words_WE.mean(0))
        # A number that hardly varies in few words must not be enlarged for others.
        self.std_E.copy_(std_E.clamp(min=0.1 * float(std_E.mean()) or 1.0))

    def forward(self, states_BTE: Tensor) -> Tensor:
        standard_BTE = (states_BTE - self.mean_E) / self.std_E
        normed_BTE = self.norm(standard_BTE.to(self.norm.weight.dtype))
        # The summary of the instruction is a sum of these: in the precision of other embeddings, also under autocast.
        return self.linear(normed_BTE.to(self.linear.weight.dtype)).to(normed_BTE.dtype)
