"""LightVLA ("The Better You Learn, The Smarter You Prune"): every token asks for the one token that it wants to keep.

With P the tokens and T the words, both divided by their root mean square, and D their width:

    q = rms(softmax(P T' / sqrt D) T)        what each token would look for, given the words
    S = q P' / sqrt D                        [N,N]: how much it wants each token

Each row votes for its largest entry; tokens with votes stay. In training, uniform noise is added to S, and a kept token
gets the gradient of its row of softmax(S) P, while its value stays the same. There are no weights: the policy learns
to make these products choose well.

Our choices: the budget is exact, so tokens with more votes come first, and tokens without votes follow by the largest
entry of their column (the paper keeps all with votes, and no others). A kept token gets the gradient of the row that
wants it most. The words are those of the instruction; the authors' T also holds the action placeholders, which are the
same in every pass. The noise does not decrease over the training, because a router does not know the step.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.routing.draws import uniform
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept, minmax, take

BELOW_ONE = 1 - 2.0**-10
"""Column scores count up to this, so that one more vote always counts more."""


@register_router("lightvla")
class LightVLA(TokenRouter):
    """Keep the tokens that most tokens vote for, given the instruction.

    Args:
        sizes: see `RouterSizes`.
        noise: largest noise that is added to S in training; 0: none.
    """

    stage = "projector_out"
    stages = ("projector_out", "llm_layer")

    def __init__(self, sizes: RouterSizes, *, noise: float = 1.0) -> None:
        super().__init__(sizes)
        if noise < 0:
            raise ValueError(f"lightvla needs noise >= 0, got {noise}")
        self.noise = noise
        self.needs = frozenset({"text_BTE", "draw_B"} if noise else {"text_BTE"})  # type: ignore[misc]

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_BTE is not None
        assert context.text_mask_BT is not None
        wish_BNN = wishes(tokens_BND.float(), context.text_BTE.float(), context.text_mask_BT)
        if context.training and self.noise:
            assert context.draw_B is not None
            wish_BNN = wish_BNN + self.noise * uniform(context.draw_B, *wish_BNN.shape[1:])
        score_BN = votes(wish_BNN.detach())
        routed = kept(tokens_BND, best(score_BN, context.budget), score_BN)
        if not context.training:
            return routed
        row_Bn = wish_BNN.argmax(1).gather(1, routed.index_Bn)
        soft_BnD = take(wish_BNN, row_Bn).softmax(-1) @ tokens_BND.float()
        surplus_BnD = (soft_BnD - soft_BnD.detach()).to(tokens_BND.dtype)
        return replace(routed, tokens_BnD=routed.tokens_BnD + surplus_BnD)


def wishes(tokens_BND: Tensor, text_BTD: Tensor, text_mask_BT: Tensor) -> Tensor:
    """Return S [B,N,N]: how much the token of each row wants the token of each column."""
    width = (tokens_BND.shape[-1],)
    p_BND, t_BTD = F.rms_norm(tokens_BND, width, eps=1e-6), F.rms_norm(text_BTD, width, eps=1e-6)
    reading_BNT = (p_BND @ t_BTD.mT / math.sqrt(width[0])).masked_fill(~text_mask_BT[:, None], float("-inf"))
    q_BND = F.rms_norm(reading_BNT.softmax(-1) @ t_BTD, width, eps=1e-6)
    return q_BND @ p_BND.mT / math.sqrt(width[0])


def votes(wish_BNN: Tensor) -> Tensor:
    """Return the score [B,N] of each column: its votes, plus its largest entry between 0 and 1."""
    favourite_BN = wish_BNN.argmax(-1)
    count_BN = torch.zeros_like(wish_BNN[:, 0]).scatter_add(1, favourite_BN, torch.ones_like(wish_BNN[:, 0]))
    return count_BN + BELOW_ONE * minmax(wish_BNN.amax(1))
