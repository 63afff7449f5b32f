"""GridS: a network looks at the whole picture and names n points; the tokens are sampled there.

    (x, y) of n points = sigmoid(Linear(relu(Linear(mean of the tokens))))       in [0,1], hidden width 512
    token = bilinear sample of the grid at (x, y) + MLP(x, y)                    2 -> 256 -> D

The corners of the grid are (0, 0) and (1, 1) (`align_corners`), and the sample is the sum over patches of
max(0, 1 - |dx|) max(0, 1 - |dy|) times the patch: two small products, and no special case at the border (the authors'
sampler returns 0 at x = 1 and y = 1). `norm` applies LayerNorm to the mean first; without it, large features push all
points into the corners, where the sigmoid has no gradient.

Our choices: before training, the points are spread evenly, whatever n is, and the MLP of the coordinates returns 0, so
that training starts with plain samples; a budget below the largest one uses the first points; a token has the place of
its nearest patch, and tokens are in the order of their places. The score of a patch is its share in all samples.
Points are float32; the MLP of the coordinates reads them in the precision of its weights.

Shape legend: H rows and W columns of the grid, I hidden numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import take

PLASTIC = 1.32471795724474602596
"""Real solution of p^3 = p + 1: multiples of 1/p and 1/p^2 fill a square evenly (the R2 sequence)."""


@register_router("grids")
class GridS(TokenRouter):
    """Sample the grid of tokens at n learned points.

    Args:
        sizes: see `RouterSizes`.
        hidden: hidden width of the network that names the points.
        norm: normalise its input.
    """

    needs = frozenset({"grid"})
    stages = ("encoder_out", "projector_out")
    selects = False

    def __init__(self, sizes: RouterSizes, *, hidden: int = 512, norm: bool = True) -> None:
        super().__init__(sizes)
        if hidden < 1:
            raise ValueError(f"grids needs hidden >= 1, got {hidden}")
        self.norm = norm
        self.first, self.last = nn.Linear(sizes.width, hidden), nn.Linear(hidden, 2 * sizes.budget)
        self.coordinates = nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, sizes.width))
        with torch.no_grad():
            number_n1 = torch.arange(1, sizes.budget + 1, dtype=torch.float64)[:, None]
            even_n2 = (0.5 + number_n1 / torch.tensor([PLASTIC, PLASTIC**2], dtype=torch.float64)) % 1
            self.last.weight.mul_(0.1)
            self.last.bias.copy_(torch.logit(even_n2.clamp(0.02, 0.98)).flatten())
        for parameter in self.coordinates[2].parameters():
            nn.init.zeros_(parameter)

    def leaves(self, budget: int) -> int:
        if budget > self.sizes.budget:
            raise ValueError(f"grids learns {self.sizes.budget} points; the budget cannot be {budget}")
        return budget

    def points(self, tokens_BND: Tensor) -> Tensor:
        """Return (x, y) in [0,1] of all points, float32 [B,n,2]."""
        mean_BD = tokens_BND.float().mean(1)
        if self.norm:
            mean_BD = F.layer_norm(mean_BD, mean_BD.shape[-1:])
        hidden_BI = F.linear(mean_BD, self.first.weight.float(), self.first.bias.float()).relu()
        return F.linear(hidden_BI, self.last.weight.float(), self.last.bias.float()).sigmoid().unflatten(1, (-1, 2))

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.grid is not None
        rows, columns = context.grid
        points_Bn2 = self.points(tokens_BND)[:, : context.budget]
        last_2 = torch.tensor([columns - 1.0, rows - 1.0], device=points_Bn2.device)
        nearest_Bn2 = (points_Bn2.detach() * last_2).round().long()
        place_Bn, order_Bn = (nearest_Bn2[..., 1] * columns + nearest_Bn2[..., 0]).sort(dim=1, stable=True)
        points_Bn2 = take(points_Bn2, order_Bn)
        share_BnN = bilinear(points_Bn2, context.grid)
        sample_BnD = share_BnN @ tokens_BND.float()
        coordinate_BnD = self.coordinates(points_Bn2.to(self.first.weight.dtype))
        tokens_BnD = (sample_BnD + coordinate_BnD.float()).to(tokens_BND.dtype)
        return RoutedTokens(tokens_BnD, torch.full_like(place_Bn, -1), place_Bn, share_BnN.detach().sum(1))


def bilinear(points_Bn2: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the weight [B,n,H*W] of each patch in a bilinear sample at (x, y) in [0,1]; each row sums to 1."""
    rows, columns = grid
    x_Bn1, y_Bn1 = points_Bn2.split(1, dim=-1)
    column_W = torch.arange(columns, device=points_Bn2.device)
    row_H = torch.arange(rows, device=points_Bn2.device)
    across_BnW = (1 - (x_Bn1 * (columns - 1) - column_W).abs()).clamp_min(0)
    down_BnH = (1 - (y_Bn1 * (rows - 1) - row_H).abs()).clamp_min(0)
    return (down_BnH[..., None] * across_BnW[..., None, :]).flatten(2)
