"""LaVIT's dynamic tokenizer without its codebook: a selector chooses the patches that stay, and a merger adds the
content of the dropped patches to them.

Selector: an MLP with two logits per token. In training Gumbel noise is added, and kept tokens are multiplied by 1, with
the gradient of the keep probability (straight-through). Merger: kept tokens use causal self-attention, then read the
dropped ones by cross-attention. A regulariser keeps the mean keep probability at the budget.

Our choices: exactly n tokens stay, those with the largest difference of logits (the number varies in LaVIT), so that
the regulariser is of each sample, not of a batch; one block each; the regulariser's weight is 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvla.routing.attention_block import AttentionBlock
from cogvla.routing.draws import uniform
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept, straight_through

RATE_WEIGHT = 2.0


@register_router("selector_merger")
class SelectorMerger(TokenRouter):
    """Keep the best tokens and merge the others into them.

    Args:
        sizes: see `RouterSizes`.
        heads: attention heads of the merger.
    """

    needs = frozenset({"draw_B"})
    selects = False

    def __init__(self, sizes: RouterSizes, *, heads: int = 4) -> None:
        super().__init__(sizes)
        width = sizes.width
        self.selector = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, 2)
        )
        self.among, self.reading = AttentionBlock(width, heads), AttentionBlock(width, heads, width)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.draw_B is not None
        x_BND = tokens_BND.to(self.among.out.weight.dtype)
        logit_BN2 = self.selector(x_BND).float()
        if context.training:
            noise_BN2 = uniform(context.draw_B, x_BND.shape[1], 2).clamp(1e-6, 1 - 1e-6)
            logit_BN2 = logit_BN2 - (-noise_BN2.log()).log()
        score_BN = logit_BN2[..., 1] - logit_BN2[..., 0]
        probability_BN = score_BN.sigmoid()
        index_Bn = best(score_BN.detach(), context.budget)
        kept_BN = torch.zeros_like(score_BN, dtype=torch.bool).scatter(1, index_Bn, 1)
        y_BnD = straight_through(kept(x_BND, index_Bn), probability_BN).tokens_BnD
        before_1nn = torch.ones(context.budget, context.budget, dtype=torch.bool, device=x_BND.device).tril()[None]
        y_BnD = self.among(y_BnD, mask=before_1nn)
        if context.budget < x_BND.shape[1]:
            y_BnD = self.reading(y_BnD, x_BND, ~kept_BN[:, None])
        losses = {}
        if context.training:
            rate = context.budget / x_BND.shape[1]
            losses["rate"] = RATE_WEIGHT * (probability_BN.mean(1) - rate).square().mean()
        return RoutedTokens(
            y_BnD.to(tokens_BND.dtype), torch.full_like(index_Bn, -1), index_Bn, score_BN, losses=losses
        )
