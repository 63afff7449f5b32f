"""CogVLA's LFP as a router: the instruction modulates vision tokens, a linear layer scores them, the best stay.

In the policy's own stage 2 (`routing.lfp`, `routing/pruning.py`), every routed layer does this with its own keep ratio,
and the probability scales a kept token's output of the layer. Here the same module decides once, so that it can be
compared with other routers at the same budget.

Our choices: the summary is the mean of the words, without the state; kept tokens are multiplied by 1, with the gradient
of their probability (straight-through), since a router has no access to a layer's output.
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.pruning import FiLMRouter
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.facility_location import mean_word
from cogvla.routing.selection import best, kept, straight_through


@register_router("film_pruning")
class FiLMPruning(TokenRouter):
    """Keep the tokens that a trained score, modulated by the instruction, finds best."""

    needs = frozenset({"text_BTE"})
    stage = "projector_out"
    stages = ("projector_out", "llm_layer")

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__(sizes)
        self.scorer = FiLMRouter(sizes.width)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        dtype = self.scorer.logits.weight.dtype
        score_BN = self.scorer.score(tokens_BND.to(dtype), mean_word(context)[:, None].to(dtype)).float()
        routed = kept(tokens_BND, best(score_BN.detach(), context.budget), score_BN)
        return straight_through(routed, score_BN.sigmoid()) if context.training else routed
