"""Predict the latents of all views after a chunk, from those before it, the robot's state and the executed actions.

    z [B,V,N,D] -> 3x3 -> block -> block -> 1x1 -> + z          a block: z + 3x3(gelu(norm(z) * scale + shift))
                            ^        ^   -> 3x3 -> 1x1 -> the error to expect of each patch
    state, chunk -> MLP -> scale, shift of each view

How well a patch can be predicted differs from patch to patch, and so does the error that is normal. What expects the
error has no influence on the prediction.

Shape legend: as in docs/architecture.md, with N patches of a view, D numbers of a latent, X views of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

BLOCKS = 2
SMALL = 1e-3


@dataclass(frozen=True)
class Prediction:
    """Predicted latents of pictures, and the errors to expect of them.

    Attributes:
        latents_BVND: their latents.
        expected_BVN, width_BVN: the logarithm of the mean squared error to expect of each patch, and the logarithm of
            the mean distance from it.
    """

    latents_BVND: Tensor
    expected_BVN: Tensor
    width_BVN: Tensor

    def unusual(self, later_BVND: Tensor) -> Tensor:
        """Return by how many times the expected distance the logarithm of each patch's error is too large, [B,V,N]."""
        return (self._log_error(later_BVND) - self.expected_BVN) * (-self.width_BVN).exp()

    def surprise(self, later_BVND: Tensor) -> Tensor:
        """Return the negative logarithm of the errors' likelihood, a Laplace distribution; they get no gradient."""
        return (self.unusual(later_BVND).abs() + self.width_BVN).mean()

    def _log_error(self, later_BVND: Tensor) -> Tensor:
        return ((self.latents_BVND.detach() - later_BVND).square().mean(-1) + SMALL).log()


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
        self.place = nn.Parameter(torch.zeros(views, channels, *grid))
        self.expect = nn.ModuleList((nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, 2, 1)))
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z_BVND: Tensor, state_BS: Tensor, chunk_BKA: Tensor) -> Prediction:
        """Predict; state and chunk are normalised."""
        given = [state_BS] + ([chunk_BKA.flatten(1)] if self.actions else [])
        condition = rearrange(
            self.condition(torch.cat(given, dim=1)), "b (v l two c) -> l two (b v) c 1 1", v=self.views, l=BLOCKS, two=2
        )
        x = rearrange(z_BVND, "b v (h w) d -> (b v) d h w", h=self.grid[0])
        x = self.enter(x) + self.position
        for norm, convolution, (scale, shift) in zip(self.norms, self.convolutions, condition, strict=True):
            x = x + convolution(F.gelu(norm(x) * (1 + scale) + shift))
        x = F.gelu(x)
        guess_BVND = z_BVND + rearrange(self.leave(x), "(b v) d h w -> b v (h w) d", v=self.views)
        x = F.gelu(self.expect[0](x.detach()) + self.place.repeat(len(z_BVND), 1, 1, 1))
        expected_BVN, width_BVN = rearrange(self.expect[1](x), "(b v) two h w -> two b v (h w)", v=self.views, two=2)
        return Prediction(guess_BVND, expected_BVN, width_BVN)
