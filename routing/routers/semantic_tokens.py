"""STViT ("Making Vision Transformers Efficient from A Token Sparsification View"): replace the patches by a few
semantic tokens, which act as cluster centres.

With `router.stage=encoder_block`, as in the paper, they replace the patches in the middle of each tower, before block
`router.block`: later blocks compute n tokens, which saves their time. Prefix tokens ([CLS], registers) go on beside
them. At the other stages the towers compute all patches.

S0 = adaptive max pool of the grid to g x g = n; S1 = S0 + scale * attention of S0 to [S0; X], then an MLP; S2 is
computed in the same way from S1 + G, with n learned vectors G (truncated normal, 0.02). LayerScale starts at 1e-5.

Our choices: the whole picture is one window; blocks are `AttentionBlock`s, and LayerScale is one vector per block that
multiplies all that the block adds. `variant: free` is ours and needs no training: average pooling, then one step of
soft k-means (softmax of cosines at temperature 0.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvla.routing.attention_block import AttentionBlock
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.spatial_pool import pooled
from cogvla.routing.selection import grid_shape, unit

VARIANTS, TEMPERATURE, LAYER_SCALE = ("trained", "free"), 0.1, 1e-5


@register_router("semantic_tokens")
class SemanticTokens(TokenRouter):
    """Replace the patches by cluster centres.

    Args:
        sizes: see `RouterSizes`.
        variant: `trained` or `free`.
        heads: attention heads.
    """

    needs = frozenset({"grid"})
    stage = "encoder_out"
    stages = ("encoder_block", "encoder_out", "projector_out")
    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, variant: str = "trained", heads: int = 4) -> None:
        super().__init__(sizes)
        grid_shape(sizes.grid, sizes.budget)
        if variant not in VARIANTS:
            raise ValueError(f"semantic_tokens needs variant of {', '.join(VARIANTS)}, got {variant}")
        self.trained = variant == "trained"
        if self.trained:
            self.blocks = nn.ModuleList(AttentionBlock(sizes.width, heads, sizes.width) for _ in range(2))
            self.scales = nn.ParameterList(torch.full((sizes.width,), LAYER_SCALE) for _ in range(2))
            self.centres = nn.Parameter(nn.init.trunc_normal_(torch.empty(sizes.budget, sizes.width), std=0.02))

    def leaves(self, budget: int) -> int:
        if self.trained and budget != self.sizes.budget:
            raise ValueError(
                f"semantic_tokens learns one vector per token: the budget is {self.sizes.budget}, not {budget}"
            )
        grid_shape(self.sizes.grid, budget)
        return budget

    def shape(self, budget: int) -> tuple[int, int]:
        return grid_shape(self.sizes.grid, budget)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        shape = grid_shape(context.grid, context.budget)
        means = pooled(tokens_BND, context.grid, shape)
        if not self.trained:
            x_BND = tokens_BND.float()
            share_BnN = (unit(means.tokens_BnD) @ unit(x_BND).mT / TEMPERATURE).softmax(-1)
            return RoutedTokens((share_BnN @ x_BND).to(tokens_BND.dtype), means.index_Bn, means.place_Bn)
        x_BND = tokens_BND.to(self.centres.dtype)
        x_BDHW = rearrange(x_BND, "b (h w) d -> b d h w", h=context.grid[0])
        s_BnD = rearrange(F.adaptive_max_pool2d(x_BDHW, shape), "b d h w -> b (h w) d")
        for number, (block, scale_D) in enumerate(zip(self.blocks, self.scales, strict=True)):
            asking_BnD = s_BnD + self.centres if number else s_BnD
            s_BnD = s_BnD + scale_D * (block(asking_BnD, torch.cat((s_BnD, x_BND), dim=1)) - asking_BnD)
        return RoutedTokens(s_BnD.to(tokens_BND.dtype), means.index_Bn, means.place_Bn)
