"""Control: keep the tokens with the largest norm. Attention and sensitivity scores often follow the norm, so a good
router must be better than this one.
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, TokenRouter
from cogvla.routing.selection import best, kept


@register_router("token_norm")
class TokenNorm(TokenRouter):
    """Keep the tokens with the largest Euclidean norm."""

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        score_BN = tokens_BND.float().norm(dim=-1)
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)
