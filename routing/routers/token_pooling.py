"""Token-aware average pooling (TAP of "Robustifying Token Attention"): each token chooses how far it looks around.

    token' = sum over d = 0..3 of w_d mean of the 3 x 3 patches at distance d        d = 0: the token itself

w = softmax(Linear(token)): four weights for each token. A camera's noise in one patch then matters less, in particular
for attention, which otherwise concentrates on few tokens. The paper's other half is the loss `objective.diversity`.

The paper pools the input of attention layers inside the network. Our choices: here the output of the towers is pooled,
before another router chooses; at the border only patches inside of the picture count; training starts with 95 % of the
weight on the token itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvla.routing.registry import register_router
from cogvla.routing.router import RouterContext, RouterSizes
from cogvla.routing.routers.refining import RefiningRouter

DISTANCES = (1, 2, 3)
START = 4.0
"""First logit of the token itself; those of the means are 0."""


@register_router("token_pooling")
class TokenPooling(RefiningRouter):
    """Mix each token with means of its surroundings, then run another router.

    Args:
        sizes: see `RouterSizes`.
        base: name of the other router.
        base_options: options of that router.
    """

    needs = frozenset({"grid"})
    stages = ("encoder_out", "projector_out")

    def __init__(
        self, sizes: RouterSizes, *, base: str = "identity", base_options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(sizes, base, base_options)
        self.weigh = nn.Linear(sizes.width, 1 + len(DISTANCES))
        nn.init.zeros_(self.weigh.weight)
        with torch.no_grad():
            self.weigh.bias.copy_(torch.tensor([START] + [0.0] * len(DISTANCES)))

    def refine(self, tokens_BND: Tensor, context: RouterContext) -> Tensor:
        assert context.grid is not None
        weight_BN4 = self.weigh(tokens_BND.to(self.weigh.weight.dtype)).float().softmax(-1)
        x_BND = tokens_BND.float()
        levels_BND4 = torch.stack([x_BND, *(around(x_BND, context.grid, d) for d in DISTANCES)], dim=-1)
        return (levels_BND4 @ weight_BN4[..., None])[..., 0].to(tokens_BND.dtype)


def around(x_BND: Tensor, grid: tuple[int, int], distance: int) -> Tensor:
    """Return for each token the mean of the 3 x 3 tokens at this distance in rows and columns, itself included."""
    x_X1HW = rearrange(x_BND, "b (h w) d -> (b d) 1 h w", h=grid[0])
    kernel_1133 = x_BND.new_ones(1, 1, 3, 3)
    total_X1HW, count_11HW = (
        F.conv2d(t, kernel_1133, padding=distance, dilation=distance) for t in (x_X1HW, torch.ones_like(x_X1HW[:1]))
    )
    return rearrange(total_X1HW / count_11HW, "(b d) 1 h w -> b (h w) d", d=x_BND.shape[-1])
