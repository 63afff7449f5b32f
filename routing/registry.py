"""The token routers by name (`routing.router.name`).

To add one, write a file in `routing/routers`, or a module of your own package, and decorate its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cogvla.plugins import import_plugins
from cogvla.routing.router import RouterSizes, TokenRouter

Kind = TypeVar("Kind", bound=type[TokenRouter])
_ROUTERS: dict[str, type[TokenRouter]] = {}


def register_router(name: str) -> Callable[[Kind], Kind]:
    """Register the decorated class under this name; ValueError if another class has it."""

    def register(kind: Kind) -> Kind:
        if name in _ROUTERS:
            both = " and ".join(f"{each.__module__}.{each.__qualname__}" for each in (_ROUTERS[name], kind))
            raise ValueError(f"two routers have the name {name!r}: {both}")
        _ROUTERS[name] = kind
        return kind

    return register


def registered_routers() -> dict[str, type[TokenRouter]]:
    """Return every registered router by its name, in alphabetical order."""
    import_plugins("cogvla.routers")
    return dict(sorted(_ROUTERS.items()))


def build_router(name: str, sizes: RouterSizes, options: Mapping[str, Any] | None = None) -> TokenRouter:
    """Build the router with this name.

    Args:
        name: one of `registered_routers()`.
        sizes: sizes of the tokens.
        options: keyword arguments of its constructor.

    Raises:
        ValueError: unknown name or option, or sizes that this router does not support.
    """
    known = registered_routers()
    if name not in known:
        raise ValueError(f"unknown router {name!r}; one of {', '.join(known)}")
    if sizes.grid is None and "grid" in known[name].needs:
        gridless = ", ".join(other for other, kind in known.items() if "grid" not in kind.needs)
        raise ValueError(
            f"router {name!r} needs tokens that are patches of a grid, and these are not: set routing.efa=false "
            f"(patches, no aggregation tokens) and router.joint=false (views apart), or use one of {gridless}"
        )
    parameters = inspect.signature(known[name]).parameters
    valid = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options or {}) - set(valid)):
        raise ValueError(
            f"router {name!r} has no option {', '.join(unknown)}; it has {', '.join(valid) if valid else 'none'}"
        )
    for option, value in (options or {}).items():  # Hydra reads `no` as text, which counts as true
        if isinstance(parameters[option].default, bool) and not isinstance(value, bool):
            raise ValueError(f"option {option} of router {name!r} must be true or false, got {value!r}")
    return known[name](sizes, **(options or {}))
