"""Attention Debiasing: later tokens get more attention just because of their position; remove this trend before another
router reads the attention.

The authors' fitted trends are exp(rate * i) for token number i, with rates of 0.0011 to 0.0046 for 576 tokens, so every
attention score is multiplied by exp(-rate * i). `calibrate_router` fits the rate to the mean attention of recorded
observations; the default is LLaVA's.

Our choices: the rate scales with 576 / N; in a row of several pictures (`router.joint`) each has the trend from its own
first token; their step for padded pictures is left out, since pictures here are not padded. In an encoder, which is not
causal, expect a rate near 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogvla.routing.registry import build_router, register_router
from cogvla.routing.router import Calibrated, RoutedTokens, RouterContext, RouterSizes
from cogvla.routing.routers.wrapping import WrappingRouter

TOKENS = 576  # the authors' rates are for this many tokens


@register_router("debias")
class Debias(WrappingRouter, Calibrated):
    """Run another router on attention without the trend.

    Args:
        sizes: see `RouterSizes`.
        base: name of the other router; it must read attention.
        base_options: options of that router.
        rate: rate of the trend per token, for 576 tokens.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        *,
        base: str = "cls_attention",
        base_options: Mapping[str, Any] | None = None,
        rate: float = 0.002,
    ) -> None:
        super().__init__(sizes, build_router(base, sizes, base_options))
        self.each = max(sizes.tokens // sizes.views, 1)
        self.rate = rate * TOKENS / self.each
        if not self.needs & {"attention_LBN", "received_BN", "attention_BNN"}:
            raise ValueError(f"debias needs a base that reads attention, and {base!r} does not")

    def observed(self, tokens_BND: Tensor, context: RouterContext) -> Tensor:
        """Return the attention that each token of a picture gets [B,n]."""
        if context.attention_LBN is not None:
            seen_BN = context.attention_LBN.float().sum(0)
        elif context.received_BN is not None:
            seen_BN = context.received_BN.float()
        else:
            assert context.attention_BNN is not None
            seen_BN = context.attention_BNN.float().mean(1)
        return seen_BN.unflatten(1, (-1, self.each)).mean(1)

    def fitted(self, mean: Tensor) -> dict[str, float]:
        return {"rate": fit_rate(mean)}

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        number_N = torch.arange(tokens_BND.shape[1], device=tokens_BND.device) % self.each
        weight_N = torch.exp(-self.rate * number_N)
        scores = {name: getattr(context, name) for name in ("attention_LBN", "received_BN", "attention_BNN")}
        freed = {name: value.float() * weight_N for name, value in scores.items() if value is not None}
        return self.base.route(tokens_BND, replace(context, **freed))


def fit_rate(profile_N: Tensor) -> float:
    """Fit `Debias`'s rate to a mean attention profile [N], by least squares of its logarithm over the token number.

    Raises:
        ValueError: there is one token, or some get no attention.
    """
    if len(profile_N) < 2 or not (profile_N > 0).all():
        raise ValueError(
            "the rate of debias is a trend over the tokens of a picture: it needs two or more, all with attention, and "
            f"{int((profile_N > 0).sum())} of {len(profile_N)} get some"
        )
    number_N = torch.arange(len(profile_N), dtype=torch.float64, device=profile_N.device)
    number_N, log_N = number_N - number_N.mean(), profile_N.double().log()
    slope = (number_N @ (log_N - log_N.mean())) / (number_N @ number_N)
    return float(slope) * len(profile_N) / TOKENS
