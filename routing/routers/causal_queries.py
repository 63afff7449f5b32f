"""SEED's causal Q-Former without its codebook: n learned queries read the tokens, and each query attends only to the
queries before it. So the first k queries are a valid shorter result, and one training with `router.train_budgets`
covers all budgets.

Our choices: two blocks of causal self-attention and cross-attention, where the paper uses a whole Q-Former; queries are
spread evenly over the places of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvla.routing.attention_block import AttentionBlock
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import synthetic


@register_router("causal_queries")
class CausalQueries(TokenRouter):
    """Resample the tokens with learned queries, the most important ones first.

    Args:
        sizes: see `RouterSizes`.
        blocks: number of pairs of self- and cross-attention.
        heads: attention heads.
    """

    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, blocks: int = 2, heads: int = 4) -> None:
        super().__init__(sizes)
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(sizes.budget, sizes.width), std=0.02))
        self.among = nn.ModuleList(AttentionBlock(sizes.width, heads) for _ in range(blocks))
        self.reading = nn.ModuleList(AttentionBlock(sizes.width, heads, sizes.width) for _ in range(blocks))

    def leaves(self, budget: int) -> int:
        if budget > len(self.queries):
            raise ValueError(f"causal_queries has {len(self.queries)} queries; the budget cannot be {budget}")
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        x_BND = tokens_BND.to(self.queries.dtype)
        q_BnD = self.queries[: context.budget].expand(len(x_BND), -1, -1)
        before_1nn = torch.ones(context.budget, context.budget, dtype=torch.bool, device=x_BND.device).tril()[None]
        for among, reading in zip(self.among, self.reading, strict=True):
            q_BnD = reading(among(q_BnD, mask=before_1nn), x_BND)
        return synthetic(q_BnD.to(tokens_BND.dtype), tokens_BND.shape[1])
