"""VFlowOpt's selection: keep the tokens that the tower's global tokens attend to, and recycle the others.

Global tokens are patches that get more than `threshold` times the mean attention. The importance of a token is the mean
attention that it gets from them, plus `entropy` times the softmax of the patches' Shannon entropy (of a grey histogram
of 256 bins). M = N / cell^2 of the n tokens are recycled tokens: importance-weighted means of removed tokens, each at
the place of the most important removed token of a cell.

The paper's search found entropy = 0 every time, so that is the default. Our choices: there are exactly M recycled
tokens, at most n/2, and each removed token contributes to the nearest one (in the paper there is one recycled token for
each cell that has removed tokens); the defaults of `threshold` and `cell` are for small grids (the paper found 28.7 to
39.3, and 11.8 to 17.4, for 27 x 27 patches); if no token is global, the one with the most attention counts as global.
Pruning inside the language model is `carried`; the search is `schedule_search`.

Shape legend: R tokens that are not kept whole, M recycled tokens, C cells, P pixels of a patch, G bins of grey.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, remaining, take

GREY, BINS = (0.299, 0.587, 0.114), 256


@register_router("global_attention")
class GlobalAttention(TokenRouter):
    """Keep the tokens that global tokens attend to, and merge the others into recycled tokens.

    Args:
        sizes: see `RouterSizes`.
        threshold: least attention that a global token gets, as a multiple of the mean.
        cell: side of the cells of recycled tokens, in patches; 0: no recycled tokens.
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
        whole_Bn = best(score_BN, context.budget - count)
        owner_BN = torch.full_like(score_BN, -1, dtype=torch.int64)
        rest_BR = remaining(whole_Bn, tokens)
        target_BM = rest_BR[:, :count]
        if count:
            # The most important removed token of each cell comes first; if there are fewer cells than M, others follow.
            target_BM = rest_BR.gather(1, best(self._first_of_cells(score_BN, rest_BR, context.grid), count))
        place_Bn, order_Bn = torch.cat((whole_Bn, target_BM), dim=1).sort(dim=1)
        slot_Bn = order_Bn.argsort(dim=1)
        owner_BN.scatter_(1, whole_Bn, slot_Bn[:, : whole_Bn.shape[1]])
        recycled_BMD = take(tokens_BND, target_BM).float()
        if count:
            where_N2 = _where(context.grid, tokens_BND.device)
            distance_BRM = torch.cdist(where_N2[rest_BR], where_N2[target_BM])
            nearest_BR = distance_BRM.argmin(-1)
            mine_BRM = nearest_BR[..., None] == torch.arange(count, device=nearest_BR.device)
            weight_BRM = mine_BRM * score_BN.gather(1, rest_BR).clamp_min(1e-12)[..., None]
            recycled_BMD = (weight_BRM / weight_BRM.sum(1, keepdim=True)).mT @ take(tokens_BND, rest_BR).float()
            owner_BN.scatter_(1, rest_BR, slot_Bn[:, whole_Bn.shape[1] :].gather(1, nearest_BR))
        both_BnD = torch.cat((take(tokens_BND, whole_Bn), recycled_BMD.to(tokens_BND.dtype)), dim=1)
        index_Bn = torch.where(order_Bn < whole_Bn.shape[1], place_Bn, -1)
        return RoutedTokens(take(both_BnD, order_Bn), index_Bn, place_Bn, score_BN, owner_BN)

    def importance(self, context: RouterContext) -> Tensor:
        """Return the importance of each token, float32 [B,N]."""
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
        """Return the scores of the removed tokens, with the best one of each cell raised above all others."""
        cell_N2 = (_where(grid, score_BN.device) / max(self.cell, 1)).long()
        cell_N = cell_N2[:, 0] * (grid[1] + 1) + cell_N2[:, 1]
        score_BR, cell_BR = score_BN.gather(1, rest_BR), cell_N[rest_BR]
        top_BC = score_BR.new_full((len(score_BR), (grid[0] + 1) * (grid[1] + 1)), float("-inf"))
        top_BC = top_BC.scatter_reduce(1, cell_BR, score_BR, "amax")
        return score_BR + (score_BR >= top_BC.gather(1, cell_BR)) * (score_BR.amax() + 1)


def patch_entropy(pixels_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the Shannon entropy of each patch's grey values (0 to 255), in bits [B,N]."""
    grey_BHW = (pixels_B3HW * pixels_B3HW.new_tensor(GREY)[:, None, None]).sum(1).round().clamp(0, BINS - 1).long()
    grey_BNP = rearrange(grey_BHW, "b (h p) (w q) -> b (h w) (p q)", h=grid[0], w=grid[1])
    counts_BNG = pixels_B3HW.new_zeros(*grey_BNP.shape[:2], BINS).scatter_add_(
        2, grey_BNP, torch.ones_like(grey_BNP, dtype=pixels_B3HW.dtype)
    )
    return torch.special.entr(counts_BNG / grey_BNP.shape[2]).sum(-1) / torch.log(torch.tensor(2.0))


def _where(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return row and column of each patch, float32 [N,2]."""
    number_N = torch.arange(grid[0] * grid[1], device=device)
    return torch.stack((number_N // grid[1], number_N % grid[1]), dim=1).float()
