"""The layer plan: how many vision tokens each layer of the language model gets, computes and hands on.

The decoder, the inference engine and the FLOP counter all read it, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cogvla.routing.keep_schedule import keep_count


@dataclass(frozen=True)
class LayerTokens:
    """The vision tokens of one layer.

    Attributes:
        arrive: tokens in the sequence that comes from the layer before.
        enter: those that are left after a token router has removed others before the layer.
        process: tokens that the layer computes; the others skip it.
        leave: tokens in the sequence after the layer.
    """

    arrive: int
    enter: int
    process: int
    leave: int


def plan_layers(
    vision: int,
    ratios: Sequence[float | None],
    drop: bool,
    routed: Mapping[int, int] | None = None,
    bypass: bool = False,
) -> tuple[LayerTokens, ...]:
    """Return the tokens of each layer.

    Args:
        vision: N, vision tokens that enter the language model; LFP's ratios are shares of them.
        ratios: keep ratio of LFP at each layer; None where it does not route.
        drop: LFP removes the other tokens for good; False: they skip the layer.
        routed: layer -> tokens that a token router leaves there, or all that arrive if they are fewer.
        bypass: other tokens skip a token router's layer; False: they are removed before it.
    """
    plan, now = [], vision
    for index, ratio in enumerate(ratios):
        left = min((routed or {}).get(index, now), now)
        enter, process = now if bypass else left, left
        if ratio is not None:
            process = min(keep_count(vision, ratio), enter)
        leave = process if drop and ratio is not None else enter
        plan.append(LayerTokens(now, enter, process, leave))
        now = leave
    return tuple(plan)
