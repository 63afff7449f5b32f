"""SpecPrune-VLA (arXiv 2509.05614): patches that did not change since the last picture go, except for important ones.

A patch is static if the cosine of its pixels with those of an earlier picture is at least 0.986. Kept anyway are the
tokens with the most attention at the last decision, and those with the most attention from the words now: 16 of 256
each, 25 in fine motion. Fine motion begins with a speed below 0.4, or with less than 0.1 in the plane, 0.1 along z and
0.2 in rotation; it ends with more than 0.2 along z or 0.3 in rotation.

Our choices, where text and released code (github.com/alexwhz-sjtu/SpecPrune-VLA) leave some or differ:

- n is fixed, so that tokens are ranked: first those kept anyway, then those that changed (both by attention), then the
  static ones, the least alike first. Motion only changes how many are kept anyway
- tokens kept anyway are counted over all views together; the reference has 16 in the main view and 12 in that of the
  wrist, and 25 and 19 in fine motion
- the earlier picture is that of the last decision. The released code takes one of 2 to 6 control steps before, by the
  speed; a policy sees pictures at decisions only
- the words' attention is that of the layer where tokens are removed, not of layers 0 and 1
- motion is in units of the normalised state (`router.hand`) between two decisions, with the thresholds of the released
  code, whose unit is that of actions. Motion along z counts in both directions; the released code takes fast motion
  down for slow motion. Rotation counts if `router.hand` has it
- the attention of the last decision is used; the released code computes it, and then returns no tokens
- the second part, which removes more tokens in deeper layers, is off in the released code, and not here

Shape legend: C entries of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import best, kept, minmax, ranked

COARSE, FINE = 16 / 256, 25 / 256
"""Shares of the tokens that are kept anyway, for each of the two reasons."""
SPEED, PLANE, HEIGHT, TURN = 0.4, 0.1, 0.1, 0.2
LEAVE_HEIGHT, LEAVE_TURN = 0.2, 0.3
DECISIONS = 4
"""Decisions that are remembered: fine motion that began earlier is not known."""
BELOW_ONE = 0.999


@register_router("spec_prune")
class SpecPrune(TokenRouter):
    """Remove what did not change, except for what got attention.

    Args:
        sizes: see `RouterSizes`.
        alike: cosine of pixels from which on a patch is static.
    """

    needs = frozenset({"alike_BON", "past_attention_BON", "motion_BOC", "age_B", "text_attention_BN"})
    stage = "llm_layer"
    stages = ("llm_layer",)
    remembers = DECISIONS

    def __init__(self, sizes: RouterSizes, *, alike: float = 0.986) -> None:
        super().__init__(sizes)
        if not 0 < alike <= 1:
            raise ValueError(f"spec_prune needs alike in (0, 1], a cosine, got {alike}")
        self.alike = alike

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.alike_BON is not None
        assert context.past_attention_BON is not None
        assert context.motion_BOC is not None
        assert context.age_B is not None
        assert context.text_attention_BN is not None
        begun_B1 = (context.age_B > 0)[:, None]
        fine_B1 = fine_motion(context.motion_BOC, context.age_B)[:, None]
        past_BN, now_BN = context.past_attention_BON[:, -1].float(), context.text_attention_BN.float()
        alike_BN = context.alike_BON[:, -1].float()
        tokens = self.sizes.tokens
        count_B1 = torch.where(fine_B1, max(1, round(FINE * tokens)), max(1, round(COARSE * tokens)))
        anyway_BN = _top(now_BN, count_B1) | (_top(past_BN, count_B1) & (past_BN > 0) & begun_B1)
        score_BN = tiers(alike_BN, (alike_BN >= self.alike) & begun_B1, anyway_BN, past_BN, now_BN)
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)


def tiers(alike_BN: Tensor, static_BN: Tensor, anyway_BN: Tensor, past_BN: Tensor, now_BN: Tensor) -> Tensor:
    """Return scores: from 2 on for tokens that are kept anyway, from 1 on for those that changed, below 1 for others.

    Args:
        alike_BN: cosine of a patch's pixels with the earlier ones.
        static_BN: True for static patches.
        anyway_BN: True for tokens that are kept anyway.
        past_BN: attention at the last decision.
        now_BN: attention now.
    """
    level_BN = torch.where(anyway_BN, 2.0, torch.where(static_BN, 0.0, 1.0))
    attention_BN = torch.maximum(minmax(past_BN), minmax(now_BN))
    return level_BN + BELOW_ONE * torch.where(level_BN > 0, attention_BN, minmax(-alike_BN))


def fine_motion(motion_BOC: Tensor, age_B: Tensor) -> Tensor:
    """Return whether the last of these motions [x, y, z, rotation ...] is fine, bool [B]; only the last `age` count."""
    motion_BOC = motion_BOC.float()
    speed_BO, plane_BO = motion_BOC[..., :3].norm(dim=-1), motion_BOC[..., :2].norm(dim=-1)
    height_BO, turn_BO = motion_BOC[..., 2].abs(), motion_BOC[..., 3:].norm(dim=-1)
    slow_BO = (plane_BO < PLANE) & (height_BO < HEIGHT) & (turn_BO < TURN)
    enter_BO, leave_BO = (speed_BO < SPEED) | slow_BO, (height_BO > LEAVE_HEIGHT) | (turn_BO > LEAVE_TURN)
    fine_B, steps = torch.zeros_like(enter_BO[:, 0]), motion_BOC.shape[1]
    for step in range(steps):
        fine_B = torch.where(fine_B, ~leave_BO[:, step], enter_BO[:, step]) & (age_B >= steps - step)
    return fine_B


def _top(score_BN: Tensor, count_B1: Tensor) -> Tensor:
    """Return True for the `count` tokens of each row with the largest scores."""
    return ranked(score_BN).argsort(dim=1) < count_B1
