"""Control: tokens drawn at random ("All You Need Are Random Visual Tokens?", also "When Token Pruning is Worse than
Random", CVPR 2026). A router that does not beat it has learned nothing about what matters.

Our choice: the draw depends on the observation (`router.resample`), so that an evaluation averages over many draws and
still repeats exactly. At a language layer this is the paper's deep random pruning.
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.draws import uniform
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, TokenRouter
from cogvla.routing.selection import best, kept


@register_router("random")
class Random(TokenRouter):
    """Keep n random tokens; every subset is equally likely."""

    needs = frozenset({"draw_B"})

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.draw_B is not None
        score_BN = uniform(context.draw_B, tokens_BND.shape[1])
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)
