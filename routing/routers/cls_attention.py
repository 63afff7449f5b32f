"""Attention of [CLS]: FasterVLM ("[CLS] Attention is All You Need...") with one layer, VTC-CLS ("[CLS] Token Tells
Everything...") with several.

The score of a patch is the head-mean attention that [CLS] gives it, softmax over everything and not normalised again,
at the layer whose output is used; VTC-CLS sums the last layers. The K best stay in their spatial order.

Our choices: `layers` counts from the layer that feeds the projector backwards, since VTC-CLS gives no default; a tower
without [CLS] gives the mean attention that a patch receives (the context says so); `outliers` takes out registers in
disguise, tokens longer than so many medians (the effect that DAMRO warns of), off by default.
"""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept


class ClsAttention(TokenRouter):
    """Keeps what [CLS] looks at.

    Args:
        sizes: see `RouterSizes`.
        layers: how many of the last layers are summed.
        outliers: tokens longer than so many times the median norm are not kept before the others; None: no limit.
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
            score_BN = score_BN - outlier_BN * (score_BN.amax() + 1)
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)
