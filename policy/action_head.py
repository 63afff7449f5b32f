"""Action-token states to a chunk of normalised actions: an MLP with residual blocks, trained with L1.

Shape legend: B batch, K chunk, A action dimension, J action tokens (K or K*A), D width.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """`x + ReLU(Linear(LayerNorm(x)))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ActionHead(nn.Module):
    """All tokens of one step joined -> LayerNorm, Linear, ReLU, residual blocks, LayerNorm, Linear -> A numbers.

    Args:
        width: D.
        chunk: K.
        action_dim: A.
        tokens_per_step: tokens of one step, 1 or A.
        blocks: residual blocks.
    """

    def __init__(self, width: int, chunk: int, action_dim: int, tokens_per_step: int, blocks: int) -> None:
        super().__init__()
        self.chunk = chunk
        joined = width * tokens_per_step
        self.net = nn.Sequential(
            nn.LayerNorm(joined),
            nn.Linear(joined, width),
            nn.ReLU(),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.LayerNorm(width),
            nn.Linear(width, action_dim),
        )

    def forward(self, x_BJD: Tensor) -> Tensor:
        """States [B,J,D] to actions [B,K,A]."""
        return self.net(rearrange(x_BJD, "b (k a) d -> b k (a d)", k=self.chunk))
