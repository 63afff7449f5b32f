"""TokenFLEX: one policy for any number of vision tokens. The grid is pooled to h x w = n, and a SwiGLU layer follows.
Each training step draws n from `router.train_budgets`; after training, choose any `router.budget`.

Our choices: budgets are drawn uniformly, since the paper's probabilities are not known; the SwiGLU layer comes before
the policy's own projector, with a residual connection, and its output is 0 at first, so that it can be added to a
trained policy. Any other router can be trained with `train_budgets` too.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.spatial_pool import pooled
from cogvla.routing.selection import grid_shape


@register_router("flex_count")
class FlexCount(TokenRouter):
    """Pool the grid to any size, with one set of weights.

    Args:
        sizes: see `RouterSizes`.
        growth: hidden width of the SwiGLU layer as a multiple of the token width.
    """

    needs = frozenset({"grid"})
    stages = ("encoder_out", "projector_out")
    selects = False

    def __init__(self, sizes: RouterSizes, *, growth: float = 1.0) -> None:
        super().__init__(sizes)
        grid_shape(sizes.grid, sizes.budget)
        hidden = max(1, round(growth * sizes.width))
        self.gate, self.up = nn.Linear(sizes.width, hidden), nn.Linear(sizes.width, hidden)
        self.down = nn.Linear(hidden, sizes.width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def leaves(self, budget: int) -> int:
        grid_shape(self.sizes.grid, budget)
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        routed = pooled(tokens_BND, context.grid, grid_shape(context.grid, context.budget))
        x_BnD = routed.tokens_BnD.to(self.gate.weight.dtype)
        x_BnD = x_BnD + self.down(F.silu(self.gate(x_BnD)) * self.up(x_BnD))
        return replace(routed, tokens_BnD=x_BnD.to(tokens_BND.dtype))
