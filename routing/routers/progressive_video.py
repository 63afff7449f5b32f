"""PVC (Progressive Visual token Compression): of a history of frames, every frame adds what the earlier ones missed.

Tokens of the present attend to those of earlier frames at the same place; what they already knew is taken out, and the
remainder is pooled to h x w = K tokens. A picture alone is a video that stands still.

PVC trains its encoder for this, and that code is not published: the block is ours, with one attention over time per
place and a gate that starts half open. It needs a policy that is given earlier frames; the contract of policies here
(`policy.interface.Observation`) has one moment only, so that `progressive_video` says so when it is asked for.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.routing.attention_block import AttentionBlock
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.spatial_pool import pooled
from cogvla.routing.selection import grid_shape


class ProgressiveVideo(TokenRouter):
    """What is new in this frame.

    Args:
        sizes: see `RouterSizes`.
        heads: of the attention over time.
    """

    needs = frozenset({"history_BFND", "grid"})
    stages = ("encoder_out", "projector_out")
    selects = False

    def __init__(self, sizes: RouterSizes, *, heads: int = 4) -> None:
        super().__init__(sizes)
        grid_shape(sizes.grid, sizes.budget)
        self.time = AttentionBlock(sizes.width, heads, sizes.width)
        self.gate = nn.Parameter(torch.zeros(sizes.width))

    def leaves(self, budget: int) -> int:
        grid_shape(self.sizes.grid, budget)
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.history_BFND is not None
        assert context.grid is not None
        x_BND = tokens_BND.to(self.gate.dtype)
        past_XFD = rearrange(context.history_BFND.to(self.gate.dtype), "b f n d -> (b n) f d")
        known_X1D = self.time(rearrange(x_BND, "b n d -> (b n) 1 d"), past_XFD)
        known_BND = rearrange(known_X1D, "(b n) 1 d -> b n d", b=len(x_BND)) - x_BND
        new_BND = x_BND - self.gate.sigmoid() * known_BND
        return pooled(new_BND.to(tokens_BND.dtype), context.grid, grid_shape(context.grid, context.budget))
