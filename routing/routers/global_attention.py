"""VFlowOpt's selection: keep the tokens that the tower's global tokens attend to, and recycle the others.

Global tokens are patches that get more than `threshold` times the mean attention. The importance of a token is the mean
attention that it gets from them, plus `entropy` times the softmax of the patches' Shannon entropy (of a grey histogram
of 256 bins). The most important tokens stay whole. Each cell of cell x cell patches that has removed tokens leaves one
recycled token: their importance-weighted mean, at the place of the most important of them.

The paper's search found entropy = 0 every time, so that is the default. Differences: the paper keeps n - N / cell^2
tokens whole, and the number of cells with removed tokens comes on top, so that its n is only approximate. Here as many
stay whole as possible such that they and the recycled tokens are exactly n; that number always exists, because one more
whole token is at most one recycled token less. Our choices: the cell grows until there are at most n/2 cells (for n = 1
nothing is recycled); the defaults of `threshold` and `cell` are for small grids (the paper found 28.7 to 39.3, and 11.8
to 17.4, for 27 x 27 patches; search them with `search_schedule`); if no token is global, the one with the most
attention counts as global. Pruning inside the language model is `carried`.

Shape legend: C cells, P pixels of a patch, G bins of grey, I = N+1 numbers of whole tokens.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, ranked, take

GREY, BINS = (0.299, 0.587, 0.114), 256


@register_router("global_attention")
class GlobalAttention(TokenRouter):
    """Keep the tokens that global tokens attend to, and merge the others into recycled tokens.

    Args:
        sizes: see `RouterSizes`.
        threshold: least attention that a global token gets, as a multiple of the mean.
        cell: least side of the cells of recycled tokens, in patches, may be a fraction; 0: no recycled tokens.
        entropy: weight of the patches' entropy.
    """

    needs = frozenset({"attention_BNN", "grid"})
    stages = ("encoder_out", "projector_out")
    selects = False

    def __init__(self, sizes: RouterSizes, *, threshold: float = 2.0, cell: float = 4.0, entropy: float = 0.0) -> None:
        super().__init__(sizes)
        if threshold < 0 or (cell and cell < 1):
            raise ValueError(f"global_attention needs threshold >= 0 and cell 0 or at least 1, got {threshold}, {cell}")
        self.threshold, self.cell, self.entropy = threshold, cell, entropy
        self.needs = self.needs | (frozenset({"pixels_B3HW"}) if entropy else frozenset())

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        score_BN, n = self.importance(context), context.budget
        cell_N, count = self._cells(context.grid, n, tokens_BND.device)
        rank_BN = ranked(score_BN).argsort(dim=1)
        if count == 0:
            chosen_Bn = best(score_BN, n)
            return RoutedTokens(take(tokens_BND, chosen_Bn), chosen_Bn, chosen_Bn, score_BN)
        cell_BN = cell_N.expand_as(rank_BN)
        last_BC = rank_BN.new_full((len(rank_BN), count), -1).scatter_reduce(1, cell_BN, rank_BN, "amax")
        # With w whole tokens, those of ranks 0 to w-1, the cells with a token of rank w or more are not empty.
        whole_I = torch.arange(rank_BN.shape[1] + 1, device=rank_BN.device)
        total_BI = whole_I + (last_BC[:, None] >= whole_I[:, None]).sum(-1)
        whole_B1 = (total_BI <= n).sum(1, keepdim=True) - 1
        gone_BN = rank_BN >= whole_B1
        waiting_BN = torch.where(gone_BN, rank_BN, rank_BN.shape[1])
        first_BC = rank_BN.new_full((len(rank_BN), count), rank_BN.shape[1]).scatter_reduce(
            1, cell_BN, waiting_BN, "amin"
        )
        recycled_BN = gone_BN & (rank_BN == first_BC.gather(1, cell_BN))
        place_Bn = best((~gone_BN | recycled_BN).float(), n)
        weight_BNC = (gone_BN * score_BN.clamp_min(1e-12))[..., None] * (
            cell_N[:, None] == torch.arange(count, device=cell_N.device)
        )
        share_BNC = weight_BNC / weight_BNC.sum(1, keepdim=True).clamp_min(1e-30)
        mean_BnD = take(share_BNC.mT @ tokens_BND.float(), cell_N[place_Bn]).to(tokens_BND.dtype)
        made_Bn = recycled_BN.gather(1, place_Bn)
        slot_BN = (~gone_BN | recycled_BN).long().cumsum(1) - 1
        heir_BC = slot_BN.new_zeros(len(slot_BN), count).scatter_add(1, cell_BN, slot_BN * recycled_BN)
        return RoutedTokens(
            torch.where(made_Bn[..., None], mean_BnD, take(tokens_BND, place_Bn)),
            torch.where(made_Bn, -1, place_Bn),
            place_Bn,
            score_BN,
            torch.where(gone_BN, heir_BC.gather(1, cell_BN), slot_BN),
        )

    def _cells(self, grid: tuple[int, int], budget: int, device: torch.device) -> tuple[Tensor, int]:
        """Return the cell of each patch, int64 [N], and the number of cells; 0: nothing is recycled."""
        side, (rows, columns) = self.cell, grid
        if not side or budget < 2:
            return torch.zeros(rows * columns, dtype=torch.int64, device=device), 0
        while math.ceil(rows / side) * math.ceil(columns / side) > budget // 2:
            side += 1
        number_N = torch.arange(rows * columns, device=device)
        row_N, column_N = (number_N // columns / side).long(), (number_N % columns / side).long()
        return row_N * math.ceil(columns / side) + column_N, math.ceil(rows / side) * math.ceil(columns / side)

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


def patch_entropy(pixels_B3HW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the Shannon entropy of each patch's grey values (0 to 255), in bits [B,N]."""
    grey_BHW = (pixels_B3HW * pixels_B3HW.new_tensor(GREY)[:, None, None]).sum(1).round().clamp(0, BINS - 1).long()
    grey_BNP = rearrange(grey_BHW, "b (h p) (w q) -> b (h w) (p q)", h=grid[0], w=grid[1])
    counts_BNG = pixels_B3HW.new_zeros(*grey_BNP.shape[:2], BINS).scatter_add_(
        2, grey_BNP, torch.ones_like(grey_BNP, dtype=pixels_B3HW.dtype)
    )
    return torch.special.entr(counts_BNG / grey_BNP.shape[2]).sum(-1) / torch.log(torch.tensor(2.0))
