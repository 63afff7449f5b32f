"""Control: keep all tokens and ignore the budget. It measures the cost of the interface itself."""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, TokenRouter
from cogvla.routing.selection import kept


@register_router("identity")
class Identity(TokenRouter):
    """Keep all tokens."""

    scores = False

    def leaves(self, budget: int) -> int:
        return self.sizes.tokens

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        all_N = torch.arange(tokens_BND.shape[1], device=tokens_BND.device)
        return kept(tokens_BND, all_N.expand(len(tokens_BND), -1))
