"""ToDRE, second stage: remove all vision tokens late in the language model, where nothing attends to them any more.

At layer 7L/8 the paper removes all vision tokens if the share of attention from text to vision and that from vision to
text are both below a threshold, whose value it does not give. In a policy, action tokens also attend to vision, so they
count as text. `calibrate_router` finds a threshold for a policy: the largest one below which no recorded observation's
actions change by more than a tolerance.

**The test is one-sided here.** In the paper's models a text precedes the picture, to which vision tokens attend. Here
all text follows, and the mask is causal (`routing.attention` other than `bidirectional`), so that the share from vision
to text is exactly 0 and only the share from text and actions to vision decides. Nothing is lost: in such a model
information flows in this direction only.

Our choices: without a `threshold`, all vision tokens are removed at this layer, which really shortens the sequence;
choose the layer such that the actions do not change. With a threshold, the rule is applied to each sample, and its
tokens are hidden, not removed, since shapes must not depend on the content; this shows the effect of the rule, but
saves no time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.registry import register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import kept


@register_router("late_exit")
class LateExit(TokenRouter):
    """Remove or hide all vision tokens.

    Args:
        sizes: see `RouterSizes`.
        threshold: attention share (0 to 1) below which vision tokens are hidden; None: always remove them.
    """

    stage = "llm_layer"
    stages = ("llm_layer",)
    scores = False

    def __init__(self, sizes: RouterSizes, *, threshold: float | None = None) -> None:
        super().__init__(sizes)
        self.threshold, self.hides = threshold, threshold is not None
        self.needs = frozenset() if threshold is None else frozenset({"share_B2"})

    def leaves(self, budget: int) -> int:
        return 0 if self.threshold is None else self.sizes.tokens

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        count = 0 if self.threshold is None else tokens_BND.shape[1]
        index_Bn = torch.arange(count, device=tokens_BND.device).expand(len(tokens_BND), -1)
        routed = kept(tokens_BND, index_Bn)
        if self.threshold is None:
            return routed
        assert context.share_B2 is not None
        stays_B1 = (context.share_B2 >= self.threshold).any(1, keepdim=True)
        return RoutedTokens(routed.tokens_BnD, index_Bn, index_Bn, mask_Bn=stays_B1.expand_as(index_Bn))


def fit_threshold(share_X2: Tensor, change_X: Tensor, tolerance: float) -> float | None:
    """Return the largest threshold at which no observation that exits has changed by more than the tolerance.

    Args:
        share_X2: `RouterContext.share_B2` of all observations.
        change_X: change of the actions if the vision tokens are removed.
        tolerance: largest change that is accepted.

    Returns:
        The threshold; None if every observation may exit. At 0 none does.
    """
    changed_X = change_X > tolerance
    # An observation stays if one of its shares is at least the threshold.
    return float(share_X2.amax(1)[changed_X].min()) if changed_X.any() else None
