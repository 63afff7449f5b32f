"""What routers share: choosing the best, similarities, grids.

Shape legend: B rows, N tokens, K tokens kept, D width, H x W grid.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.routing.router import RoutedTokens

STRETCH = 2.0
"""How much a smaller grid may be narrower or wider than the whole one."""


def best(score_BN: Tensor, count: int) -> Tensor:
    """Indices [B,K] of the largest scores, ascending; of equal ones the first."""
    return ranked(score_BN)[:, :count].sort(dim=1).values


def ranked(score_BN: Tensor) -> Tensor:
    """All indices, the largest score first; of equal ones the first."""
    return score_BN.sort(dim=1, descending=True, stable=True).indices


def take(tokens_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens [B,K,D] by index."""
    return tokens_BND.gather(1, index_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))


def kept(tokens_BND: Tensor, index_BK: Tensor, score_BN: Tensor | None = None) -> RoutedTokens:
    """The answer of a router that chooses tokens; their order is the one they had."""
    index_BK = index_BK.sort(dim=1).values
    return RoutedTokens(take(tokens_BND, index_BK), index_BK, index_BK, score_BN)


def straight_through(routed: RoutedTokens, probability_BN: Tensor) -> RoutedTokens:
    """The same tokens to the bit, through which gradients reach the probabilities of those that were kept."""
    surplus_BK1 = take((probability_BN - probability_BN.detach())[..., None], routed.index_BK)
    return replace(routed, tokens_BKD=routed.tokens_BKD * (1 + surplus_BK1.to(routed.tokens_BKD.dtype)))


def unit(x: Tensor) -> Tensor:
    """Float32 vectors of length 1."""
    return F.normalize(x.float(), dim=-1, eps=1e-6)


def minmax(score_BN: Tensor) -> Tensor:
    """Scores from 0 to 1 within each row; equal scores are all 0."""
    low, high = score_BN.amin(-1, keepdim=True), score_BN.amax(-1, keepdim=True)
    return (score_BN - low) / (high - low).clamp_min(1e-12)


def remaining(index_BK: Tensor, tokens: int) -> Tensor:
    """The N-K indices that are not in `index_BK`, ascending."""
    chosen_BN = torch.zeros(len(index_BK), tokens, device=index_BK.device).scatter_(1, index_BK, 1.0)
    return best(-chosen_BN, tokens - index_BK.shape[1])


def grid_shape(grid: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """Rows and columns of a smaller grid with so many cells, as near to the shape of `grid` as there is.

    Raises:
        ValueError: `count` is no such product; the message lists the counts that are.
    """
    if grid is None:
        raise ValueError("this router needs tokens that are patches of a grid")
    shapes: dict[int, tuple[float, int, int]] = {}
    for h in range(1, grid[0] + 1):
        for w in range(1, grid[1] + 1):
            stretch = abs(math.log(h * grid[1] / (w * grid[0])))
            if stretch <= math.log(STRETCH) + 1e-9:
                shapes[h * w] = min(shapes.get(h * w, (math.inf, 0, 0)), (stretch, h, w))
    if count not in shapes:
        possible = ", ".join(str(number) for number in sorted(shapes))
        raise ValueError(
            f"{count} tokens are no grid of the shape of {grid[0]} x {grid[1]}; possible budgets: {possible}"
        )
    return shapes[count][1:]


def cells(grid: tuple[int, int], shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For every patch the cell of the smaller grid that it is in [N], and for every cell its central patch [K]."""
    (rows, columns), (h, w) = grid, shape
    row_N = torch.arange(rows, device=device) * h // rows
    column_N = torch.arange(columns, device=device) * w // columns
    middle_h = ((torch.arange(h, device=device) * 2 + 1) * rows) // (2 * h)
    middle_w = ((torch.arange(w, device=device) * 2 + 1) * columns) // (2 * w)
    cell_N = (row_N[:, None] * w + column_N).flatten()
    return cell_N, (middle_h[:, None] * columns + middle_w).flatten()


def effective_rank(tokens_BND: Tensor) -> Tensor:
    """exp(entropy of the singular values) [B] of the tokens, not centred: how many directions they really use."""
    sigma_BM = torch.linalg.svdvals(tokens_BND.float())
    p_BM = sigma_BM / sigma_BM.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.special.entr(p_BM).sum(-1).exp()


def synthetic(tokens_BKD: Tensor, tokens: int) -> RoutedTokens:
    """The answer of a router that makes new tokens out of so many; they stand evenly spread over their places."""
    count = tokens_BKD.shape[1]
    middle_K = (torch.arange(count, device=tokens_BKD.device) * 2 + 1) * tokens // (2 * count)
    place_BK = middle_K.expand(len(tokens_BKD), -1)
    return RoutedTokens(tokens_BKD, torch.full_like(place_BK, -1), place_BK)
