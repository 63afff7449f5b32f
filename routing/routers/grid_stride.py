"""Control: keep a regular grid of patches, the middle one of each of n cells. It covers the picture evenly and ignores
the content.

The budget must be h*w for a grid h x w of nearly the same shape. Our choice: if the middle falls between two patches,
the later one is kept.
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import cells, grid_shape, kept


@register_router("grid_stride")
class GridStride(TokenRouter):
    """Keep a regular grid of patches."""

    needs = frozenset({"grid"})
    stages = ("encoder_out", "projector_out")
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
        _, middle_n = cells(context.grid, grid_shape(context.grid, context.budget), tokens_BND.device)
        return kept(tokens_BND, middle_n.expand(len(tokens_BND), -1))
