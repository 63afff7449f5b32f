"""VisionDrop ("Rethinking Visual Token Reduction..."): keep the tokens that get most attention from vision tokens, and
merge the rest into a few contextual tokens.

The d tokens that get most attention are dominant. Every |E|/c-th of the other tokens E, in order, is a target, and each
token that is left joins the target with the most similar key. A contextual token is its target plus the mean of the
tokens that joined it (`sum_mean`, as in the paper; its norm is about twice a token's), or the mean of them all
(`mean`). Dominant tokens come first, then contextual ones.

Our choices: c is a share of the budget (the paper's 42+6, 30+5, 22+4 and 16+3 are near 1/8); the score is the attention
from vision tokens at every stage (the authors use [CLS] in the encoder: `score: cls`); a contextual token has the place
of its target.

Shape legend: E tokens that are not dominant, C contextual tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, part_of, remaining, take, unit

SCORES = {"received": "received_BN", "cls": "attention_LBN"}
NORMS = ("sum_mean", "mean")


@register_router("visual_attention_merge")
class VisualAttentionMerge(TokenRouter):
    """Keep dominant tokens, and merge the others into contextual ones.

    Args:
        sizes: see `RouterSizes`.
        contextual: share of the budget for contextual tokens.
        norm: `sum_mean` or `mean`.
        score: `received` or `cls`.
    """

    selects = False

    def __init__(
        self, sizes: RouterSizes, *, contextual: float = 0.125, norm: str = "sum_mean", score: str = "received"
    ) -> None:
        super().__init__(sizes)
        if not 0 <= contextual < 1 or norm not in NORMS or score not in SCORES:
            raise ValueError(
                f"visual_attention_merge needs contextual in [0, 1), norm of {', '.join(NORMS)} and score of "
                f"{', '.join(SCORES)}, got {contextual}, {norm} and {score}"
            )
        self.contextual, self.norm = contextual, norm
        self.needs = frozenset({"keys_BNC", SCORES[score]})

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        score_BN = context.received_BN if "received_BN" in self.needs else context.attention_LBN
        assert score_BN is not None
        assert context.keys_BNC is not None
        score_BN = score_BN.float() if score_BN.ndim == 2 else score_BN.float().sum(0)
        tokens, merged = tokens_BND.shape[1], part_of(context.budget, self.contextual)
        dominant_Bn = best(score_BN, context.budget - merged)
        owner_BN = torch.full(score_BN.shape, -1, device=score_BN.device)
        owner_BN.scatter_(
            1, dominant_Bn, torch.arange(dominant_Bn.shape[1], device=score_BN.device).expand_as(dominant_Bn)
        )
        if not merged:
            return RoutedTokens(take(tokens_BND, dominant_Bn), dominant_Bn, dominant_Bn, score_BN, owner_BN)
        rest_BE = remaining(dominant_Bn, tokens)
        target_BC = rest_BE[:, :: rest_BE.shape[1] // merged][:, :merged]
        key_BNC = unit(context.keys_BNC)
        nearest_BE = (take(key_BNC, rest_BE) @ take(key_BNC, target_BC).mT).argmax(-1)
        is_target_BE = (rest_BE[..., None] == target_BC[:, None]).any(-1)
        joins_BEC = F.one_hot(nearest_BE, merged) * ~is_target_BE[..., None]
        x_BED, own_BCD = take(tokens_BND, rest_BE).float(), take(tokens_BND, target_BC).float()
        total_BCD, count_BC1 = joins_BEC.float().mT @ x_BED, joins_BEC.sum(1)[..., None]
        if self.norm == "mean":
            context_BCD = (own_BCD + total_BCD) / (1 + count_BC1)
        else:
            context_BCD = own_BCD + total_BCD / count_BC1.clamp_min(1)
        slot_BE = torch.where(is_target_BE, (rest_BE[..., None] == target_BC[:, None]).int().argmax(-1), nearest_BE)
        owner_BN.scatter_(1, rest_BE, slot_BE + dominant_Bn.shape[1])
        return RoutedTokens(
            torch.cat((take(tokens_BND, dominant_Bn), context_BCD.to(tokens_BND.dtype)), dim=1),
            torch.cat((dominant_Bn, torch.full_like(target_BC, -1)), dim=1),
            torch.cat((dominant_Bn, target_BC), dim=1),
            score_BN,
            owner_BN,
        )
