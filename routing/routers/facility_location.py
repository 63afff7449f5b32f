"""CATP, first stage: keep tokens that represent all others and match the instruction (facility location).

The router greedily maximises sum_x max_{y in Y} sim(x, y) + 0.7 sum_{y in Y} sim(y, mean word), where sim is the cosine
mapped to [0, 1]. The second stage, inside the language model, is `attention_growth`.

Our choice: all words count in the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import kept, take, unit


@register_router("facility_location")
class FacilityLocation(TokenRouter):
    """Keep representative tokens that match the words.

    Args:
        sizes: see `RouterSizes`.
        text: weight of the similarity to the mean word.
    """

    needs = frozenset({"text_BTE"})
    stage = "projector_out"
    stages = ("projector_out", "llm_layer")

    def __init__(self, sizes: RouterSizes, *, text: float = 0.7) -> None:
        super().__init__(sizes)
        self.text = text

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        x_BND, word_BD1 = unit(tokens_BND), unit(mean_word(context))[..., None]
        similarity_BNN, fit_BN = (1 + x_BND @ x_BND.mT) / 2, (1 + x_BND @ word_BD1)[..., 0] / 2
        covered_BN, taken_BN = torch.zeros_like(fit_BN), torch.zeros_like(fit_BN, dtype=torch.bool)
        found, score_BN = [], torch.zeros_like(fit_BN)
        for _ in range(context.budget):
            gain_BN = (similarity_BNN - covered_BN[..., None]).clamp_min(0).sum(1) + self.text * fit_BN
            gain_B1, chosen_B1 = gain_BN.masked_fill(taken_BN, float("-inf")).max(1, keepdim=True)
            covered_BN = torch.maximum(covered_BN, take(similarity_BNN, chosen_B1)[:, 0])
            taken_BN = taken_BN.scatter(1, chosen_B1, 1)
            score_BN = score_BN.scatter(1, chosen_B1, gain_B1)
            found.append(chosen_B1)
        return kept(tokens_BND, torch.cat(found, dim=1), score_BN)


def mean_word(context: RouterContext) -> Tensor:
    """Return the mean of the instruction's words, float32 [B,E]."""
    assert context.text_BTE is not None
    assert context.text_mask_BT is not None
    weight_BT1 = context.text_mask_BT.float()[..., None]
    return (context.text_BTE.float() * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)
