"""Classification: each action dimension is one of 256 tokens, all decoded in parallel.

Tokens are those of OpenVLA (Kim et al. 2024, after RT-2, Brohan et al. 2023): 256 edges from -1 to 1; token i is for
values from edge i to edge i+1, and its value is the middle of the two. The last token is for the value 1 only; it has
the value of the token before.

Shape legend: as in `heads.interface`; N = 256 tokens.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvla.policy.model.heads.interface import ActionHead, HeadSizes
from cogvla.policy.model.heads.regression import residual_mlp

TOKENS = 256


def encode(values: Tensor) -> Tensor:
    """Convert values to tokens, int64 of the same shape; values outside [-1,1] are clamped."""
    return ((values.clamp(-1, 1) + 1) * ((TOKENS - 1) / 2)).floor().long()


def decode(tokens: Tensor) -> Tensor:
    """Convert tokens to values, float32 of the same shape."""
    return (2 * tokens.clamp(max=TOKENS - 2).float() + 1) / (TOKENS - 1) - 1


class DiscreteHead(ActionHead):
    """Decodes the most probable token of each action dimension; trained with cross-entropy."""

    error_name: ClassVar[str] = "ce"

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__(sizes)
        self.net = residual_mlp(sizes, sizes.action_dim * TOKENS)

    def logits(self, states_BJD: Tensor) -> Tensor:
        """Return the logits of all tokens, float32 [B,K,A,N]."""
        return rearrange(self.net(self.join(states_BJD)), "b k (a n) -> b k a n", n=TOKENS).float()

    def decode(self, states_BJD: Tensor) -> Tensor:
        return decode(self.logits(states_BJD).argmax(-1))

    def error(
        self, states_BJD: Tensor, expert_BKA: Tensor, noise_BRKA: Tensor | None = None, time_BR: Tensor | None = None
    ) -> Tensor:
        """Return the cross-entropy [B,K], mean over action dimensions, divided by that of a uniform prediction."""
        logits_BNKA = rearrange(self.logits(states_BJD), "b k a n -> b n k a")
        return F.cross_entropy(logits_BNKA, encode(expert_BKA), reduction="none").mean(-1) / math.log(TOKENS)
