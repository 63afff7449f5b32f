"""VLA-IAP, Interaction-Aligned Pruning (arXiv 2603.22991): what the words name, what moves, and what has edges.

Three scores of a patch: semantic (attention of the words), motion (second difference of the last three pictures, closed
and blurred), and edges (Sobel). While the moving patches have little in common with those that the words name (IoU at
most 0.05), only patches that are weak in both go; otherwise, as when a hand reaches its target, the best of the named
ones and the moving ones stay.

No code is released, and the paper's details were not at hand; our choices:

- n is fixed, so that patches are ranked by these levels first, and then by semantic + motion + `edges` times edges,
  each scaled to 0 to 1
- semantic: softmax of the words' products with the tokens over sqrt(D), mean over words, then over 3 x 3 patches
- motion: mean over a patch of the grey pictures' absolute second difference; a 3 x 3 closing (what lies between moving
  patches moves), and a 3 x 3 binomial blur. Nothing older than two decisions is accumulated
- named or moving: above the mean of the row plus its standard deviation for motion and the best of the named, above the
  mean for the named ones
- the first decision of an episode has no motion, the second one counts twice its first difference

Shape legend: X pictures, Y rows of a grid, E language width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept, minmax

BELOW_ONE = 0.999


@register_router("vla_iap")
class VLAIAP(TokenRouter):
    """Join what the words name, what moves and what has edges.

    Args:
        sizes: see `RouterSizes`.
        edges: weight of the edges.
        overlap: IoU of named and moving patches above which only the best of them stay.
    """

    needs = frozenset({"grid", "text_BTE", "pixels_B3HW", "past_pixels_BO3HW"})
    stage = "projector_out"
    stages = ("projector_out",)
    remembers = 2

    def __init__(self, sizes: RouterSizes, *, edges: float = 0.3, overlap: float = 0.05) -> None:
        super().__init__(sizes)
        if edges < 0 or not 0 <= overlap <= 1:
            raise ValueError(f"vla_iap needs edges of at least 0 and overlap in [0, 1], got {edges} and {overlap}")
        self.edges, self.overlap = edges, overlap

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_BTE is not None
        assert context.text_mask_BT is not None
        assert context.pixels_B3HW is not None
        assert context.past_pixels_BO3HW is not None
        assert context.grid is not None
        grid = context.grid
        semantic_BN = minmax(_blurred(named(tokens_BND, context.text_BTE, context.text_mask_BT), grid, (1.0, 1.0, 1.0)))
        grey_BOHW = torch.cat((context.past_pixels_BO3HW, context.pixels_B3HW[:, None]), dim=1).float().mean(2)
        motion_BN = minmax(moving(grey_BOHW, grid))
        edge_BN = minmax(patch_means(sobel(grey_BOHW[:, -1]), grid))
        named_BN = semantic_BN > semantic_BN.mean(1, keepdim=True)
        core_BN, moving_BN = _outstanding(semantic_BN), _outstanding(motion_BN)
        level_BN = levels(named_BN, core_BN, moving_BN, self.overlap)
        joined_BN = (semantic_BN + motion_BN + self.edges * edge_BN) / (2 + self.edges)
        score_BN = level_BN + BELOW_ONE * joined_BN
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)


def levels(named_BN: Tensor, core_BN: Tensor, moving_BN: Tensor, overlap: float) -> Tensor:
    """Return 2 for patches that stay, 1 for those that may, 0 for those that go first.

    Args:
        named_BN: True for patches that the words name.
        core_BN: True for the best of them.
        moving_BN: True for patches that move.
        overlap: see `VLAIAP`.
    """
    either_BN = named_BN | moving_BN
    far_BN = (iou(named_BN, moving_BN) <= overlap)[:, None].expand_as(named_BN)
    near_BN = torch.where(core_BN | moving_BN, 2.0, either_BN.float())
    return torch.where(far_BN, either_BN.float(), near_BN)


def iou(one_BN: Tensor, other_BN: Tensor) -> Tensor:
    """Return the intersection of two sets over their union [B]; 0 if both are empty."""
    return (one_BN & other_BN).sum(1) / (one_BN | other_BN).sum(1).clamp_min(1)


def named(tokens_BND: Tensor, text_BTE: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the attention [B,N] of the real words to the tokens, mean over words."""
    logits_BTN = text_BTE.float() @ tokens_BND.float().mT * tokens_BND.shape[-1] ** -0.5
    real_BT1 = mask_BT[..., None].float()
    return (logits_BTN.softmax(-1) * real_BT1).sum(1) / real_BT1.sum(1).clamp_min(1)


def moving(grey_BOHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how much each patch moves [B,N], given three pictures."""
    second_BHW = (grey_BOHW[:, -1] - 2 * grey_BOHW[:, -2] + grey_BOHW[:, -3]).abs()
    map_B1YW = _map(patch_means(second_BHW, grid), grid)
    wide_B1YW = F.max_pool2d(F.pad(map_B1YW, (2, 2, 2, 2)), 3, stride=1)
    closed_B1YW = -F.max_pool2d(-wide_B1YW, 3, stride=1)
    return _blurred(closed_B1YW.flatten(1), grid, (1.0, 2.0, 1.0))


def sobel(grey_XHW: Tensor) -> Tensor:
    """Return the length of the Sobel gradient [X,H,W]; pixels at the border repeat outwards."""
    smooth, slope = grey_XHW.new_tensor([1.0, 2.0, 1.0]), grey_XHW.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack((torch.outer(smooth, slope), torch.outer(slope, smooth)))[:, None]
    padded = F.pad(grey_XHW[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels).norm(dim=1)


def patch_means(values_XHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean of each patch [X,N]."""
    return reduce(values_XHW, "x (h y) (w z) -> x (h w)", "mean", h=grid[0], w=grid[1])


def _outstanding(score_BN: Tensor) -> Tensor:
    """Return True for scores above the mean plus the standard deviation of their row."""
    return score_BN > score_BN.mean(1, keepdim=True) + score_BN.std(1, keepdim=True, unbiased=False)


def _map(values_BN: Tensor, grid: tuple[int, int]) -> Tensor:
    return rearrange(values_BN, "b (h w) -> b 1 h w", h=grid[0], w=grid[1])


def _blurred(values_BN: Tensor, grid: tuple[int, int], weights: tuple[float, float, float]) -> Tensor:
    """Return the weighted mean of each patch and its neighbours; those at the border repeat outwards."""
    line_3 = values_BN.new_tensor(weights)
    kernel = torch.outer(line_3, line_3)
    padded = F.pad(_map(values_BN, grid), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, (kernel / kernel.sum())[None, None]).flatten(1)
