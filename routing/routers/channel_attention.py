"""DaViT's channel attention before another router: channels attend to channels, so that each sees the whole picture.

In groups of c channels, with q, k, v [N,c] of the normalised tokens:

    tokens + W (softmax(k' v / sqrt c) q')'

The softmax runs over channels and its cost is linear in the number of tokens. The paper alternates it with attention in
windows, in a backbone of its own; here it follows the towers.

Our choices: the logits are sums over N tokens and grow with N, so `mean` divides them by N (false: as published); W
starts at 0, so that training starts with the policy without it; there is no MLP after it.

Shape legend: g groups, c and d channels of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from cogvla.routing.registry import register_router
from cogvla.routing.router import RouterContext, RouterSizes
from cogvla.routing.routers.refining import RefiningRouter


@register_router("channel_attention")
class ChannelAttention(RefiningRouter):
    """Let channels attend to channels, then run another router.

    Args:
        sizes: see `RouterSizes`.
        base: name of the other router.
        base_options: options of that router.
        groups: number of groups; must divide the width.
        mean: divide the logits by N.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        *,
        base: str = "identity",
        base_options: Mapping[str, Any] | None = None,
        groups: int = 4,
        mean: bool = True,
    ) -> None:
        super().__init__(sizes, base, base_options)
        if groups < 1 or sizes.width % groups:
            raise ValueError(f"channel_attention cannot cut width {sizes.width} into {groups} groups; choose a divisor")
        self.groups, self.mean = groups, mean
        self.norm, self.qkv = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def refine(self, tokens_BND: Tensor, context: RouterContext) -> Tensor:
        qkv_BND = self.qkv(self.norm(tokens_BND.to(self.out.weight.dtype)))
        q_BgNc, k_BgNc, v_BgNc = rearrange(qkv_BND, "b n (three g c) -> three b g n c", three=3, g=self.groups)
        mixed_BgNc = over_channels(q_BgNc, k_BgNc, v_BgNc, self.mean)
        return tokens_BND + self.out(rearrange(mixed_BgNc, "b g n c -> b n (g c)")).to(tokens_BND.dtype)


def over_channels(q_gNc: Tensor, k_gNc: Tensor, v_gNc: Tensor, mean: bool) -> Tensor:
    """Return the channels [...,N,c] after attention among them."""
    tokens, width = k_gNc.shape[-2:]
    logits_gcd = k_gNc.mT.float() @ v_gNc.float() * width**-0.5 / (tokens if mean else 1)
    return q_gNc @ logits_gcd.softmax(-1).to(q_gNc.dtype).mT
