"""ToDRE's second half: late in the language model, vision tokens are not read any more and can go altogether.

At layer 7L/8 the paper removes all vision tokens when the share of attention from text to vision and that from vision
to text are both below a threshold, which it does not give. For a policy, action tokens read too, so they count as text.

Our choices: without a `threshold` all tokens go at this layer, which really shortens the sequence: find the layer by
the actions that must not change. With one, each sample decides for itself, and its tokens are hidden, not removed,
since shapes may not depend on the content; that shows what the rule does, and saves no time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter
from cogvla.routing.selection import kept


class LateExit(TokenRouter):
    """No vision tokens from here on.

    Args:
        sizes: see `RouterSizes`.
        threshold: attention shares below which vision tokens are hidden; None: they always go.
    """

    stage = "llm_layer"
    stages = ("llm_layer",)

    def __init__(self, sizes: RouterSizes, *, threshold: float | None = None) -> None:
        super().__init__(sizes)
        self.threshold = threshold
        self.needs = frozenset() if threshold is None else frozenset({"share_B2"})

    def leaves(self, budget: int) -> int:
        return 0 if self.threshold is None else self.sizes.tokens

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        count = 0 if self.threshold is None else tokens_BND.shape[1]
        index_BK = torch.arange(count, device=tokens_BND.device).expand(len(tokens_BND), -1)
        routed = kept(tokens_BND, index_BK)
        if self.threshold is None:
            return routed
        assert context.share_B2 is not None
        stays_B1 = (context.share_B2 >= self.threshold).any(1, keepdim=True)
        return RoutedTokens(routed.tokens_BKD, index_BK, index_BK, mask_BK=stays_B1.expand_as(index_BK))
