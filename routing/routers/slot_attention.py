"""Slot-MLLM's slots without its codebook and decoder: n slots compete for the tokens, so that each gathers one object.

Slot attention: attention is a softmax over slots, then normalised over tokens; a GRU updates the slots with the
weighted means, and an MLP follows; three iterations.

Our choices: each slot starts from a learned vector, not from a random draw, so that an observation always gives the
same result; places of the slots are evenly spread.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import synthetic

LEAST = 1e-6


@register_router("slot_attention")
class SlotAttention(TokenRouter):
    """Replace the tokens by object-centric slots.

    Args:
        sizes: see `RouterSizes`.
        iterations: number of iterations of slot attention.
    """

    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, iterations: int = 3) -> None:
        super().__init__(sizes)
        width = sizes.width
        self.iterations = iterations
        self.slots = nn.Parameter(torch.randn(sizes.budget, width))
        self.norm, self.slot_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.update = nn.GRUCell(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def leaves(self, budget: int) -> int:
        if budget != len(self.slots):
            raise ValueError(f"slot_attention learns {len(self.slots)} slots; the budget cannot be {budget}")
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        k_BND, v_BND = self.kv(self.norm(tokens_BND.to(self.slots.dtype))).chunk(2, dim=-1)
        slots_BnD = self.slots.expand(len(tokens_BND), -1, -1)
        for _ in range(self.iterations):
            logits_BnN = self.q(self.slot_norm(slots_BnD)) @ k_BND.mT * k_BND.shape[-1] ** -0.5
            share_BnN = logits_BnN.softmax(1) + LEAST
            means_BnD = (share_BnN / share_BnN.sum(-1, keepdim=True)) @ v_BND
            slots_BnD = self.update(means_BnD.flatten(0, 1), slots_BnD.flatten(0, 1)).unflatten(0, slots_BnD.shape[:2])
            slots_BnD = slots_BnD + self.mlp(self.mlp_norm(slots_BnD))
        return synthetic(slots_BnD.to(tokens_BND.dtype), tokens_BND.shape[1])
