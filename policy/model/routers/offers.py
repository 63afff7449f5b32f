"""Match token routers with the items that a policy can give them at each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogvla.policy.model.routers.attention_probe import FROM_VISION
from cogvla.policy.model.routers.layer_router import FROM_LANGUAGE
from cogvla.policy.model.routers.memory import ATTENTION, FROM_MEMORY
from cogvla.routing.registry import build_router, registered_routers
from cogvla.routing.router import OF_TOKENS, RouterSizes, TokenRouter


def items_offered(stage: str, *, patches: bool, joint: bool, grid: bool, scored: bool, made: bool) -> frozenset[str]:
    """Return the items of `RouterContext` that a policy offers to a router.

    Args:
        stage: where the router works.
        patches: the tokens are patches, not aggregation tokens.
        joint: one row holds the tokens of all views.
        grid: a row is a grid of patches.
        scored: a router before the language model scores the tokens.
        made: an earlier router makes new tokens.
    """
    if stage == "encoder_block":
        return frozenset({"grid"})
    if stage == "llm_layer":
        remembered = FROM_MEMORY - {"history_BOND", "past_pixels_BO3HW"} - (set() if patches else {"alike_BON"})
        remembered -= OF_TOKENS if made else set()
        return FROM_LANGUAGE - (set() if scored else {"score_BN"}) | remembered
    offered = {"age_B", "motion_BOC", "history_BOND", *ATTENTION, "draw_B", "text_BTE"}
    offered.add("projector" if stage == "encoder_out" else "encoder_BNF")
    if patches:
        offered |= FROM_VISION - ({"attention_BNN"} if joint else set()) | {"alike_BON"}
    if grid:
        offered |= {"grid", "pixels_B3HW", "past_pixels_BO3HW"}
    return frozenset(offered)


def build_offered(
    name: str,
    stage: str,
    sizes: RouterSizes,
    options: Mapping[str, Any] | None,
    offered: frozenset[str],
    patches: bool,
    made: bool,
) -> TokenRouter:
    """Build a router that has to work with what is offered.

    Args:
        name: one of `registered_routers()`.
        stage: where it works.
        sizes: sizes of its tokens.
        options: see `build_router`.
        offered: result of `items_offered`.
        patches: see `items_offered`.
        made: see `items_offered`.

    Raises:
        ValueError: it cannot; the message names those that can.
    """
    router = build_router(name, sizes, options)
    if (asked := router.needs & FROM_MEMORY) and not router.remembers:
        raise ValueError(
            f"router {name!r} needs {', '.join(sorted(asked))} and remembers no earlier decisions: set its "
            "attribute `remembers`, or choose a base that reads none"
        )
    if stage not in router.stages:
        raise ValueError(f"router {name!r} works at {', '.join(router.stages)}, not at {stage}: set router.stage")
    if missing := sorted(router.needs - offered):
        hint = "" if patches else " (routing.efa=false would keep the patches)"
        if made and OF_TOKENS & set(missing):
            hint = " (a router before it makes new tokens, of which nothing is remembered: choose one that selects)"
        possible = [other for other in registered_routers() if _works(other, stage, sizes, offered)]
        raise ValueError(
            f"router {name!r} needs {', '.join(missing)}, which this policy does not provide at {stage}{hint}; "
            f"it provides {', '.join(sorted(offered))}; possible routers are {', '.join(possible)}"
        )
    return router


def _works(name: str, stage: str, sizes: RouterSizes, offered: frozenset[str]) -> bool:
    try:
        router = build_router(name, sizes)
    except ValueError:
        return False
    return stage in router.stages and router.needs <= offered
