"""VLA-Pruner (arXiv 2511.16449): tokens that matter for the words, joined with those that mattered for actions before.

Two scores: the attention that a token gets from the instruction in this layer, and the mean of the action tokens'
attention at the last three decisions, whose weights decay by 0.8 into the past. The n best tokens of each are
candidates, n to 2n tokens; of these, n tokens that differ most are kept: first the one whose nearest other candidate is
farthest, then the one farthest from all those taken, by the cosine of the tokens.

Our choices, where text and released code (github.com/MINT-SJTU/VLA-Pruner) leave some or differ:

- words ask in place of the prompt's last token, and the remembered attention is that of layer `depth // 2 - 1` (15 of
  32, as released)
- the newest decision has weight 1; the released weights are reversed, so that the oldest counts most
- a token that a decision removed before the remembered layer has its value from the decision before, and if it was
  never there, the words' attention, scaled to the actions' by the tokens that have both; the released code stores 0, so
  that it stays removed
- until three decisions are remembered, the words' attention takes the place of the actions'. The paper then removes
  nothing, but the number of tokens is fixed here
- tokens are compared at this layer, not at the input of the language model
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept, minmax, unit


@register_router("vla_pruner")
class VLAPruner(TokenRouter):
    """Join the words' attention with that of the last decisions, and remove duplicates.

    Args:
        sizes: see `RouterSizes`.
        decisions: number of earlier decisions.
        decay: weight of a decision relative to the next one.
    """

    needs = frozenset({"text_attention_BN", "past_attention_BON", "age_B"})
    stage = "llm_layer"
    stages = ("llm_layer",)

    def __init__(self, sizes: RouterSizes, *, decisions: int = 3, decay: float = 0.8) -> None:
        super().__init__(sizes)
        if decisions < 1 or not 0 < decay <= 1:
            raise ValueError(
                f"vla_pruner needs decisions of at least 1 and a decay in (0, 1], got {decisions}, {decay}"
            )
        self.remembers, self.decay = decisions, decay

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_attention_BN is not None
        assert context.past_attention_BON is not None
        assert context.age_B is not None
        now_BN = context.text_attention_BN.float()
        ready_B1 = (context.age_B >= self.remembers)[:, None]
        guide_BN = torch.where(ready_B1, smoothed(filled(context.past_attention_BON, now_BN), self.decay), now_BN)
        among_BN = _marked(best(now_BN, context.budget), now_BN) + _marked(best(guide_BN, context.budget), now_BN)
        index_Bn = spread(unit(tokens_BND), among_BN > 0, context.budget)
        return kept(tokens_BND, index_Bn, torch.maximum(minmax(now_BN), minmax(guide_BN)))


def filled(past_BON: Tensor, now_BN: Tensor) -> Tensor:
    """Return the past attention, with the present one where a token has none.

    Few tokens in the remembered layer get more each than all before it: the present attention is scaled such that both
    have the same sum over the tokens with a past. Without any, it stays as it is.
    """
    past_BON, now_B1N = past_BON.float(), now_BN[:, None]
    read_BON = past_BON > 0
    among_BO1 = (now_B1N * read_BON).sum(-1, keepdim=True)
    scale_BO1 = torch.where(among_BO1 > 0, past_BON.sum(-1, keepdim=True) / among_BO1, 1.0)
    return torch.where(read_BON, past_BON, now_B1N * scale_BO1)


def smoothed(past_BON: Tensor, decay: float) -> Tensor:
    """Return the weighted mean [B,N] over decisions, the oldest first; the newest has weight 1."""
    count = past_BON.shape[1]
    weight_O = decay ** torch.arange(count - 1, -1, -1, device=past_BON.device, dtype=torch.float32)
    return (past_BON.float() * weight_O[:, None]).sum(1) / weight_O.sum()


def spread(unit_BND: Tensor, among_BN: Tensor, count: int) -> Tensor:
    """Choose tokens one by one, each the farthest from those before; return indices [B,count] in that order.

    Args:
        unit_BND: tokens of length 1.
        among_BN: tokens to choose from, at least `count` of each row.
        count: number of tokens to choose.
    """
    distance_BNN = (1 - unit_BND @ unit_BND.mT).masked_fill(~among_BN[:, None], float("inf"))
    itself_NN = torch.eye(among_BN.shape[1], dtype=torch.bool, device=among_BN.device)
    nearest_BN = distance_BNN.masked_fill(itself_NN, float("inf")).amin(-1)
    left_BN, chosen = among_BN, []
    for _ in range(count):
        index_B1 = nearest_BN.masked_fill(~left_BN, float("-inf")).argmax(1, keepdim=True)
        chosen.append(index_B1)
        left_BN = left_BN & (torch.arange(among_BN.shape[1], device=among_BN.device) != index_B1)
        to_it_BN = distance_BNN.gather(2, index_B1[..., None].expand(-1, among_BN.shape[1], -1))[..., 0]
        nearest_BN = to_it_BN if len(chosen) == 1 else torch.minimum(nearest_BN, to_it_BN)
    return torch.cat(chosen, dim=1)


def _marked(index_Bn: Tensor, like_BN: Tensor) -> Tensor:
    return torch.zeros_like(like_BN).scatter(1, index_Bn, torch.ones_like(like_BN))
