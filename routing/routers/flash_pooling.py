"""The pooling of FLASH (speculative decoding for multimodal models): n learned queries, one product with the tokens.

    softmax(A X') X        A [n,D]: the queries; X: the tokens; no scale, no projection

FLASH compresses the pictures of its draft model with it, 576 to 64 tokens. A policy that decodes a chunk in one pass
needs no draft, so here it is the lightest router with weights.

Our choices: the queries start with deviation D^-0.5, so that logits are about 1 for normalised tokens; a budget below
the largest one uses the first queries, which do not depend on the others; the places of the tokens are evenly spread.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import synthetic


@register_router("flash_pooling")
class FlashPooling(TokenRouter):
    """Replace the tokens by n means, weighted by learned queries."""

    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__(sizes)
        self.queries = nn.Parameter(torch.randn(sizes.budget, sizes.width) * sizes.width**-0.5)

    def leaves(self, budget: int) -> int:
        if budget > len(self.queries):
            raise ValueError(f"flash_pooling learns {len(self.queries)} queries; the budget cannot be {budget}")
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        x_BND = tokens_BND.float()
        share_BnN = (self.queries[: context.budget].float() @ x_BND.mT).softmax(-1)
        return synthetic((share_BnN @ x_BND).to(tokens_BND.dtype), tokens_BND.shape[1])
