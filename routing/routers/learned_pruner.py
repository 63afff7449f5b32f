"""CoViPAL: a small plug-in classifier scores vision tokens from vision and instruction; the best stay.

The paper trains it in two stages: first to predict the attention that tokens get deeper in the model, then end to end
with the task. Its code was not available, so this module is ours: LayerNorm, linear to `hidden`, a block that reads the
words, a block of self-attention among the tokens, one logit.

`guide` is the weight of the first stage's loss, KL(attention || softmax of logits). With `guide_layer`, as in the
paper, the attention is that of a deeper language layer, in a second pass over all tokens, which costs time in training
only; at inference nothing of it is computed. Without it, ours: the attention at the router's own stage.

Our choices: the guiding attention is that of the action tokens, the mean over heads; both losses are there in every
step, not one after the other, and the policy is not frozen (`finetune` can freeze it); end to end, kept tokens are
multiplied by 1, with the gradient of their probability (straight-through); the loss 0.1 (mean probability - n/N)^2
of each sample, which keeps n tokens, keeps its mean probability at the budget.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from cogvla.routing.attention_block import AttentionBlock
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept, straight_through

BUDGET_WEIGHT = 0.1


@register_router("learned_pruner")
class LearnedPruner(TokenRouter):
    """Keep the tokens with the best trained scores.

    Args:
        sizes: see `RouterSizes`.
        hidden: width of the scorer.
        heads: attention heads of the scorer.
        guide: weight of the first stage's loss; 0: none.
        guide_layer: language layer, deeper than the router, whose attention guides; None: the router's own stage.
    """

    stage = "projector_out"

    def __init__(
        self,
        sizes: RouterSizes,
        *,
        hidden: int = 64,
        heads: int = 4,
        guide: float = 0.0,
        guide_layer: int | None = None,
    ) -> None:
        super().__init__(sizes)
        if hidden < 1:
            raise ValueError(f"learned_pruner needs hidden >= 1, got {hidden}")
        if guide < 0 or (guide_layer is not None and not guide):
            raise ValueError(f"learned_pruner needs guide >= 0, and above 0 for a guide_layer, got {guide}")
        self.guide, self.guide_layer = guide, guide_layer
        own = guide > 0 and guide_layer is None
        self.needs = frozenset({"text_BTE"}) | (frozenset({"attention_LBN"}) if own else frozenset())
        self.entry_norm, self.entry = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, hidden)
        self.words = AttentionBlock(hidden, heads, read_width=sizes.text_width)
        self.tokens = AttentionBlock(hidden, heads)
        self.logit_norm, self.logit = nn.LayerNorm(hidden), nn.Linear(hidden, 1)
        nn.init.constant_(self.logit.bias, math.log(max(sizes.budget, 1) / max(sizes.tokens - sizes.budget, 1)))

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_BTE is not None
        assert context.text_mask_BT is not None
        dtype = self.entry.weight.dtype
        h_BNC = self.entry(self.entry_norm(tokens_BND.to(dtype)))
        h_BNC = self.words(h_BNC, context.text_BTE.to(dtype), context.text_mask_BT[:, None])
        logit_BN = self.logit(self.logit_norm(self.tokens(h_BNC)))[..., 0].float()
        routed = kept(tokens_BND, best(logit_BN.detach(), context.budget), logit_BN)
        if not context.training:
            return routed
        probability_BN = logit_BN.sigmoid()
        share = context.budget / tokens_BND.shape[1]
        losses = {"budget": BUDGET_WEIGHT * (probability_BN.mean(1) - share).square().mean()}
        if self.guide:
            seen_BN = context.guide_BN
            if seen_BN is None:
                assert context.attention_LBN is not None
                seen_BN = context.attention_LBN.float().sum(0)
            target_BN = seen_BN.float().clamp_min(1e-12)
            target_BN = target_BN / target_BN.sum(-1, keepdim=True)
            distance_B = (target_BN * (target_BN.log() - logit_BN.log_softmax(-1))).sum(-1)
            losses["guide"] = self.guide * distance_B.mean()
        return replace(straight_through(routed, probability_BN), losses=losses)
