"""Reduce the patches inside of the vision towers (`router.stage=encoder_block`), so that later blocks compute fewer.

Both towers have a router of their own, and leave tokens at the same places.

Shape legend: X rows (samples times views), S tokens with the prefix, n tokens left, F tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cogvla.routing.router import RoutedTokens, RouterContext, TokenRouter


class TowerReducer:
    """Reduce the patches of one forward pass.

    Args:
        routers: router of each tower.
        block: block before which they are called.
        prefixes: number of tokens before the patches, of each tower.
        context: context of the routers.
        timer: context manager that times their work.

    Attributes:
        routed: result of the first tower's router; None before the towers ran.
        losses: losses of all routers.
    """

    def __init__(
        self,
        routers: Sequence[TokenRouter],
        block: int,
        prefixes: Sequence[int],
        context: RouterContext,
        timer: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.routers, self.block, self.prefixes, self.context = routers, block, prefixes, context
        self.timer = timer or nullcontext()
        self.routed: RoutedTokens | None = None
        self.losses: dict[str, Tensor] = {}

    def __call__(self, tower: int, block: int, x_XSF: Tensor) -> Tensor:
        """Return the input [X,S',F] of a block of a tower, with fewer patches if it is the block of the routers."""
        if block != self.block:
            return x_XSF
        prefix = self.prefixes[tower]
        with self.timer:
            routed: RoutedTokens = self.routers[tower](x_XSF[:, prefix:], self.context)
        self.routed = self.routed or routed
        self.losses |= {f"{name}_tower{tower}": value for name, value in routed.losses.items()}
        return torch.cat((x_XSF[:, :prefix], routed.tokens_BnD), dim=1)
