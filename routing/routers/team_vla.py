"""TEAM-VLA, two routers: around the patches that match a word (`team_vla`), and merged by action attention
(`team_merge`).

Before the language model: the most similar patch (cosine) of every word is a seed. Its neighbourhood, F = 3 x 3 sums of
the map of seeds, says how dense the seeds are around each patch; the patches with the largest F stay. A share `context`
of the budget is drawn at random from the others.

In the language model: the tokens with most attention from the action tokens stay, and every other token joins the most
similar of them; a merged token is the mean of its members. Use both with `name=team_vla layers=[2]
layer_router=team_merge`.

Our choices: the paper keeps F above a threshold, so that the number of tokens varies; here F ranks the patches, and
equal F by the largest similarity to a word. A patch that several words choose is one seed. The paper's merge is
bipartite; which tokens receive, and that members count alike, is our reading, because there is no code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvla.routing.draws import uniform
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept, minmax, part_of, take, unit

BELOW_ONE = 1 - 2.0**-10
"""Similarities count up to this, so that F counts more."""


@register_router("team_vla")
class TeamVLA(TokenRouter):
    """Keep the patches around those that match a word.

    Args:
        sizes: see `RouterSizes`.
        context: share of the budget that is drawn at random.
    """

    needs = frozenset({"text_BTE", "grid", "draw_B"})
    stage = "projector_out"
    stages = ("projector_out",)

    def __init__(self, sizes: RouterSizes, *, context: float = 0.1) -> None:
        super().__init__(sizes)
        if not 0 <= context <= 1:
            raise ValueError(f"team_vla needs context in [0, 1], got {context}")
        self.context = context

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_BTE is not None
        assert context.text_mask_BT is not None
        assert context.grid is not None
        assert context.draw_B is not None
        similar_BTN = unit(context.text_BTE) @ unit(tokens_BND).mT
        similar_BTN = similar_BTN.masked_fill(~context.text_mask_BT[..., None], -2.0)  # below every cosine
        seed_BN = seeds(similar_BTN, context.text_mask_BT)
        score_BN = density(seed_BN, context.grid) + BELOW_ONE * minmax(similar_BTN.amax(1))
        drawn = part_of(context.budget, self.context)
        dense_Bn = best(score_BN, context.budget - drawn)
        if not drawn:
            return kept(tokens_BND, dense_Bn, score_BN)
        key_BN = uniform(context.draw_B, tokens_BND.shape[1]).scatter(1, dense_Bn, torch.full_like(score_BN, -1.0))
        return kept(tokens_BND, torch.cat((dense_Bn, best(key_BN, drawn)), dim=1), score_BN)


def seeds(similar_BTN: Tensor, text_mask_BT: Tensor) -> Tensor:
    """Return 1 [B,N] for the most similar token of every word, else 0."""
    word_BT = text_mask_BT.to(similar_BTN.dtype)
    return torch.zeros_like(similar_BTN[:, 0]).scatter_reduce(1, similar_BTN.argmax(-1), word_BT, "amax")


def density(seed_BN: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return F [B,N], the number of seeds in the 3 x 3 patches around each patch."""
    seed_B1HW = rearrange(seed_BN, "b (h w) -> b 1 h w", h=grid[0])
    return F.conv2d(seed_B1HW, seed_B1HW.new_ones(1, 1, 3, 3), padding=1).flatten(1)


@register_router("team_merge")
class TeamMerge(TokenRouter):
    """Merge all tokens into those that the action tokens attend to most."""

    needs = frozenset({"attention_LBN"})
    stage = "llm_layer"
    stages = ("llm_layer",)
    selects = False

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.attention_LBN is not None
        score_BN = context.attention_LBN[-1].float()
        target_Bn, x_BND = best(score_BN, context.budget), unit(tokens_BND)
        slot_n = torch.arange(context.budget, device=score_BN.device).expand_as(target_Bn)
        owner_BN = (x_BND @ take(x_BND, target_Bn).mT).argmax(-1).scatter(1, target_Bn, slot_n)
        member_BnN = F.one_hot(owner_BN, context.budget).float().mT
        merged_BnD = member_BnN @ tokens_BND.float() / member_BnN.sum(-1, keepdim=True)
        new_Bn = torch.full_like(target_Bn, -1)
        return RoutedTokens(merged_BnD.to(tokens_BND.dtype), new_Bn, target_Bn, score_BN, owner_BN)
