"""PVC (Progressive Visual token Compression): keep what is new in this frame compared with a history of frames.

Tokens of the present frame attend to tokens of earlier frames at the same place. What the earlier frames already
contain is subtracted, and the rest is pooled to h x w = n tokens. A single picture counts as a video without motion.

PVC trains its encoder for this, and that code is not published. So the block is ours: attention over time at each
place, and a gate that starts half open. Earlier frames are those of the policy's last decisions, as many as `frames`;
before the first one the present takes their place. In training they come from the data, `router.decision_steps` apart.

Shape legend: X rows times places, O earlier decisions.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.routing.attention_block import AttentionBlock
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.spatial_pool import pooled
from cogvla.routing.selection import grid_shape


@register_router("progressive_video")
class ProgressiveVideo(TokenRouter):
    """Subtract what earlier frames contain, and pool the rest.

    Args:
        sizes: see `RouterSizes`.
        heads: attention heads over time.
        frames: number of earlier frames.
    """

    needs = frozenset({"history_BOND", "grid"})
    stages = ("encoder_out", "projector_out")
    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, heads: int = 4, frames: int = 2) -> None:
        super().__init__(sizes)
        if frames < 1:
            raise ValueError(f"progressive_video needs at least one earlier frame, got frames={frames}")
        self.remembers = frames
        grid_shape(sizes.grid, sizes.budget)
        self.time = AttentionBlock(sizes.width, heads, sizes.width)
        self.gate = nn.Parameter(torch.zeros(sizes.width))

    def leaves(self, budget: int) -> int:
        grid_shape(self.sizes.grid, budget)
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.history_BOND is not None
        assert context.grid is not None
        x_BND = tokens_BND.to(self.gate.dtype)
        past_XOD = rearrange(context.history_BOND.to(self.gate.dtype), "b f n d -> (b n) f d")
        known_X1D = self.time(rearrange(x_BND, "b n d -> (b n) 1 d"), past_XOD)
        known_BND = rearrange(known_X1D, "(b n) 1 d -> b n d", b=len(x_BND)) - x_BND
        new_BND = x_BND - self.gate.sigmoid() * known_BND
        return pooled(new_BND.to(tokens_BND.dtype), context.grid, grid_shape(context.grid, context.budget))
