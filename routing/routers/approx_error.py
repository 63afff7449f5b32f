"""ApET: keep a few basis tokens, and the tokens that the basis approximates worst. It needs no attention, so it works
with fused kernels at every stage.

Farthest-point sampling in squared distance gives a basis of k tokens. Least squares with (B B^T + 1e-5 I) approximates
every token by the basis; the error of a token is the length of the residual. The n-k tokens with the largest errors
stay as informative tokens, and every other token is averaged into the informative token with the largest cosine. The k
basis tokens stay unchanged: their error is 0, so they would never be among the largest, and the main content of the
picture would be lost with them.

Our choices: k is at most half of the budget (the paper's 10 are for 96 tokens and more); basis tokens are not averaged
into others, and have the largest scores, so that `carried` keeps them longest; the first one is drawn at random; least
squares is in float64, and 1e-5 grows a little with the longest basis token, because the matrix is singular otherwise if
long tokens are nearly equal.

Shape legend: I informative tokens, R the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, remaining, take, unit

RIDGE, OF_LARGEST = 1e-5, 1e-12
"""Number, and share of the largest entry of B B^T, that are added to its diagonal."""


@register_router("approx_error")
class ApproxError(TokenRouter):
    """Keep a basis, and the tokens that it approximates worst.

    Args:
        sizes: see `RouterSizes`.
        basis: k; limited to half of the budget.
    """

    needs = frozenset({"draw_B"})
    selects = False

    def __init__(self, sizes: RouterSizes, *, basis: int = 10) -> None:
        super().__init__(sizes)
        if basis < 1 or sizes.budget < 2:
            raise ValueError(f"approx_error needs basis >= 1 and a budget of 2 or more, got {basis} and {sizes.budget}")
        self.basis = basis

    def leaves(self, budget: int) -> int:
        if budget < 2:
            raise ValueError(f"approx_error needs a budget of 2 tokens or more, got {budget}")
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.draw_B is not None
        x_BND, tokens = tokens_BND.float(), tokens_BND.shape[1]
        count = min(self.basis, context.budget // 2)
        basis_Bn = sample_far(x_BND, context.draw_B % tokens, count)
        error_BN = approximation_error(x_BND, take(x_BND, basis_Bn))
        informative_BI = best(error_BN.scatter(1, basis_Bn, -1.0), context.budget - count)
        score_BN = error_BN.scatter(1, basis_Bn, error_BN.amax(1, keepdim=True).expand_as(basis_Bn) + 1)
        kept_Bn = torch.cat((informative_BI, basis_Bn), dim=1)
        rest_BR = remaining(kept_Bn, tokens)
        unit_BND = unit(x_BND)
        owner_BR = (take(unit_BND, rest_BR) @ take(unit_BND, informative_BI).mT).argmax(-1)
        joins_BRI = F.one_hot(owner_BR, informative_BI.shape[1]).float()
        total_BID = take(x_BND, informative_BI) + joins_BRI.mT @ take(x_BND, rest_BR)
        count_BI1 = 1 + joins_BRI.sum(1)[..., None]
        both_BnD = torch.cat((total_BID / count_BI1, take(x_BND, basis_Bn)), dim=1).to(tokens_BND.dtype)
        place_Bn, order_Bn = kept_Bn.sort(dim=1)
        merged_Bn = order_Bn < informative_BI.shape[1]
        slot_Bn = order_Bn.argsort(dim=1)  # output place of each of `kept_Bn`
        owner_BN = torch.zeros_like(error_BN, dtype=torch.int64).scatter_(1, kept_Bn, slot_Bn)
        owner_BN.scatter_(1, rest_BR, slot_Bn.gather(1, owner_BR))
        return RoutedTokens(
            take(both_BnD, order_Bn), torch.where(merged_Bn, -1, place_Bn), place_Bn, score_BN, owner_BN
        )


def sample_far(x_BND: Tensor, first_B: Tensor, count: int) -> Tensor:
    """Sample the farthest points; return their indices [B,count] in the order of choice.

    Args:
        x_BND: points.
        first_B: index of the first point of each row.
        count: number of points.
    """
    chosen_B1 = first_B[:, None]
    distance_BN, found = torch.full_like(x_BND[..., 0], float("inf")), [chosen_B1]
    for _ in range(count - 1):
        distance_BN = torch.minimum(distance_BN, (x_BND - take(x_BND, chosen_B1)).square().sum(-1))
        distance_BN = distance_BN.scatter(1, chosen_B1, -1.0)
        chosen_B1 = distance_BN.argmax(1, keepdim=True)
        found.append(chosen_B1)
    return torch.cat(found, dim=1)


def approximation_error(x_BND: Tensor, basis_BnD: Tensor) -> Tensor:
    """Return the length of each token's residual after projection on the span of the basis, float32 [B,N]."""
    x_BND, basis_BnD = x_BND.double(), basis_BnD.double()
    gram_Bnn = basis_BnD @ basis_BnD.mT
    ridge_Bn = (RIDGE + OF_LARGEST * gram_Bnn.amax((1, 2)))[:, None].expand(gram_Bnn.shape[:2])
    weights_BnN, _ = torch.linalg.solve_ex(gram_Bnn + ridge_Bn.diag_embed(), basis_BnD @ x_BND.mT)  # without a check
    return (x_BND - weights_BnN.mT @ basis_BnD).norm(dim=-1).float()
