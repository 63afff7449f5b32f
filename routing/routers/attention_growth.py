"""CATP, second stage: inside the language model, keep the tokens to which attention grows from one layer to the next.

score = max(0, A_l - A_{l-1}) + 0.6 cos(hidden, mean hidden of the words); A_l is the attention that a token gets at
layer l.

Our choices: attention comes from the action tokens instead of the last prompt token; one layer instead of two, and no
difference between vision tokens, since policies here see one moment (the paper prunes the context pictures first, then
the query's).
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.facility_location import mean_word
from cogvla.routing.selection import best, kept, unit


@register_router("attention_growth")
class AttentionGrowth(TokenRouter):
    """Keep the tokens to which attention grows.

    Args:
        sizes: see `RouterSizes`.
        text: weight of the similarity to the mean word.
    """

    needs = frozenset({"growth_BN", "text_BTE"})
    stage = "llm_layer"
    stages = ("llm_layer",)

    def __init__(self, sizes: RouterSizes, *, text: float = 0.6) -> None:
        super().__init__(sizes)
        self.text = text

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.growth_BN is not None
        fit_BN = (unit(tokens_BND) @ unit(mean_word(context))[..., None])[..., 0]
        score_BN = context.growth_BN.float().clamp_min(0) + self.text * fit_BN
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)
