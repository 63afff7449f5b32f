"""Base of routers that change what another router sees."""

from __future__ import annotations

from torch import Tensor

from cogvla.routing.router import RouterSizes, TokenRouter

OF_BASE = ("needs", "selects", "scores", "hides", "stage", "stages", "projects", "guide_layer", "remembers", "gated")


class WrappingRouter(TokenRouter):
    """A router around another one: what it does not change is that of the base.

    Args:
        sizes: see `RouterSizes`.
        base: the other router.
    """

    def __init__(self, sizes: RouterSizes, base: TokenRouter) -> None:
        super().__init__(sizes)
        self.base = base
        for name in OF_BASE:
            setattr(self, name, getattr(base, name))

    def leaves(self, budget: int) -> int:
        return self.base.leaves(budget)

    def shape(self, budget: int) -> tuple[int, int] | None:
        return self.base.shape(budget)

    def attention_blocks(self, depth: int) -> range:
        return self.base.attention_blocks(depth)

    def watched_layer(self, depth: int) -> int:
        return self.base.watched_layer(depth)

    def prunes(self, motion_BOC: Tensor, age_B: Tensor, run_B: Tensor) -> Tensor:
        return self.base.prunes(motion_BOC, age_B, run_B)
