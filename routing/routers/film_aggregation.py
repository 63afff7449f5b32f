"""CogVLA's EFA as a router: n learned tokens collect from the patches what the instruction asks for.

In the policy's own stage 1 (`routing.efa`, `routing/aggregation.py`), such tokens pass through all blocks of the
towers, and the instruction modulates these blocks by FiLM. Here the tokens only read the last features of the towers,
in blocks of attention, MLP and FiLM. The towers stay unchanged, so cost and quality can be compared with other routers.

Our choices: two blocks; FiLM from the mean of the words, initialised to the identity; places of the tokens are evenly
spread.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvla.routing.attention_block import AttentionBlock
from cogvla.routing.film import FiLM, modulate
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.facility_location import mean_word
from cogvla.routing.selection import synthetic


@register_router("film_aggregation")
class FiLMAggregation(TokenRouter):
    """Replace the tokens by n learned tokens that read them, modulated by the instruction.

    Args:
        sizes: see `RouterSizes`.
        blocks: number of blocks.
        heads: attention heads.
    """

    needs = frozenset({"text_BTE"})
    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, blocks: int = 2, heads: int = 4) -> None:
        super().__init__(sizes)
        if blocks < 1:
            raise ValueError(f"film_aggregation needs blocks >= 1, got {blocks}")
        self.tokens = nn.Parameter(torch.randn(sizes.budget, sizes.width))
        self.blocks = nn.ModuleList(AttentionBlock(sizes.width, heads, sizes.width) for _ in range(blocks))
        self.film = FiLM(sizes.text_width, sizes.width, blocks, init=0.0)

    def leaves(self, budget: int) -> int:
        if budget != len(self.tokens):
            raise ValueError(f"film_aggregation learns {len(self.tokens)} tokens; the budget cannot be {budget}")
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        x_BND = tokens_BND.to(self.tokens.dtype)
        scale_LB1D, shift_LB1D = self.film(mean_word(context).to(x_BND.dtype))
        y_BnD = self.tokens.expand(len(x_BND), -1, -1)
        for block, scale_B1D, shift_B1D in zip(self.blocks, scale_LB1D, shift_LB1D, strict=True):
            y_BnD = modulate(block(y_BnD, x_BND), scale_B1D, shift_B1D)
        return synthetic(y_BnD.to(tokens_BND.dtype), tokens_BND.shape[1])
