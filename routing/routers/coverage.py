"""MMTok: keep the tokens that together cover the words of the instruction and the other vision tokens.

P = softmax over tokens of (word . projected token / 0.02), divided by the number of words; Q = softmax of (token .
token / 0.2) in the tower's features, divided by N; U = [P; alpha Q], alpha = 0.5. The coverage of a set of columns is
the sum over rows of the largest entry in the set. The router greedily adds the column that increases it most, which
reaches at least 1 - 1/e of the best coverage.

Our choice: all words count; the authors strip the text to keywords.

Shape legend: U rows of the utility: T words and N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import kept, unit

TEXT_TEMPERATURE, VISION_TEMPERATURE = 0.02, 0.2


@register_router("coverage")
class Coverage(TokenRouter):
    """Keep the tokens that cover words and picture best.

    Args:
        sizes: see `RouterSizes`.
        alpha: weight of the picture relative to the words.
    """

    needs = frozenset({"text_BTE", "encoder_BNF"})
    stage = "projector_out"
    stages = ("projector_out",)

    def __init__(self, sizes: RouterSizes, *, alpha: float = 0.5) -> None:
        super().__init__(sizes)
        if alpha < 0:
            raise ValueError(f"coverage needs alpha >= 0, got {alpha}")
        self.alpha = alpha

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_BTE is not None
        assert context.text_mask_BT is not None
        assert context.encoder_BNF is not None
        x_BND, c_BNF = unit(tokens_BND), unit(context.encoder_BNF)
        weight_BT1 = (context.text_mask_BT / context.text_mask_BT.sum(1, keepdim=True).clamp_min(1))[..., None]
        words_BTN = (unit(context.text_BTE) @ x_BND.mT / TEXT_TEMPERATURE).softmax(-1) * weight_BT1
        picture_BNN = (c_BNF @ c_BNF.mT / VISION_TEMPERATURE).softmax(-1) / tokens_BND.shape[1]
        index_Bn, gain_Bn = cover(torch.cat((words_BTN, self.alpha * picture_BNN), dim=1), context.budget)
        score_BN = torch.zeros_like(x_BND[..., 0]).scatter_(1, index_Bn, gain_Bn)
        return kept(tokens_BND, index_Bn, score_BN)


def cover(utility_BUN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Solve maximum coverage greedily; return columns [B,count] in the order of choice, and the gain of each.

    Args:
        utility_BUN: how well each column (token) covers each row.
        count: number of columns to choose.
    """
    best_BU1 = torch.zeros_like(utility_BUN[..., :1])
    taken_BN = torch.zeros_like(utility_BUN[:, 0], dtype=torch.bool)
    found, gains = [], []
    for _ in range(count):
        gain_BN = (utility_BUN - best_BU1).clamp_min(0).sum(1).masked_fill(taken_BN, -1.0)
        gain_B1, chosen_B1 = gain_BN.max(1, keepdim=True)
        column_BU1 = utility_BUN.gather(2, chosen_B1[:, None].expand(-1, utility_BUN.shape[1], -1))
        best_BU1 = torch.maximum(best_BU1, column_BU1)
        taken_BN = taken_BN.scatter(1, chosen_B1, 1)
        found.append(chosen_B1)
        gains.append(gain_B1)
    return torch.cat(found, dim=1), torch.cat(gains, dim=1)
