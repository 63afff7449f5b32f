"""Refuse keys of `routing.router` that change nothing where the router stands."""

from __future__ import annotations

from collections.abc import Collection

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


def check_unread(config: RouterConfig, draws: bool, remembered: Collection[str]) -> None:
    """Check that the routers read what keys are about.

    Args:
        config: configuration of the routers.
        draws: True if one of them draws random numbers.
        remembered: names of what they remember, see `policy.model.routers.memory`.

    Raises:
        ValueError: a key would change nothing.
    """
    unread = {
        "resample": (not draws, "draws no random numbers"),
        "seed": (not draws, "draws no random numbers"),
        "decision_steps": (not remembered, "remembers no earlier decisions"),
        "hand": ("state" not in remembered, "does not read the motion of the hand"),
        "position_step": (config.position != "v2pe", "has no router.position=v2pe"),
    }
    for key, (idle, why) in unread.items():
        if idle and (value := getattr(config, key)) != getattr(RouterConfig, key):
            raise ValueError(
                f"router.{key}={value} changes nothing with router {config.name!r}, which {why}: leave it out"
            )


def _check_without_first(config: RouterConfig) -> None:
    """Check the keys of a router at language layers only, with none before the language model."""
    if not config.layers:
        raise ValueError(
            f"router {config.name!r} works at language layers: give router.layers, for example router.layers=[1], or "
            "another router.stage"
        )
    if config.layer_router is not None:
        raise ValueError(
            f"router.layer_router={config.layer_router} works at all router.layers, so that nothing is left to "
            f"router.name={config.name} with router.stage=llm_layer: give its name as router.name, and no layer_router"
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
