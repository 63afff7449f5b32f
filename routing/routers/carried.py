"""Reuse the scores of the router before the language model at language layers, as VFlowOpt does: no attention has to be
computed there. Set `router.layer_router=carried` with `router.layers` and `router.layer_budgets`;
`routing.schedule_search` finds the budgets.
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, TokenRouter
from cogvla.routing.selection import best, kept


@register_router("carried")
class Carried(TokenRouter):
    """Keep the best of the remaining tokens, by the scores of the router before the language model."""

    needs = frozenset({"score_BN"})
    stage = "llm_layer"
    stages = ("llm_layer",)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.score_BN is not None
        return kept(tokens_BND, best(context.score_BN, context.budget), context.score_BN)
