"""TokenFLEX: one policy for any number of vision tokens. The grid is pooled to h x w = n, and a SwiGLU layer follows.
Each training step draws n from `router.train_budgets`; after training, choose any `router.budget`.

- `variant: projector`, the paper's: the SwiGLU layer W3 (SiLU(W1 x) * W2 x) is the projector. The policy's own
  projector is not used, so the policy must be trained with it.
- `variant: added`, the default, ours: the layer comes before the policy's own projector, with a residual connection,
  and its output is 0 at first, so that it can be added to a trained policy.

Our choices: budgets are drawn uniformly, and the hidden width is `growth` times that of the tokens, since the paper's
probabilities and widths are not known. Any other router can be trained with `train_budgets` too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.spatial_pool import pooled
from cogvla.routing.selection import grid_shape

VARIANTS = ("added", "projector")


@register_router("flex_count")
class FlexCount(TokenRouter):
    """Pool the grid to any size, with one set of weights.

    Args:
        sizes: see `RouterSizes`.
        growth: hidden width of the SwiGLU layer as a multiple of the token width.
        variant: `added` or `projector`.
    """

    needs = frozenset({"grid"})
    stages: ClassVar[tuple[str, ...]] = ("encoder_out", "projector_out")
    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, growth: float = 1.0, variant: str = "added") -> None:
        super().__init__(sizes)
        grid_shape(sizes.grid, sizes.budget)
        if variant not in VARIANTS or growth <= 0:
            raise ValueError(
                f"flex_count needs variant of {', '.join(VARIANTS)} and growth above 0, got {variant} and {growth}"
            )
        self.projects = variant == "projector"
        if self.projects:
            self.stages = ("encoder_out",)  # type: ignore[misc]
        hidden = max(1, round(growth * sizes.width))
        self.gate, self.up = nn.Linear(sizes.width, hidden), nn.Linear(sizes.width, hidden)
        self.down = nn.Linear(hidden, sizes.text_width if self.projects else sizes.width)
        if not self.projects:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def leaves(self, budget: int) -> int:
        grid_shape(self.sizes.grid, budget)
        return budget

    def shape(self, budget: int) -> tuple[int, int]:
        return grid_shape(self.sizes.grid, budget)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        routed = pooled(tokens_BND, context.grid, grid_shape(context.grid, context.budget))
        x_BnD = routed.tokens_BnD.to(self.gate.weight.dtype)
        out_BnD = self.down(F.silu(self.gate(x_BnD)) * self.up(x_BnD))
        return replace(routed, tokens_BnD=(out_BnD if self.projects else x_BnD + out_BnD).to(tokens_BND.dtype))
