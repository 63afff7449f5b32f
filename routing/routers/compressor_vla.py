"""Compressor-VLA: the instruction modulates the tokens; some new tokens read the whole picture, others one window each.

    x = FiLM(tokens; mean of the words)
    semantic (STC): k learned queries attend to all tokens x                          softmax(q (W x)' / sqrt C) x
    spatial (SRC): each window's mean attends to the tokens of its window             softmax(V mean (W x)' / sqrt C) x

The paper compresses 512 tokens of two views to 160. With 2 x 2 windows, 16 x 16 patches give 64 windows, and k = 16
queries make 80 tokens of each view: this is our reading, and what a budget of 80 gives here.

Our choices, because there is no code: a budget of n uses the finest windows that divide the grid and leave a query
(with n = 1, one window), and k = n minus the windows, unless `queries` says k; values are the tokens themselves, so
that a token which attends evenly is a mean; the windows' queries start at 0, as means. A window's token has the place
of its centre, and the semantic ones are evenly spread.

Shape legend: k semantic tokens, w windows, p patches of a window, C width of queries and keys.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.routing.film import FiLM, modulate
from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.routers.facility_location import mean_word
from cogvla.routing.selection import STRETCH, cells, synthetic, take


@register_router("compressor_vla")
class CompressorVLA(TokenRouter):
    """Compress the tokens with queries for the whole picture and for windows.

    Args:
        sizes: see `RouterSizes`.
        queries: number k of semantic tokens; None: see above.
        width: width of queries and keys.
    """

    needs = frozenset({"text_BTE", "grid"})
    stages = ("encoder_out", "projector_out")
    selects = False
    scores = False

    def __init__(self, sizes: RouterSizes, *, queries: int | None = None, width: int = 64) -> None:
        super().__init__(sizes)
        if width < 1:
            raise ValueError(f"compressor_vla needs width >= 1, got {width}")
        assert sizes.grid is not None
        self.windows = windows_of(sizes.grid, sizes.budget, queries)
        self.film = FiLM(sizes.text_width, sizes.width, 1, init=0.0)
        self.semantic = nn.Parameter(torch.randn(sizes.budget - self.windows[0] * self.windows[1], width))
        self.semantic_key = nn.Linear(sizes.width, width, bias=False)
        self.spatial, self.spatial_key = (nn.Linear(sizes.width, width, bias=False) for _ in range(2))
        nn.init.zeros_(self.spatial.weight)

    def leaves(self, budget: int) -> int:
        if budget != self.sizes.budget:
            raise ValueError(f"compressor_vla learns {self.sizes.budget} tokens; the budget cannot be {budget}")
        return budget

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        (down, across), tokens = self.windows, tokens_BND.shape[1]
        x_BND = tokens_BND.to(self.semantic.dtype)
        scale_LB1D, shift_LB1D = self.film(mean_word(context).to(x_BND.dtype))
        x_BND = modulate(x_BND, scale_LB1D[0], shift_LB1D[0])
        found = synthetic(attend(self.semantic, self.semantic_key(x_BND), x_BND), tokens)
        x_BwpD = rearrange(
            x_BND, "b (h p w q) d -> b (h w) (p q) d", h=down, w=across, p=context.grid[0] // down,
            q=context.grid[1] // across,
        )  # fmt: skip
        query_Bw1C = self.spatial(x_BwpD.mean(2, keepdim=True))
        window_BwD = attend(query_Bw1C, self.spatial_key(x_BwpD), x_BwpD)[:, :, 0]
        middle_w = cells(context.grid, self.windows, x_BND.device)[1].expand(len(x_BND), -1)
        place_Bn, order_Bn = torch.cat((found.place_Bn, middle_w), dim=1).sort(dim=1, stable=True)
        out_BnD = take(torch.cat((found.tokens_BnD, window_BwD), dim=1), order_Bn)
        return RoutedTokens(out_BnD.to(tokens_BND.dtype), torch.full_like(place_Bn, -1), place_Bn)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the means of the values [...,N,D] for the queries [...,n,C] and keys [...,N,C]."""
    return (query @ key.mT * key.shape[-1] ** -0.5).softmax(-1) @ value


def windows_of(grid: tuple[int, int], budget: int, queries: int | None) -> tuple[int, int]:
    """Return rows and columns of windows that divide the grid evenly.

    Args:
        grid: rows and columns of patches.
        budget: number of tokens, windows and queries together.
        queries: number of queries; None: the finest windows, and at least one query unless the budget is 1.

    Raises:
        ValueError: no such windows.
    """
    divisors = [[part for part in range(1, side + 1) if side % part == 0] for side in grid]
    shapes = [
        (h * w, -abs(h * grid[1] - w * grid[0]), h, w)
        for h in divisors[0]
        for w in divisors[1]
        if max(h * grid[1], w * grid[0]) <= STRETCH * min(h * grid[1], w * grid[0])
    ]
    if queries is None:
        if (least := min(shapes)[0]) > max(1, budget - 1):
            raise ValueError(
                f"compressor_vla has at least {least} windows of {grid[0]} x {grid[1]} patches, and one query: give a "
                f"budget of {least + 1} or more instead of {budget}"
            )
        return max(shape for shape in shapes if shape[0] <= max(1, budget - 1))[2:]
    if queries < 0:
        raise ValueError(f"compressor_vla needs queries >= 0, got {queries}")
    fitting = [shape for shape in shapes if shape[0] == budget - queries]
    if not fitting:
        possible = ", ".join(str(count + queries) for count in sorted({shape[0] for shape in shapes}))
        raise ValueError(
            f"compressor_vla with {queries} queries has no {budget - queries} windows that divide "
            f"{grid[0]} x {grid[1]} patches; possible budgets: {possible}"
        )
    return max(fitting)[2:]
