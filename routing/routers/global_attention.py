"""VFlowOpt's selection: what the global tokens of the tower look at is important, and what goes is recycled.

Global tokens are patches that receive more than `threshold` times the mean attention. Importance of a token is the mean
attention that they give it, plus `entropy` times the softmax of the patches' Shannon entropy (of a grey histogram of
256 bins). Of the K places, M = N / cell^2 hold recycled tokens: importance-weighted means of tokens that go, each
standing at the most important one of its cell.

The paper's search found entropy = 0 every time, so that is the default. Our choices: exactly M recycled tokens, at most
K/2, to which each token that goes contributes by nearness (theirs are as many as there are cells with such tokens);
`threshold` and `cell` are for small grids (they found 28.7 to 39.3, and 11.8 to 17.4, for 27 x 27 patches); where no
token is global, the most attended one is. Pruning in the language model is `carried`, the search `schedule_search`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, remaining, take

GREY, BINS = (0.299, 0.587, 0.114), 256


class GlobalAttention(TokenRouter):
    """Keeps what global tokens look at, and recycles some of the rest.

    Args:
        sizes: see `RouterSizes`.
        threshold: how many times the mean attention a global token receives.
        cell: side, in patches, of the cells of recycled tokens; 0 recycles nothing.
        entropy: weight of the patches' entropy.
    """

    stages = ("encoder_out", "projector_out")
    selects = False

    def __init__(self, sizes: RouterSizes, *, threshold: float = 2.0, cell: float = 4.0, entropy: float = 0.0) -> None:
        super().__init__(sizes)
        if threshold < 0 or (cell and cell < 1):
            raise ValueError(f"global_attention needs threshold >= 0 and cell 0 or at least 1, got {threshold}, {cell}")
        self.threshold, self.cell, self.entropy = threshold, cell, entropy
        self.needs = frozenset({"attention_BNN", "grid"}) | (frozenset({"pixels_B3HW"}) if entropy else frozenset())

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        score_BN, tokens = self.importance(context), tokens_BND.shape[1]
        wanted = int(tokens / self.cell**2) if self.cell else 0
        count = min(wanted, context.budget // 2, tokens - context.budget)
        whole_BK = best(score_BN, context.budget - count)
        owner_BN = torch.full_like(score_BN, -1, dtype=torch.int64)
        rest_BR = remaining(whole_BK, tokens)
        target_BM = rest_BR[:, :count]
        if count:
            # The most important one of each cell comes first; if there are fewer such cells than M, others follow.
            target_BM = rest_BR.gather(1, best(self._first_of_cells(score_BN, rest_BR, context.grid), count))
        place_BK, order_BK = torch.cat((whole_BK, target_BM), dim=1).sort(dim=1)
        slot_BK = order_BK.argsort(dim=1)
        owner_BN.scatter_(1, whole_BK, slot_BK[:, : whole_BK.shape[1]])
        recycled_BMD = take(tokens_BND, target_BM).float()
        if count:
            where_N2 = _where(context.grid, tokens_BND.device)
            distance_BRM = torch.cdist(where_N2[rest_BR], where_N2[target_BM])
            nearest_BR = distance_BRM.argmin(-1)
            weight_BRM = F.one_hot(nearest_BR, count) * score_BN.gather(1, rest_BR).clamp_min(1e-12)[..., None]
            recycled_BMD = (weight_BRM / weight_BRM.sum(1, keepdim=True)).mT @ take(tokens_BND, rest_BR).float()
            owner_BN.scatter_(1, rest_BR, slot_BK[:, whole_BK.shape[1] :].gather(1, nearest_BR))
        both_BKD = torch.cat((take(tokens_BND, whole_BK), recycled_BMD.to(tokens_BND.dtype)), dim=1)
        index_BK = torch.where(order_BK < whole_BK.shape[1], place_BK, -1)
        return RoutedTokens(take(both_BKD, order_BK), index_BK, place_BK, score_BN, owner_BN)

    def importance(self, context: RouterContext) -> Tensor:
        """Scores [B,N]."""
        assert context.attention_BNN is not None
        attention_BNN = context.attention_BNN.float()
        received_BN = attention_BNN.mean(1)
        floor_B1 = self.threshold * received_BN.mean(1, keepdim=True)
        global_BN = received_BN > torch.minimum(floor_B1, received_BN.amax(1, keepdim=True) * (1 - 1e-6))
        score_BN = (attention_BNN * global_BN[..., None]).sum(1) / global_BN.sum(1, keepdim=True)
        if self.entropy:
            assert context.pixels_B3HW is not None
            assert context.grid is not None
            score_BN = score_BN + self.entropy * patch_entropy(context.pixels_B3HW, context.grid).softmax(-1)
        return score_BN

    def _first_of_cells(self, score_BN: Tensor, rest_BR: Tensor, grid: tuple[int, int]) -> Tensor:
        """For the tokens that go, their scores, raised above all others for the best of each cell."""
        cell_N2 = (_where(grid, score_BN.device) / max(self.cell, 1)).long()
        cell_N = cell_N2[:, 0] * (grid[1] + 1) + cell_N2[:, 1]
        score_BR, cell_BR = score_BN.gather(1, rest_BR), cell_N[rest_BR]
        top_BC = score_BR.new_full((len(score_BR), int(cell_N.max()) + 1), float("-inf"))
        top_BC = top_BC.scatter_reduce(1, cell_BR, score_BR, "amax")
        return score_BR + (score_BR >= top_BC.gather(1, cell_BR)) * (score_BR.amax() + 1)


def patch_entropy(pixels_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Shannon entropy in bits [B,N] of the grey values, 0 to 255, of each patch."""
    grey_BHW = (pixels_B3HW * pixels_B3HW.new_tensor(GREY)[:, None, None]).sum(1).round().clamp(0, BINS - 1).long()
    grey_BNP = rearrange(grey_BHW, "b (h p) (w q) -> b (h w) (p q)", h=grid[0], w=grid[1])
    counts_BNG = pixels_B3HW.new_zeros(*grey_BNP.shape[:2], BINS).scatter_add_(
        2, grey_BNP, torch.ones_like(grey_BNP, dtype=pixels_B3HW.dtype)
    )
    return torch.special.entr(counts_BNG / grey_BNP.shape[2]).sum(-1) / torch.log(torch.tensor(2.0))


def _where(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of each patch, float32 [N,2]."""
    number_N = torch.arange(grid[0] * grid[1], device=device)
    return torch.stack((number_N // grid[1], number_N % grid[1]), dim=1).float()
