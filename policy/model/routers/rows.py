"""The rows that a router before the language model gets: the views of a sample, or one row with all its views.

Shape legend: B batch, X rows of all samples, N tokens of a row, n of them kept, D width, P tokens of all views as they
leave the towers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from cogvla.routing.router import RoutedTokens


def joined(routed: RoutedTokens, vision_BnD: Tensor, rows: int, row_tokens: int) -> RoutedTokens:
    """Join the results of all rows of a sample; indices count through all its rows.

    Args:
        routed: results of the rows.
        vision_BnD: their tokens, joined.
        rows: rows of a sample.
        row_tokens: tokens of a row before the router.
    """
    kept = routed.index_Bn.shape[1]
    row_X1 = torch.arange(rows, device=vision_BnD.device).repeat(len(vision_BnD))[:, None]

    def join(x_XN: Tensor) -> Tensor:
        return rearrange(x_XN, "(b r) n -> b (r n)", r=rows)

    index_Xn, owner_XN = routed.index_Bn, routed.owner_BN
    return replace(
        routed,
        tokens_BnD=vision_BnD,
        index_Bn=join(torch.where(index_Xn < 0, -1, index_Xn + row_X1 * row_tokens)),
        place_Bn=join(routed.place_Bn + row_X1 * row_tokens),
        score_BN=None if routed.score_BN is None else join(routed.score_BN),
        owner_BN=None if owner_XN is None else join(torch.where(owner_XN < 0, -1, owner_XN + row_X1 * kept)),
    )


def owners(routed: RoutedTokens, tokens: int, views: int, columns: int) -> Tensor:
    """Return for each token of the towers the token that it went into, or the nearest one of its view, [B,P].

    Args:
        routed: result of the router, with the rows joined.
        tokens: P.
        views: number of views.
        columns: columns of a view's grid of patches; 1 if the tokens are no patches.
    """
    each = tokens // views

    def spot(number: Tensor) -> Tensor:
        inside = number % each
        parts = (number // each * tokens, inside // columns, inside % columns)
        return torch.stack(parts, dim=-1).float()

    all_P = torch.arange(tokens, device=routed.index_Bn.device)
    far_BPn = torch.cdist(
        spot(all_P)[None], spot(routed.rows), compute_mode="donot_use_mm_for_euclid_dist"
    )  # products of such large numbers would be rounded
    nearest_BP, owner_BP = far_BPn.min(-1)
    near_BP = torch.where(nearest_BP < tokens, owner_BP, -1)  # with joint views, a view may have no token
    return near_BP if routed.owner_BN is None else torch.where(routed.owner_BN < 0, near_BP, routed.owner_BN)
