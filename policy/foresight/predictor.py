"""Predict the latents of all views after a chunk, from those before it, the robot's state and the executed actions.

    z [B,V,N,D] -> 3x3 -> block -> block -> 1x1 -> + z          a block: z + 3x3(gelu(norm(z) * scale + shift))
                            ^        ^
    state, chunk -> MLP -> scale, shift of each view

Shape legend: as in docs/architecture.md, with N patches of a view, D numbers of a latent, X views of a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

BLOCKS = 2


class Predictor(nn.Module):
    """A small convolutional network; before it is trained, it predicts that nothing changes.

    The instruction is no input: what a camera shows next must not depend on the words.

    Args:
        views: number V of cameras.
        grid: rows and columns of patches of a view.
        latent: number D of a latent's numbers.
        state: number S of the state's numbers.
        actions: number of all numbers of a chunk, K times A; 0: the chunk is no input.
        channels: width of the network.
    """

    def __init__(
        self, views: int, grid: tuple[int, int], latent: int, state: int, actions: int, channels: int = 64
    ) -> None:
        super().__init__()
        self.grid, self.actions, self.views = grid, actions, views
        self.enter = nn.Conv2d(latent, channels, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(channels, *grid))
        self.norms = nn.ModuleList(nn.GroupNorm(1, channels, affine=False) for _ in range(BLOCKS))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(BLOCKS))
        self.condition = nn.Sequential(
            nn.Linear(state + actions, channels), nn.GELU(), nn.Linear(channels, views * BLOCKS * 2 * channels)
        )
        self.leave = nn.Conv2d(channels, latent, 1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z_BVND: Tensor, state_BS: Tensor, chunk_BKA: Tensor) -> Tensor:
        """Return the predicted latents [B,V,N,D]; state and chunk are normalised."""
        given = [state_BS] + ([chunk_BKA.flatten(1)] if self.actions else [])
        condition = rearrange(
            self.condition(torch.cat(given, dim=1)), "b (v l two c) -> l two (b v) c 1 1", v=self.views, l=BLOCKS, two=2
        )
        x = rearrange(z_BVND, "b v (h w) d -> (b v) d h w", h=self.grid[0])
        x = self.enter(x) + self.position
        for norm, convolution, (scale, shift) in zip(self.norms, self.convolutions, condition, strict=True):
            x = x + convolution(F.gelu(norm(x) * (1 + scale) + shift))
        return z_BVND + rearrange(self.leave(F.gelu(x)), "(b v) d h w -> b v (h w) d", v=self.views)
