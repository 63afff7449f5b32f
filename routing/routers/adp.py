"""ADP, Action-aware Dynamic Pruning (arXiv 2509.22093): tokens that the words ask for, while the arm moves fast.

Tokens: the score of a token is the mean, over heads and words, of q . k / sqrt(d) with the first language layer's norm
and weights, without rotation. Gate: D is the distance that the end effector went between two decisions. With `window`,
tokens are removed if D is at least the largest of the two before it, all are kept if it is below the smallest, and
between them they are removed; with `average`, they are removed if D is at least the exponential mean of the last three
distances, D among them. All are kept at the first three decisions, and after three decisions in a row that removed
tokens.

Our choices, where text and released code (github.com/chen7086/VLA-ADP) leave some or differ:

- the score uses the weights of the layer before which tokens are removed; layer 0 is the paper's
- all views compete; the released code keeps 40 % of the tokens in the first view and 60 % in the second
- every sample has its own scores; the released code averages them over the batch
- the mean of `average` leaves out the distances before the last three, which are not remembered
- distances are in units of the normalised state (`router.hand`), since a policy need not know metres
- `base` puts the gate around any other router. In training, and where a network runs without a policy, tokens are
  always removed

Shape legend: C entries of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cogvla.routing.registry import build_router, register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter, latest
from cogvla.routing.routers.wrapping import WrappingRouter
from cogvla.routing.selection import best, kept

GATES, FULL = ("window", "average", "none"), 3
"""Rules of the gate, and the number of first decisions that keep everything."""


class WordMatch(TokenRouter):
    """Keep the tokens that the words ask for."""

    needs = frozenset({"text_match_BN"})
    stage = "llm_layer"
    stages = ("llm_layer",)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_match_BN is not None
        score_BN = context.text_match_BN.float()
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)


@register_router("adp")
class ADP(WrappingRouter):
    """Keep the tokens that the words ask for, in fast motion only.

    Args:
        sizes: see `RouterSizes`.
        gate: `window`, `average`, or `none` (always remove tokens).
        longest: number of decisions in a row that remove tokens.
        base: name of another router that removes the tokens; None: the score above.
        base_options: options of that router.
    """

    needs, stage, stages = WordMatch.needs, WordMatch.stage, WordMatch.stages

    def __init__(
        self,
        sizes: RouterSizes,
        *,
        gate: str = "window",
        longest: int = 3,
        base: str | None = None,
        base_options: Mapping[str, Any] | None = None,
    ) -> None:
        if base is None and base_options:
            raise ValueError("adp has base_options, but no base")
        super().__init__(sizes, WordMatch(sizes) if base is None else build_router(base, sizes, base_options))
        if gate not in GATES or longest < 1:
            raise ValueError(f"adp needs gate of {', '.join(GATES)} and longest of at least 1, got {gate}, {longest}")
        if self.base.gated:
            raise ValueError(f"adp needs a base without a gate, {base!r} has one")
        if self.base.projects and gate != "none":
            raise ValueError(
                f"adp needs a base that leaves the projector as it is, unlike {base!r} here: when all tokens are kept, "
                "they would pass the policy's own, which is not trained; set gate=none"
            )
        self.gate, self.longest, self.gated = gate, longest, gate != "none"
        self.remembers = max(FULL if self.gated else 0, self.base.remembers)

    def prunes(self, motion_BOC: Tensor, age_B: Tensor, run_B: Tensor) -> Tensor:
        distance_BO = motion_BOC[..., :3].float().norm(dim=-1)[:, -FULL:]
        before_BO, last_B = distance_BO[:, :-1], distance_BO[:, -1]
        if self.gate == "average":
            mean_B = distance_BO[:, 0]
            for step in range(1, FULL):
                mean_B = 0.5 * mean_B + 0.5 * distance_BO[:, step]
            moving_B = last_B >= mean_B
        else:
            moving_B = last_B >= before_BO.amin(1)
        return moving_B & (age_B >= FULL) & (run_B < self.longest)

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        return self.base.route(tokens_BND, latest(context, self.base.remembers))
