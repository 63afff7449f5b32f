"""Refuse keys of `routing.router` that change nothing where the router stands."""

from __future__ import annotations

from cogvla.routing.router import RouterConfig


def check_keys(config: RouterConfig, stage: str) -> None:
    """Check the keys of a router that stands at `stage`, one of `routing.router.STAGES`.

    Raises:
        ValueError: a key is missing there, or would change nothing.
    """
    if stage == "llm_layer":
        _check_without_first(config)
    if config.block is not None and stage != "encoder_block":
        raise ValueError(f"router.block is for router.stage=encoder_block, not {stage}: leave it out")
    if len(set(config.layers)) != len(config.layers):
        raise ValueError(f"router.layers names a layer twice, {list(config.layers)}: name each once")
    if not config.layers and (config.layer_router or config.mode == "bypass"):
        idle = f"layer_router={config.layer_router}" if config.layer_router else "mode=bypass"
        raise ValueError(f"router.{idle} changes nothing without router.layers: give them, or leave it out")


def _check_without_first(config: RouterConfig) -> None:
    """Check the keys of a router at language layers only, with none before the language model."""
    if not config.layers:
        raise ValueError(
            f"router {config.name!r} works at language layers: give router.layers, for example router.layers=[1], or "
            "another router.stage"
        )
    if config.train_budgets:
        raise ValueError(
            "router.train_budgets are budgets before the language model, where router.stage=llm_layer keeps all "
            "tokens: set train_budgets=[], or another router.stage with router.layer_router"
        )
    if config.joint:
        raise ValueError(
            "router.joint changes nothing with router.stage=llm_layer, where all views are together: leave it out"
        )
    if config.position == "v2pe" or (config.position == "compact" and config.mode == "bypass"):
        raise ValueError(
            f"router.position={config.position} changes nothing with router.stage=llm_layer and "
            f"router.mode={config.mode}: set router.position=keep"
        )
