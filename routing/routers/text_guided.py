"""FlashVLM: score tokens by the tower's attention and by similarity to the instruction; half of the budget goes to the
best tokens, half to tokens that differ.

1. a = minmax(attention)
2. m_ij = cosine of the projected token i with word j
3. pooled_i = sum_j m_ij softmax_j(m_ij / 0.05)
4. q = minmax(softmax_i(pooled / 0.01) ^ 2.5)
5. s = exp((1-eta) log a + eta log q), eta = 0.5
6. the best n/2 tokens by s stay
7. the rest is sorted by s, and every second token is compared with the tokens between; the 8 that are most similar to
   one of these are removed; this is repeated until n - n/2 are left

The formulas are those of the paper, not of the released code, which overwrites two of these steps. Our choice: all
words of the instruction count, none is stripped; they are the same in all steps of an episode. If the tower has no
[CLS], attention is the mean that a patch gets from all patches. Step 7 takes (N-n)/8 rounds.

Shape legend: R tokens to choose from, A those of every second place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import kept, minmax, ranked, take, unit

LEAST, WORD_TEMPERATURE, TOKEN_TEMPERATURE, SHARPNESS, AT_ONCE = 1e-6, 0.05, 0.01, 2.5, 8


@register_router("text_guided")
class TextGuided(TokenRouter):
    """Keep the tokens that the tower and the instruction find important, and some different ones.

    Args:
        sizes: see `RouterSizes`.
        text: eta, weight of the text, 0 to 1.
        important: share of the budget for the best scores, 0 to 1; the rest is for different tokens.
    """

    needs = frozenset({"attention_LBN", "text_BTE", "projector"})
    stages = ("encoder_out",)

    def __init__(self, sizes: RouterSizes, *, text: float = 0.5, important: float = 0.5) -> None:
        super().__init__(sizes)
        if not (0 <= text <= 1 and 0 <= important <= 1):
            raise ValueError(f"text_guided needs text and important from 0 to 1, got {text} and {important}")
        self.text, self.important = text, important

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.attention_LBN is not None
        seen_BN = minmax(context.attention_LBN.float().sum(0)).clamp_min(LEAST)
        asked_BN = relevance(tokens_BND, context).clamp_min(LEAST)
        score_BN = minmax(((1 - self.text) * seen_BN.log() + self.text * asked_BN.log()).exp())
        order_BN = ranked(score_BN)
        important = int(context.budget * self.important)
        rest_BR = diverse(unit(tokens_BND), order_BN[:, important:], context.budget - important)
        return kept(tokens_BND, torch.cat((order_BN[:, :important], rest_BR), dim=1), score_BN)


def relevance(tokens_BND: Tensor, context: RouterContext) -> Tensor:
    """Return the sharpened similarity of each token to the instruction [B,N], 0 to 1 (steps 2 to 4)."""
    assert context.projector is not None
    assert context.text_BTE is not None
    assert context.text_mask_BT is not None
    similarity_BNT = unit(context.projector(tokens_BND)) @ unit(context.text_BTE).mT
    logits_BNT = (similarity_BNT / WORD_TEMPERATURE).masked_fill(~context.text_mask_BT[:, None], float("-inf"))
    pooled_BN = (logits_BNT.softmax(-1) * similarity_BNT).sum(-1)
    return minmax((pooled_BN / TOKEN_TEMPERATURE).softmax(-1) ** SHARPNESS)


def diverse(unit_BND: Tensor, order_BR: Tensor, count: int) -> Tensor:
    """Choose `count` tokens that differ from each other (step 7).

    Args:
        unit_BND: all tokens, of length 1.
        order_BR: indices of the tokens to choose from, the best first.
        count: number of tokens to choose.

    Returns:
        Indices [B,count].
    """
    if not count:
        return order_BR[:, :0]
    while order_BR.shape[1] > count:
        a_BA, b_BA = order_BR[:, ::2], order_BR[:, 1::2]
        likeness_BA = (take(unit_BND, a_BA) @ take(unit_BND, b_BA).mT).amax(-1)
        gone = min(AT_ONCE, order_BR.shape[1] - count, a_BA.shape[1])
        stay_BA = ranked(-likeness_BA)[:, : a_BA.shape[1] - gone]
        order_BR = torch.cat((a_BA.gather(1, stay_BA), b_BA), dim=1)
    return order_BR
