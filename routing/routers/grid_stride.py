"""Control: the picture is cut into K cells, and the patch in the middle of each stays. Even coverage without a look at
the content.

The budget must be a product h*w of nearly the grid's shape. Where the middle falls between patches, the later one is
taken: our choice.
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import cells, grid_shape, kept


class GridStride(TokenRouter):
    """Keeps a regular grid of patches."""

    needs = frozenset({"grid"})
    stages = ("encoder_out", "projector_out")

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__(sizes)
        grid_shape(sizes.grid, sizes.budget)

    def leaves(self, budget: int) -> int:
        grid_shape(self.sizes.grid, budget)
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        _, middle_K = cells(context.grid, grid_shape(context.grid, context.budget), tokens_BND.device)
        return kept(tokens_BND, middle_K.expand(len(tokens_BND), -1))
