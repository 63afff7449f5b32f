"""Fourier-VLM (later Fourier Compressor): reduce the token grid to a smaller one by keeping its low frequencies.

The orthonormal DCT-II of the H x W grid is computed in every channel; the inverse DCT of its h x w corner gives the
small grid. This multiplies the mean by sqrt(HW / hw). The authors fine-tune with this factor; `rescale` divides it out
for use without fine-tuning.

Our choices: rescaling by default; two small matrix products instead of an FFT; a token's place is the middle of its
cell. On smooth pictures the result is nearly that of average pooling (`spatial_pool`).

Shape legend: H x W and h x w grids, S rows or columns of a grid.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import cells, grid_shape


@register_router("frequency")
class Frequency(TokenRouter):
    """Reduce the grid to its low frequencies.

    Args:
        sizes: see `RouterSizes`.
        rescale: preserve the mean of the tokens.
    """

    needs = frozenset({"grid"})
    stages = ("encoder_out", "projector_out")
    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, rescale: bool = True) -> None:
        super().__init__(sizes)
        grid_shape(sizes.grid, sizes.budget)
        self.rescale = rescale

    def leaves(self, budget: int) -> int:
        grid_shape(self.sizes.grid, budget)
        return budget

    def shape(self, budget: int) -> tuple[int, int]:
        return grid_shape(self.sizes.grid, budget)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        grid, shape = context.grid, grid_shape(context.grid, context.budget)
        x_BHWD = rearrange(tokens_BND.float(), "b (h w) d -> b h w d", h=grid[0])
        # DCT and inverse DCT in one matrix per side.
        maps = [
            dct(small, x_BHWD.device).T @ dct(large, x_BHWD.device)[:small]
            for small, large in zip(shape, grid, strict=True)
        ]
        y_BhwD = einsum(x_BHWD, maps[0], maps[1], "b rows columns d, h rows, w columns -> b h w d")
        if self.rescale:
            y_BhwD = y_BhwD * math.sqrt(context.budget / (grid[0] * grid[1]))
        cell_N, middle_n = cells(grid, shape, tokens_BND.device)
        place_Bn, owner_BN = (x.expand(len(tokens_BND), -1) for x in (middle_n, cell_N))
        tokens_BnD = rearrange(y_BhwD, "b h w d -> b (h w) d").to(tokens_BND.dtype)
        return RoutedTokens(tokens_BnD, torch.full_like(place_Bn, -1), place_Bn, None, owner_BN)


def dct(size: int, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II as a matrix, float32 [size,size]; its transpose is the inverse."""
    position_S = torch.arange(size, device=device, dtype=torch.float32) + 0.5
    wave_SS = torch.cos(math.pi / size * torch.arange(size, device=device)[:, None] * position_S)
    return (
        wave_SS * torch.where(torch.arange(size, device=device) == 0, math.sqrt(1 / size), math.sqrt(2 / size))[:, None]
    )
