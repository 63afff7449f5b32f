"""The token routers by name (`routing.router.name`).

To add one, write a file in `routing/routers`, or a module of your own package, and decorate its class.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
        ValueError: unknown name or option, a value of another kind than its option, or sizes that this router does not
            support.
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
    if unknown := sorted(map(str, set(options or {}) - set(valid))):
        raise ValueError(
            f"router {name!r} has no option {', '.join(unknown)}; it has {', '.join(valid) if valid else 'none'}"
        )
    hints = _hints(known[name])
    for option, value in (options or {}).items():
        if not _fits(value, hint := hints.get(option, Any)):
            raise ValueError(f"option {option} of router {name!r} must be {_words(hint)}, got {value!r}")
    return known[name](sizes, **(options or {}))


def _hints(kind: type[TokenRouter]) -> dict[str, Any]:
    """Return the type hints of a router's options; none if they name what is imported for type checkers only."""
    try:
        return get_type_hints(kind.__init__)
    except NameError:
        return {}


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
    Mapping: "names and values",
    list: "a list",
    tuple: "a list",
}
"""Kinds of options that are checked, and what an error calls them."""


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of the kind that a type hint says; True for kinds that are not checked."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if isinstance(value, bool) and kind in KINDS:
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) < math.inf
    if kind in (list, tuple):  # YAML has lists only
        return isinstance(value, list | tuple)
    return kind not in KINDS or isinstance(value, kind)


def _words(hint: Any) -> str:
    """Return what a value must be, for an error."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(_words(each) for each in get_args(hint))
    if kind is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return KINDS[kind]
