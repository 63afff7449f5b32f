"""Regression: an MLP with residual blocks, trained with L1 (OpenVLA-OFT, Kim et al. 2025; CogVLA).

Shape legend: as in `heads.interface`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from cogvla.policy.model.heads.interface import ActionHead, HeadSizes


class ResidualBlock(nn.Module):
    """`x + ReLU(Linear(LayerNorm(x)))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


def residual_mlp(sizes: HeadSizes, outputs: int) -> nn.Sequential:
    """Build the MLP: LayerNorm, Linear, ReLU, residual blocks, LayerNorm, Linear to `outputs` numbers."""
    return nn.Sequential(
        nn.LayerNorm(sizes.joined),
        nn.Linear(sizes.joined, sizes.width),
        nn.ReLU(),
        *(ResidualBlock(sizes.width) for _ in range(sizes.blocks)),
        nn.LayerNorm(sizes.width),
        nn.Linear(sizes.width, outputs),
    )


class L1Head(ActionHead):
    """Predict one number per action dimension; L1 trains it to the median of the experts' actions."""

    error_name: ClassVar[str] = "l1"

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__(sizes)
        self.net = residual_mlp(sizes, sizes.action_dim)

    def decode(self, states_BJD: Tensor) -> Tensor:
        return self.net(self.join(states_BJD))

    def error(
        self, states_BJD: Tensor, expert_BKA: Tensor, noise_BRKA: Tensor | None = None, time_BR: Tensor | None = None
    ) -> Tensor:
        """Return the absolute error [B,K], mean over action dimensions."""
        return (self.decode(states_BJD).float() - expert_BKA).abs().mean(dim=-1)
