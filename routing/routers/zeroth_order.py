"""ZOO-Prune: keep tokens to which the projector is sensitive (by zeroth-order differences) and which differ from each
other.

The sensitivity S of a token x is the mean of the central differences |P(x + hu) - P(x - hu)| / 2h along m random unit
directions u, which are the same for all tokens of a picture. The first token taken is the one with the largest S; each
next one has the largest minmax(S) * (1 - largest cosine to those already taken).

m = 64 and h = 0.01 are the paper's values. In bfloat16 such a step is lost in rounding, so the projector runs in
float32. With a linear projector S is the same for all tokens, and only diversity counts. The score often follows
`token_norm`; compare with it. Our choices: several directions at a time, 2 m N projected rows in all; all scores are 1
if S differs by at most 1 % of the largest, since minmax would stretch what rounding leaves.

Shape legend: M directions, m of them at once, Q projected rows, E width of the projector's output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvla.routing.draws import normal
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import kept, minmax, take, unit

AT_ONCE, EQUAL = 8, 0.01
"""Directions at a time, and the range of S, relative to the largest, up to which all tokens are alike."""


@register_router("zeroth_order")
class ZerothOrder(TokenRouter):
    """Keep diverse tokens to which the projector is sensitive.

    Args:
        sizes: see `RouterSizes`.
        directions: m.
        step: h.
    """

    needs = frozenset({"draw_B", "projector"})
    stages = ("encoder_out",)

    def __init__(self, sizes: RouterSizes, *, directions: int = 64, step: float = 0.01) -> None:
        super().__init__(sizes)
        if directions < 1 or step <= 0:
            raise ValueError(f"zeroth_order needs positive directions and step, got {directions} and {step}")
        self.directions, self.step = directions, step

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        index_Bn, score_BN = self.choose(tokens_BND, context)
        return kept(tokens_BND, index_Bn, score_BN)

    @torch.no_grad()
    def choose(self, tokens_BND: Tensor, context: RouterContext) -> tuple[Tensor, Tensor]:
        """Choose n tokens; return indices [B,n] in the order of choice, and sensitivities [B,N] from 0 to 1."""
        found_BN = self.sensitivity(tokens_BND.float(), context)
        low_B1, high_B1 = found_BN.amin(1, keepdim=True), found_BN.amax(1, keepdim=True)
        score_BN = torch.where(high_B1 - low_B1 <= EQUAL * high_B1, 1.0, minmax(found_BN))
        x_BND = unit(tokens_BND)
        nearest_BN, taken_BN = torch.zeros_like(score_BN), torch.zeros_like(score_BN, dtype=torch.bool)
        found = []
        for number in range(context.budget):
            value_BN = score_BN * (1 - nearest_BN) if number else score_BN
            chosen_B1 = value_BN.masked_fill(taken_BN, float("-inf")).argmax(1, keepdim=True)
            similarity_BN = (x_BND @ take(x_BND, chosen_B1).mT)[..., 0]
            nearest_BN = torch.maximum(nearest_BN, similarity_BN) if number else similarity_BN
            taken_BN = taken_BN.scatter(1, chosen_B1, 1)
            found.append(chosen_B1)
        return torch.cat(found, dim=1), score_BN

    def sensitivity(self, x_BND: Tensor, context: RouterContext) -> Tensor:
        """Return the mean length of the directional derivatives, float32 [B,N]."""
        assert context.draw_B is not None
        assert context.projector is not None
        direction_BMD = F.normalize(normal(context.draw_B, self.directions, x_BND.shape[-1]), dim=-1)
        total_BN = torch.zeros_like(x_BND[..., 0])
        for u_BmD in direction_BMD.split(AT_ONCE, dim=1):
            step_BmND = self.step * u_BmD[:, :, None]
            both = (rearrange(x_BND[:, None] + sign * step_BmND, "b m n d -> b (m n) d") for sign in (1, -1))
            up_BQE, down_BQE = (context.projector(x_BQD).float() for x_BQD in both)
            change_BQ = (up_BQE - down_BQE).norm(dim=-1) / (2 * self.step)
            total_BN = total_BN + rearrange(change_BQ, "b (m n) -> b m n", n=x_BND.shape[1]).sum(1)
        return total_BN / self.directions
