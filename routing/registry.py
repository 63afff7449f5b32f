"""The token routers by name (`routing.router.name`). To add one, write a file in `routing/routers` and a line here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from cogvla.routing.router import RouterSizes, TokenRouter
from cogvla.routing.routers.adaptive_erank import AdaptiveErank
from cogvla.routing.routers.approx_error import ApproxError
from cogvla.routing.routers.attention_growth import AttentionGrowth
from cogvla.routing.routers.carried import Carried
from cogvla.routing.routers.causal_queries import CausalQueries
from cogvla.routing.routers.cls_attention import ClsAttention
from cogvla.routing.routers.core_neurons import CoreNeurons
from cogvla.routing.routers.coverage import Coverage
from cogvla.routing.routers.debias import Debias
from cogvla.routing.routers.diversity import Diversity
from cogvla.routing.routers.facility_location import FacilityLocation
from cogvla.routing.routers.film_aggregation import FiLMAggregation
from cogvla.routing.routers.film_pruning import FiLMPruning
from cogvla.routing.routers.flex_count import FlexCount
from cogvla.routing.routers.frequency import Frequency
from cogvla.routing.routers.global_attention import GlobalAttention
from cogvla.routing.routers.grid_stride import GridStride
from cogvla.routing.routers.identity import Identity
from cogvla.routing.routers.late_exit import LateExit
from cogvla.routing.routers.learned_pruner import LearnedPruner
from cogvla.routing.routers.progressive_video import ProgressiveVideo
from cogvla.routing.routers.random import Random
from cogvla.routing.routers.selector_merger import SelectorMerger
from cogvla.routing.routers.semantic_tokens import SemanticTokens
from cogvla.routing.routers.slot_attention import SlotAttention
from cogvla.routing.routers.spatial_pool import SpatialPool
from cogvla.routing.routers.text_guided import TextGuided
from cogvla.routing.routers.token_norm import TokenNorm
from cogvla.routing.routers.visual_attention_merge import VisualAttentionMerge
from cogvla.routing.routers.zeroth_order import ZerothOrder

ROUTERS: dict[str, type[TokenRouter]] = {
    "identity": Identity,
    "random": Random,
    "grid_stride": GridStride,
    "spatial_pool": SpatialPool,
    "token_norm": TokenNorm,
    "cls_attention": ClsAttention,
    "text_guided": TextGuided,
    "visual_attention_merge": VisualAttentionMerge,
    "diversity": Diversity,
    "coverage": Coverage,
    "adaptive_erank": AdaptiveErank,
    "approx_error": ApproxError,
    "frequency": Frequency,
    "zeroth_order": ZerothOrder,
    "debias": Debias,
    "film_aggregation": FiLMAggregation,
    "film_pruning": FiLMPruning,
    "semantic_tokens": SemanticTokens,
    "learned_pruner": LearnedPruner,
    "global_attention": GlobalAttention,
    "carried": Carried,
    "late_exit": LateExit,
    "flex_count": FlexCount,
    "facility_location": FacilityLocation,
    "attention_growth": AttentionGrowth,
    "core_neurons": CoreNeurons,
    "progressive_video": ProgressiveVideo,
    "causal_queries": CausalQueries,
    "slot_attention": SlotAttention,
    "selector_merger": SelectorMerger,
}


def build_router(name: str, sizes: RouterSizes, options: Mapping[str, Any] | None = None) -> TokenRouter:
    """Build the router with this name.

    Args:
        name: one of `ROUTERS`.
        sizes: sizes of the tokens.
        options: keyword arguments of its constructor.

    Raises:
        ValueError: unknown name or option, or sizes that this router does not support.
    """
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; one of {', '.join(sorted(ROUTERS))}")
    if sizes.grid is None and "grid" in ROUTERS[name].needs:
        gridless = ", ".join(sorted(known for known, kind in ROUTERS.items() if "grid" not in kind.needs))
        raise ValueError(
            f"router {name!r} needs tokens that are patches of a grid, and these are not: set routing.efa=false "
            f"(patches, no aggregation tokens) and router.joint=false (views apart), or use one of {gridless}"
        )
    valid = [p.name for p in inspect.signature(ROUTERS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options or {}) - set(valid)):
        raise ValueError(
            f"router {name!r} has no option {', '.join(unknown)}; it has {', '.join(valid) if valid else 'none'}"
        )
    return ROUTERS[name](sizes, **(options or {}))
