"""Pointing at the target object: attention learns where the simulator says that it is.

Source: MolmoPoint. There, special tokens of the language model point: each attends to the vision tokens and picks the
one with the point, by cross-entropy on the attention's logits; then follow the part of the patch and the place in it.
Simulators give the points here: the target's and the goal's position, projected into every view.

In a policy with stage 1 the pointing tokens are there already: aggregation tokens attend to all patches, and are told
the instruction by FiLM. So nothing is added, and the logits are those of the towers' own attention in the last block
that is computed: half of its heads are taught, of each tower, view and token. The first half of the tokens points at
the target, the second at the goal. With L the logarithm of attention, and w_p the bilinear weights of the four patches
around a point,

    loss = mean over tokens, heads and views of -sum_p w_p L_p

What we left out: parts of patches and places in them (w_p is a place between patches already), the order of several
points, and the class "no more": a point outside of the picture has no weight.

Without stage 1 no token that knows the instruction looks at patches, and `objective.pointing` does nothing; there
`objective.reading` asks the action tokens for the same two positions.

Shape legend: X = B*V, B batch, V views, h heads, M aggregation tokens per view, P patches per view, s side of the
grid.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def pointing_loss(log_attention_XhMP: Tensor, points_BV22: Tensor, weight_BV2: Tensor) -> Tensor:
    """Cross-entropy between attention and the four patches around a point, by their bilinear weights.

    The first half of the tokens points at the target, the second at the goal, each with the first half of the heads.

    Args:
        log_attention_XhMP: see `VisionTower.forward`; M must be even.
        points_BV22, weight_BV2: see `Batch`.
    """
    heads, tokens, patches = log_attention_XhMP.shape[1:]
    side = round(patches**0.5)
    guided_X2P = rearrange(
        log_attention_XhMP[:, : max(1, heads // 2)], "x h (two m) p -> x two (h m) p", two=2, m=tokens // 2
    ).mean(2)
    points_X22 = rearrange(points_BV22, "b v two xy -> (b v) two xy")
    grid_X22 = (points_X22 * side - 0.5).clamp(0, side - 1)
    centres_s = torch.arange(side, device=grid_X22.device)
    weight_X2s2 = (1 - (grid_X22[:, :, None] - centres_s[:, None]).abs()).clamp(min=0)
    target_X2P = rearrange(
        weight_X2s2[..., 1][..., :, None] * weight_X2s2[..., 0][..., None, :], "x two row column -> x two (row column)"
    )
    cross_entropy_X2 = -(target_X2P * guided_X2P).sum(-1)
    return (cross_entropy_X2 * rearrange(weight_BV2, "b v two -> (b v) two")).mean()
