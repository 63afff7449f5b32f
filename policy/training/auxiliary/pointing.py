"""Pointing losses: attention learns the positions of the target object and of its goal in the picture.

Source: MolmoPoint, where special tokens of the language model attend to the vision tokens and choose the one with the
point, trained by cross-entropy on the attention's logits; then they choose a part of the patch and a place in it. Here
the points come from the simulator: positions of target and goal, projected into every view. There are two forms, for
the two kinds of vision tokens. Let w_p be the bilinear weights of the four patches around a point.

**Aggregation tokens** (`objective.pointing`, with stage 1). Aggregation tokens attend to all patches, and FiLM gives
them the instruction, so they serve as pointing tokens and no parameters are added. The loss uses the attention in the
last computed block of each tower, in half of its heads. The first half of the tokens points at the target, the second
at the goal. With L the logarithm of the attention,

    loss = mean over tokens, heads and views of -sum_p w_p L_p

**Plain patches** (`objective.pointer`, without stage 1). Here no token with the instruction attends to patches before
the language model. So two pointing tokens are computed from s, the mean of the action tokens' states, after the
language model. Each attends with a query to the vision tokens x at the input of the language model, after a token
router:

    logits_n = query(s) . key(x_n) / sqrt(width of keys)       loss = -sum_n w_n log softmax(logits)_n

over the tokens of all views together, with w divided by its sum over the tokens. A router could use these logits as
scores of the patches.

Left out: parts of patches and places in them (the weights w already interpolate between patches), the order of several
points, and the class "no more": points outside of the picture, or whose patches were routed away, have no weight.

Shape legend: X = B*V, B batch, V views, h heads, M aggregation tokens per view, P patches per view, H x W their grid,
N vision tokens, J action tokens, D width, C width of keys.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


def pointing_loss(log_attention_XhMP: Tensor, points_BV22: Tensor, weight_BV2: Tensor) -> Tensor:
    """Compute the cross-entropy between attention and the bilinear weights of the four patches around each point.

    The first half of the tokens points at the target, the second at the goal, each with the first half of the heads.

    Args:
        log_attention_XhMP: see `VisionTower.forward`; M must be even.
        points_BV22: points in the views, see `Batch`.
        weight_BV2: weights of the points, see `Batch`.
    """
    heads, tokens, patches = log_attention_XhMP.shape[1:]
    side = round(patches**0.5)
    guided_X2P = rearrange(
        log_attention_XhMP[:, : max(1, heads // 2)], "x h (two m) p -> x two (h m) p", two=2, m=tokens // 2
    ).mean(2)
    target_X2P = patch_weights(rearrange(points_BV22, "b v two xy -> (b v) two xy"), side, side)
    cross_entropy_X2 = -(target_X2P * guided_X2P).sum(-1)
    return (cross_entropy_X2 * rearrange(weight_BV2, "b v two -> (b v) two")).mean()


def patch_weights(points_X22: Tensor, rows: int, columns: int) -> Tensor:
    """Return the bilinear weights [X,2,P] of the four patches around each point, which sum to 1.

    Args:
        points_X22: (right, down) in [0,1]. Points beyond the centres of the border's patches are moved to them.
        rows: rows of the grid, H.
        columns: columns of the grid, W.
    """
    near = []
    for axis, count in ((1, rows), (0, columns)):
        place_X2 = (points_X22[..., axis] * count - 0.5).clamp(0, count - 1)
        centres_c = torch.arange(count, device=place_X2.device)
        near.append((1 - (place_X2[..., None] - centres_c).abs()).clamp(min=0))
    return rearrange(near[0][..., :, None] * near[1][..., None, :], "x two row column -> x two (row column)")


class Pointer(nn.Module):
    """Two pointing tokens, for target and goal; used in training only.

    Args:
        width: D.
        grid: (H, W), the patches of a view.
        keys: C.
    """

    def __init__(self, width: int, grid: tuple[int, int], keys: int = 32) -> None:
        super().__init__()
        self.grid = grid
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * keys))
        self.key = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, keys))

    def logits(self, states_BJD: Tensor, vision_BND: Tensor) -> Tensor:
        """Return the logits of all vision tokens for target and goal, float32 [B,2,N]."""
        query_B2C = rearrange(self.query(states_BJD.mean(1)), "b (two c) -> b two c", two=2)
        key_BNC = self.key(vision_BND)
        return (query_B2C @ key_BNC.mT).float() / key_BNC.shape[-1] ** 0.5

    def forward(
        self,
        states_BJD: Tensor,
        vision_BND: Tensor,
        kept_BN: Tensor | None,
        points_BV22: Tensor,
        weight_BV2: Tensor,
    ) -> Tensor:
        """Compute the mean cross-entropy; a point without a kept patch counts as 0.

        Args:
            states_BJD: states of the action tokens.
            vision_BND: vision tokens, see `ModelOutput`.
            kept_BN: their patches, see `ModelOutput`.
            points_BV22: points in the views, see `Batch`.
            weight_BV2: weights of the points, see `Batch`.
        """
        weight_X2P = patch_weights(rearrange(points_BV22, "b v two xy -> (b v) two xy"), *self.grid)
        weight_BV2P = rearrange(weight_X2P, "(b v) two p -> b v two p", b=len(points_BV22)) * weight_BV2[..., None]
        weight_B2N = rearrange(weight_BV2P, "b v two p -> b two (v p)")
        if kept_BN is not None:
            index_B2N = kept_BN.clamp(min=0)[:, None].expand(-1, 2, -1)
            weight_B2N = weight_B2N.gather(2, index_B2N) * (kept_BN >= 0)[:, None]
        target_B2N = weight_B2N / weight_B2N.sum(-1, keepdim=True).clamp(min=1e-6)
        return -(target_B2N * self.logits(states_BJD, vision_BND).log_softmax(-1)).sum(-1).mean()
