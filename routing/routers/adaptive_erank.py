"""AgilePruner: take tokens in order of attention and remove near-duplicates, with a threshold that adapts to the
complexity of the picture (effective rank of its tokens).

Tokens are visited in order of attention. The token of rank i (from 1) stays and removes later tokens whose cosine
distance to it is less than tau_i = min(0.01 * i * erank / mean erank, tau_max). erank = exp(entropy of the singular
values).

Our choices, since neither the code nor these values are published: the token matrix is not centred; ranks are those
before any removal; tau_max = 0.5; if too few tokens stay, removed ones fill the budget in order of attention; the
default of `mean_erank` is 0.16 N, about what the paper reports for 576 tokens. It depends on the towers: measure it
with `calibrate_router`. If it is too small, thresholds are too large, and candidates run out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import Calibrated, RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import effective_rank, kept, ranked, take, unit

USUAL = 0.16


@register_router("adaptive_erank")
class AdaptiveErank(TokenRouter, Calibrated):
    """Keep the tokens with the most attention, without near-duplicates.

    Args:
        sizes: see `RouterSizes`.
        mean_erank: mean effective rank of the policy's pictures; None: 0.16 N.
        step: growth of the distance threshold with the rank.
        limit: tau_max, the largest distance threshold.
    """

    needs = frozenset({"attention_LBN"})
    trouble = "run out of candidates, so that near-duplicates fill the budget"

    def __init__(
        self, sizes: RouterSizes, *, mean_erank: float | None = None, step: float = 0.01, limit: float = 0.5
    ) -> None:
        super().__init__(sizes)
        if (mean_erank is not None and mean_erank <= 0) or step < 0 or limit < 0:
            raise ValueError("adaptive_erank needs a positive mean_erank, and step and limit that are not negative")
        self.mean_erank, self.step, self.limit = mean_erank or USUAL * sizes.tokens, step, limit

    def observed(self, tokens_BND: Tensor, context: RouterContext) -> Tensor:
        return effective_rank(tokens_BND)

    def fitted(self, mean: Tensor) -> dict[str, float]:
        return {"mean_erank": float(mean)}

    def troubled(self, tokens_BND: Tensor, context: RouterContext) -> Tensor:
        return self._visit(tokens_BND, context)[1] > 0

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.attention_LBN is not None
        index_Bn, _ = self._visit(tokens_BND, context)
        return kept(tokens_BND, index_Bn, context.attention_LBN.float().sum(0))

    def _visit(self, tokens_BND: Tensor, context: RouterContext) -> tuple[Tensor, Tensor]:
        """Return the kept tokens [B,n], and how many of them had been removed before, int64 [B]."""
        assert context.attention_LBN is not None
        score_BN, tokens = context.attention_LBN.float().sum(0), tokens_BND.shape[1]
        order_BN = ranked(score_BN)
        x_BND = take(unit(tokens_BND), order_BN)  # from here on, a token's index is its rank
        growth_B1 = self.step * effective_rank(tokens_BND)[:, None] / self.mean_erank
        rank_N = torch.arange(1, tokens + 1, device=x_BND.device)
        near_BN = (growth_B1 * rank_N).clamp_max(self.limit)
        late_BN, refilled_B1 = torch.zeros_like(score_BN), torch.zeros_like(order_BN[:, :1])  # 1: removed, 2: kept
        for _ in range(context.budget):
            head_B1 = (late_BN * tokens + rank_N).argmin(1, keepdim=True)
            refilled_B1 = refilled_B1 + late_BN.gather(1, head_B1).long()
            distance_BN = (1 - (x_BND @ take(x_BND, head_B1).mT)[..., 0]).clamp_min(0)
            double_BN = distance_BN < near_BN.gather(1, head_B1)
            late_BN = torch.maximum(late_BN, double_BN.to(late_BN)).scatter(1, head_B1, 2.0)
        first_BN = (late_BN == 2).int().sort(dim=1, descending=True, stable=True).indices
        return order_BN.gather(1, first_BN)[:, : context.budget], refilled_B1[:, 0]
