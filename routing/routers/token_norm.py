"""Control: the longest tokens stay. Attention and sensitivity scores often follow the norm, so it has to be beaten."""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.router import RoutedTokens, RouterContext, TokenRouter
from cogvla.routing.selection import best, kept


class TokenNorm(TokenRouter):
    """Keeps the tokens of the largest Euclidean norm."""

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        score_BN = tokens_BND.float().norm(dim=-1)
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)
