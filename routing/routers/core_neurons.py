"""CoreMatching: keep the tokens that activate the same MLP neurons as the instruction.

At a language layer, b_i marks the neurons of the gated MLP that token i activates (SiLU(gate) * up > 0), and b_core
those that the words activate. The score of token i is the overlap b_i . b_core. With `knee`, only tokens above the knee
of the sorted scores are seen, at most n; the knee is the point farthest from the line between the ends.

Our choices: core neurons are those that more than half of the words activate; activations are those of this layer's MLP
without the attention before it, since the layer has not run yet; without `knee` exactly n tokens stay. Tokens below the
knee are hidden, not removed, since shapes must not depend on the content.

Shape legend: I neurons of the layer's MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept


@register_router("core_neurons")
class CoreNeurons(TokenRouter):
    """Keep the tokens that activate the same neurons as the words.

    Args:
        sizes: see `RouterSizes`.
        knee: also hide the tokens below the knee of the scores.
    """

    needs = frozenset({"neurons_BNI", "text_neurons_BTI", "text_BTE"})
    stage = "llm_layer"
    stages = ("llm_layer",)

    def __init__(self, sizes: RouterSizes, *, knee: bool = False) -> None:
        super().__init__(sizes)
        self.knee = self.hides = knee

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.neurons_BNI is not None
        assert context.text_neurons_BTI is not None
        assert context.text_mask_BT is not None
        real_BT1 = context.text_mask_BT[..., None].float()
        often_BI = (context.text_neurons_BTI.float() * real_BT1).sum(1) / real_BT1.sum(1).clamp_min(1)
        core_BI1 = (often_BI > 0.5).float()[..., None]
        score_BN = (context.neurons_BNI.float() @ core_BI1)[..., 0]
        routed = kept(tokens_BND, best(score_BN, context.budget), score_BN)
        if not self.knee:
            return routed
        mask_Bn = score_BN.gather(1, routed.index_Bn) > bend(score_BN)
        # At least the best token stays visible.
        mask_Bn = mask_Bn | (score_BN.gather(1, routed.index_Bn) == score_BN.amax(1, keepdim=True))
        return RoutedTokens(routed.tokens_BnD, routed.index_Bn, routed.place_Bn, score_BN, mask_Bn=mask_Bn)


def bend(score_BN: Tensor) -> Tensor:
    """Return the score [B,1] at which the sorted scores are farthest from the line between their ends, first of equals.

    Distances are multiplied by N - 1: those of whole scores are then whole numbers, and no tie depends on rounding.
    """
    falling_BN = score_BN.double().sort(dim=1, descending=True).values
    last = falling_BN.shape[1] - 1
    number_N = torch.arange(last + 1, device=score_BN.device)
    chord_BN = falling_BN[:, :1] * last + (falling_BN[:, -1:] - falling_BN[:, :1]) * number_N
    knee_B1 = (falling_BN * last - chord_BN).abs().argmax(1, keepdim=True)
    return falling_BN.gather(1, knee_B1).to(score_BN.dtype)
