"""DAMRO's outlier tokens: the patches that attract most attention often lie in the background; another router chooses
among the others.

The `count` tokens with most attention (of [CLS], in the last block) are taken away first, as far as the budget allows.

DAMRO decodes text twice, once from these tokens alone, and subtracts. Our choice is to drop them: the second pass would
double the time of a decision, and the difference of two chunks of actions is not one of log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogvla.routing.registry import build_router, register_router
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes
from cogvla.routing.routers.debias import Debias
from cogvla.routing.routers.wrapping import WrappingRouter
from cogvla.routing.selection import ranked, remaining, take

WIDE = ("encoder_BNF", "keys_BNC")
FLAT = ("received_BN", "score_BN", "guide_BN")
"""Items of `RouterContext` with a row, or a number, for each token."""


@register_router("damro")
class Damro(WrappingRouter):
    """Take outlier tokens away, then run another router.

    Args:
        sizes: see `RouterSizes`.
        base: name of the other router; it must choose tokens, and not read their grid or their numbers (`debias` does:
            put it around this one).
        base_options: options of that router.
        count: number of outliers.
    """

    stages: ClassVar[tuple[str, ...]] = ("encoder_out", "projector_out")

    def __init__(
        self,
        sizes: RouterSizes,
        *,
        base: str = "cls_attention",
        base_options: Mapping[str, Any] | None = None,
        count: int = 10,
    ) -> None:
        super().__init__(sizes, build_router(base, replace(sizes, grid=None), base_options))
        if count < 1:
            raise ValueError(f"damro needs count >= 1, got {count}")
        exact = self.base.selects and self.base.leaves(1) == 1 and not self.base.remembers
        if not exact or not set(self.base.stages) & set(Damro.stages):
            raise ValueError(
                f"damro needs a base that chooses tokens before the language model by this moment alone, not {base!r}"
            )
        if any(isinstance(router, Debias) for router in self.base.modules()):
            raise ValueError(
                "damro needs a base without debias, which would number the tokens that are left anew: put debias "
                "around damro, with name=debias and base=damro"
            )
        self.count, self.needs = count, self.base.needs | {"attention_LBN"}  # type: ignore[misc]
        self.stages = tuple(stage for stage in Damro.stages if stage in self.base.stages)  # type: ignore[misc]
        self.stage = self.stages[0]  # type: ignore[misc]

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.attention_LBN is not None
        tokens = tokens_BND.shape[1]
        attention_BN = context.attention_LBN[-1].float()
        outlier_Bn = ranked(attention_BN)[:, : min(self.count, tokens - context.budget)]
        left_Bn = remaining(outlier_Bn, tokens)
        items: dict[str, Any] = {name: getattr(context, name) for name in (*WIDE, *FLAT)}
        items = {name: _rows(value, left_Bn) for name, value in items.items() if value is not None}
        items["attention_LBN"] = torch.stack([row_BN.gather(1, left_Bn) for row_BN in context.attention_LBN])
        if context.attention_BNN is not None:
            items["attention_BNN"] = take(take(context.attention_BNN, left_Bn).mT, left_Bn).mT
        routed = self.base.route(take(tokens_BND, left_Bn), replace(context, **items))
        index_Bn, score_BN = left_Bn.gather(1, routed.index_Bn), None
        if routed.score_BN is not None:
            lowest_BN = routed.score_BN.amin(1, keepdim=True).expand(-1, tokens)
            score_BN = lowest_BN.scatter(1, left_Bn, routed.score_BN)
        return replace(routed, index_Bn=index_Bn, place_Bn=index_Bn, score_BN=score_BN, owner_BN=None)


def _rows(value: Tensor, index_Bn: Tensor) -> Tensor:
    return value.gather(1, index_Bn) if value.dim() == 2 else take(value, index_Bn)
