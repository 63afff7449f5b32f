"""Control: adaptive average pooling of the grid to h x w = n tokens (the pooling of TokenFLEX without its projector).

Our choice: a pooled token's place is the patch in the middle of its cell. If the cells do not divide the grid, they
overlap, and a patch in the overlap counts for both, as in PyTorch; `owner_BN` names one of them.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import cells, grid_shape


@register_router("spatial_pool")
class SpatialPool(TokenRouter):
    """Pool the grid to means of blocks of patches."""

    needs = frozenset({"grid"})
    stages = ("encoder_block", "encoder_out", "projector_out")
    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__(sizes)
        grid_shape(sizes.grid, sizes.budget)

    def leaves(self, budget: int) -> int:
        grid_shape(self.sizes.grid, budget)
        return budget

    def shape(self, budget: int) -> tuple[int, int]:
        return grid_shape(self.sizes.grid, budget)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        return pooled(tokens_BND, context.grid, grid_shape(context.grid, context.budget))


def pooled(tokens_BND: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> RoutedTokens:
    """Pool tokens [B,H*W,D] to the means of h*w cells, in float32.

    Args:
        tokens_BND: tokens in row order.
        grid: (H, W).
        shape: (h, w).
    """
    x_BDHW = rearrange(tokens_BND.float(), "b (h w) d -> b d h w", h=grid[0])
    means_BnD = rearrange(F.adaptive_avg_pool2d(x_BDHW, shape), "b d h w -> b (h w) d")
    cell_N, middle_n = cells(grid, shape, tokens_BND.device)
    place_Bn, owner_BN = middle_n.expand(len(tokens_BND), -1), cell_N.expand(len(tokens_BND), -1)
    return RoutedTokens(means_BnD.to(tokens_BND.dtype), place_Bn.new_full(place_Bn.shape, -1), place_Bn, None, owner_BN)
