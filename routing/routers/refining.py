"""Routers that change the tokens before another router chooses among them or pools them.

Shape legend: B rows, N tokens in, n tokens out, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogvla.routing.registry import build_router
from cogvla.routing.router import OF_TOKENS, RoutedTokens, RouterContext, RouterSizes
from cogvla.routing.routers.wrapping import WrappingRouter


class RefiningRouter(WrappingRouter):
    """Run a base router on refined tokens. Every token is then a new one, and `owner_BN` says what it was made of.

    Args:
        sizes: see `RouterSizes`.
        base: name of the base router.
        base_options: its options.
    """

    selects = False

    def __init__(self, sizes: RouterSizes, base: str, base_options: Mapping[str, Any] | None) -> None:
        super().__init__(sizes, build_router(base, sizes, base_options))
        self.needs, self.selects = type(self).needs | self.base.needs, False  # type: ignore[misc]
        self.stages = tuple(stage for stage in type(self).stages if stage in self.base.stages)  # type: ignore[misc]
        if not self.stages:
            wanted, has = ", ".join(type(self).stages), ", ".join(self.base.stages)
            raise ValueError(f"base {base!r} works at {has} only: choose one for {wanted}")
        if asked := sorted(OF_TOKENS & self.needs):
            raise ValueError(
                f"base {base!r} reads {', '.join(asked)}, and nothing is remembered of refined tokens: choose another"
            )
        self.stage = self.base.stage if self.base.stage in self.stages else self.stages[0]  # type: ignore[misc]

    @abstractmethod
    def refine(self, tokens_BND: Tensor, context: RouterContext) -> Tensor:
        """Return the refined tokens [B,N,D]."""

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        routed = self.base.route(self.refine(tokens_BND, context), context)
        index_Bn, owner_BN = routed.index_Bn, routed.owner_BN
        if owner_BN is None and self.base.selects:
            nobody_BN = torch.full(tokens_BND.shape[:2], -1, device=index_Bn.device)
            owner_BN = nobody_BN.scatter(
                1, index_Bn, torch.arange(index_Bn.shape[1], device=index_Bn.device).expand_as(index_Bn)
            )
        return replace(routed, index_Bn=torch.full_like(index_Bn, -1), owner_BN=owner_BN)
