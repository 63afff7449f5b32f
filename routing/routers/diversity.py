"""ToDRE: keep tokens that are as different from each other as possible.

Projected tokens are scaled to length 1. The first one is the token with the most [CLS] attention; then the token least
similar to those already taken is added n-1 times. Similarity is that to the nearest of them (`kcenter`, version 1 of
the paper) or the sum over all (`maxsum`, version 2); the two give different sets. The paper's exit from the language
model is `late_exit`.

Our choice: `pivot: random` starts at a random token, for towers without attention; the paper finds that nearly as good.
The cost is n rounds of O(N D), for all samples together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import kept, unit

VARIANTS, PIVOTS = ("kcenter", "maxsum"), {"attention": "attention_LBN", "random": "draw_B"}


@register_router("diversity")
class Diversity(TokenRouter):
    """Keep tokens that differ from each other.

    Args:
        sizes: see `RouterSizes`.
        variant: `kcenter` or `maxsum`.
        pivot: first token: the one with the most `attention`, or a `random` one.
    """

    stage = "projector_out"

    def __init__(self, sizes: RouterSizes, *, variant: str = "kcenter", pivot: str = "attention") -> None:
        super().__init__(sizes)
        if variant not in VARIANTS or pivot not in PIVOTS:
            raise ValueError(
                f"diversity needs variant of {', '.join(VARIANTS)} and pivot of {', '.join(PIVOTS)}, "
                f"got {variant} and {pivot}"
            )
        self.variant, self.pivot = variant, pivot
        self.needs = frozenset({PIVOTS[pivot]})

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        x_BND, tokens = unit(tokens_BND), tokens_BND.shape[1]
        if self.pivot == "attention":
            assert context.attention_LBN is not None
            first_B = context.attention_LBN[-1].float().argmax(-1)
        else:
            assert context.draw_B is not None
            first_B = context.draw_B % tokens
        index_Bn = farthest(x_BND, first_B, context.budget, summed=self.variant == "maxsum")
        order_n = torch.arange(context.budget, 0, -1, device=x_BND.device, dtype=torch.float32)
        score_BN = torch.zeros_like(x_BND[..., 0]).scatter_(1, index_Bn, order_n.expand_as(index_Bn))
        return kept(tokens_BND, index_Bn, score_BN)


def farthest(unit_BND: Tensor, first_B: Tensor, count: int, summed: bool = False) -> Tensor:
    """Choose tokens one by one, each the least similar to those before; return indices [B,count] in that order.

    Args:
        unit_BND: tokens of length 1.
        first_B: index of the first token of each row.
        count: number of tokens to choose.
        summed: add the similarities to all chosen tokens; otherwise take the largest.
    """
    chosen_B1 = first_B[:, None]
    found, nearness_BN = [chosen_B1], None
    for _ in range(count - 1):
        row_B1D = unit_BND.gather(1, chosen_B1[..., None].expand(-1, -1, unit_BND.shape[-1]))
        similarity_BN = (unit_BND @ row_B1D.mT)[..., 0]
        if nearness_BN is None:
            nearness_BN = similarity_BN
        else:
            nearness_BN = nearness_BN + similarity_BN if summed else torch.maximum(nearness_BN, similarity_BN)
        nearness_BN = nearness_BN.scatter(1, chosen_B1, float("inf"))
        chosen_B1 = nearness_BN.argmin(1, keepdim=True)
        found.append(chosen_B1)
    return torch.cat(found, dim=1)
