"""Vision Remember: in the language model, each vision token looks again at the patches that it was made of.

A token that pools or merges patches loses detail before the instruction could say which of it matters. After a layer
has read the instruction into the tokens, each one attends to the towers' features of its own patches:

    token + W_o softmax(W_q norm(token) (W_k norm(patch))' / sqrt C) W_v norm(patch)        over its own patches only

It removes nothing, so use it after a router that does: `name=spatial_pool layers=[1] layer_router=vision_remember`.

Our choices: W_o starts at 0, so that training starts with the policy without it; the features are those that the towers
return (the paper reads several levels); the attention among vision tokens of the paper's second version is left out. A
patch that went into no token belongs to the nearest one of its view.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter

FAR = -1e9
"""Logit of patches of other tokens; finite, so that a token without patches has a gradient of 0."""


@register_router("vision_remember")
class VisionRemember(TokenRouter):
    """Add to each token what it reads from its patches; keep all tokens.

    Args:
        sizes: see `RouterSizes`.
        width: width C of queries, keys and values.
    """

    needs = frozenset({"patches_BPF", "owner_BP"})
    stage = "llm_layer"
    stages = ("llm_layer",)
    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, width: int = 64) -> None:
        super().__init__(sizes)
        if width < 1:
            raise ValueError(f"vision_remember needs width >= 1, got {width}")
        self.norm, self.patch_norm = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.encoder_width)
        self.q = nn.Linear(sizes.width, width, bias=False)
        self.kv = nn.Linear(sizes.encoder_width, 2 * width, bias=False)
        self.out = nn.Linear(width, sizes.width, bias=False)
        nn.init.zeros_(self.out.weight)

    def leaves(self, budget: int) -> int:
        return self.sizes.tokens

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.patches_BPF is not None
        assert context.owner_BP is not None
        dtype, place_N = self.q.weight.dtype, torch.arange(tokens_BND.shape[1], device=tokens_BND.device)
        k_BPC, v_BPC = self.kv(self.patch_norm(context.patches_BPF.to(dtype))).chunk(2, dim=-1)
        q_BNC = self.q(self.norm(tokens_BND.to(dtype)))
        own_BNP = context.owner_BP[:, None] == place_N[:, None]
        logits_BNP = (q_BNC @ k_BPC.mT).float() * q_BNC.shape[-1] ** -0.5
        share_BNP = logits_BNP.masked_fill(~own_BNP, FAR).softmax(-1) * own_BNP
        seen_BND = self.out(share_BNP.to(dtype) @ v_BPC)
        place_BN = place_N.expand(len(tokens_BND), -1)
        return RoutedTokens(tokens_BND + seen_BND.to(tokens_BND.dtype), torch.full_like(place_BN, -1), place_BN)
