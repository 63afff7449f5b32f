"""Selection of tokens: functions that routers share for choosing the best, comparing tokens, and grids.

Shape legend: B rows, N tokens, n tokens kept, D width, H x W grid.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.routing.router import RoutedTokens

STRETCH = 2.0
"""Largest ratio by which the shape of a smaller grid may be narrower or wider than the whole one."""


def best(score_BN: Tensor, count: int) -> Tensor:
    """Return the indices [B,n] of the largest scores, ascending; of equal scores the first wins."""
    return ranked(score_BN)[:, :count].sort(dim=1).values


def ranked(score_BN: Tensor) -> Tensor:
    """Return all indices [B,N], the largest score first; of equal scores the first comes first."""
    return score_BN.sort(dim=1, descending=True, stable=True).indices


def part_of(budget: int, share: float) -> int:
    """Return this share of a budget, rounded, but at least one of it where the share is above 0 and others are left.

    Otherwise a method with two parts is another method at small budgets, and nothing says so.
    """
    return max(round(share * budget), int(share > 0 and budget > 1))


def take(tokens_BND: Tensor, index_Bn: Tensor) -> Tensor:
    """Return the tokens [B,n,D] with these indices."""
    return tokens_BND.gather(1, index_Bn[..., None].expand(-1, -1, tokens_BND.shape[-1]))


def kept(tokens_BND: Tensor, index_Bn: Tensor, score_BN: Tensor | None = None) -> RoutedTokens:
    """Build the result of a router that chooses tokens; they keep their order."""
    index_Bn = index_Bn.sort(dim=1).values
    return RoutedTokens(take(tokens_BND, index_Bn), index_Bn, index_Bn, score_BN)


def straight_through(routed: RoutedTokens, probability_BN: Tensor) -> RoutedTokens:
    """Let gradients flow to the probabilities of the kept tokens; the tokens stay the same to the bit."""
    surplus_Bn1 = take((probability_BN - probability_BN.detach())[..., None], routed.index_Bn)
    return replace(routed, tokens_BnD=routed.tokens_BnD * (1 + surplus_Bn1.to(routed.tokens_BnD.dtype)))


def unit(x: Tensor) -> Tensor:
    """Scale vectors to length 1, in float32."""
    return F.normalize(x.float(), dim=-1, eps=1e-6)


def minmax(score_BN: Tensor) -> Tensor:
    """Scale the scores of each row to 0 to 1; if all are equal, they become 0."""
    low, high = score_BN.amin(-1, keepdim=True), score_BN.amax(-1, keepdim=True)
    return (score_BN - low) / (high - low).clamp_min(1e-12)


def remaining(index_Bn: Tensor, tokens: int) -> Tensor:
    """Return the N-n indices that are not in `index_Bn`, ascending; `tokens` is N."""
    chosen_BN = torch.zeros(len(index_Bn), tokens, device=index_Bn.device).scatter_(1, index_Bn, 1.0)
    return best(-chosen_BN, tokens - index_Bn.shape[1])


def grid_shape(grid: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """Return rows and columns of a smaller grid with `count` cells, with the shape nearest to that of `grid`.

    Raises:
        ValueError: there is no such grid; the message lists the possible counts.
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
            f"{count} tokens do not form a grid of nearly the shape {grid[0]} x {grid[1]}; possible budgets: {possible}"
        )
    return shapes[count][1:]


def cells(grid: tuple[int, int], shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each patch's cell in the smaller grid, int64 [N], and each cell's central patch, int64 [n].

    Args:
        grid: rows and columns of the patches.
        shape: rows and columns of the cells.
        device: device of the result.
    """
    (rows, columns), (h, w) = grid, shape
    row_N = torch.arange(rows, device=device) * h // rows
    column_N = torch.arange(columns, device=device) * w // columns
    middle_h = ((torch.arange(h, device=device) * 2 + 1) * rows) // (2 * h)
    middle_w = ((torch.arange(w, device=device) * 2 + 1) * columns) // (2 * w)
    cell_N = (row_N[:, None] * w + column_N).flatten()
    return cell_N, (middle_h[:, None] * columns + middle_w).flatten()


def effective_rank(tokens_BND: Tensor) -> Tensor:
    """Return the effective rank [B] of the tokens: exp(entropy of the singular values), without centring."""
    sigma_BM = torch.linalg.svdvals(tokens_BND.float())
    p_BM = sigma_BM / sigma_BM.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.special.entr(p_BM).sum(-1).exp()


def synthetic(tokens_BnD: Tensor, tokens: int) -> RoutedTokens:
    """Build the result of a router that makes new tokens out of `tokens`; their places are evenly spread."""
    count = tokens_BnD.shape[1]
    middle_n = (torch.arange(count, device=tokens_BnD.device) * 2 + 1) * tokens // (2 * count)
    place_Bn = middle_n.expand(len(tokens_BnD), -1)
    return RoutedTokens(tokens_BnD, torch.full_like(place_Bn, -1), place_Bn)
