"""Keep the patches with the most [CLS] attention: FasterVLM ("[CLS] Attention is All You Need...") with one layer,
VTC-CLS ("[CLS] Token Tells Everything...") with several.

The score of a patch is the attention that it gets from [CLS], mean over heads, at the layer whose output is used. The
softmax is over all tokens, and scores are not normalised again. VTC-CLS sums the last layers. The n best patches stay
in their spatial order.

Our choices: `layers` counts backwards from the layer that feeds the projector, since VTC-CLS gives no default; with a
tower without [CLS], the score is the mean attention that a patch gets from all patches; `outliers` (off by default)
moves very long tokens behind all others, because they act as registers (the effect that DAMRO warns of).
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept


@register_router("cls_attention")
class ClsAttention(TokenRouter):
    """Keep the tokens with the most [CLS] attention.

    Args:
        sizes: see `RouterSizes`.
        layers: number of last layers whose attention is summed.
        outliers: tokens with a norm above this multiple of the median norm are kept last; None: no limit.
    """

    needs = frozenset({"attention_LBN"})

    def __init__(self, sizes: RouterSizes, *, layers: int = 1, outliers: float | None = None) -> None:
        super().__init__(sizes)
        if layers < 1 or (outliers is not None and outliers <= 1):
            raise ValueError(f"cls_attention needs layers >= 1 and outliers > 1 or null, got {layers} and {outliers}")
        self.layers, self.outliers = layers, outliers

    def attention_blocks(self, depth: int) -> range:
        if self.layers > depth:
            raise ValueError(f"cls_attention.layers is {self.layers}, the tower computes {depth} layers")
        return range(depth - self.layers, depth)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.attention_LBN is not None
        score_BN = context.attention_LBN.float().sum(0)
        if self.outliers is not None:
            norm_BN = tokens_BND.float().norm(dim=-1)
            outlier_BN = norm_BN > self.outliers * norm_BN.median(dim=1, keepdim=True).values
            score_BN = score_BN - outlier_BN * (score_BN.amax(1, keepdim=True) + 1)
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)
