"""Build dataclasses from plain data, as YAML and JSON give it."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar

T = TypeVar("T")


def build(kind: type[T], values: Any, path: str) -> T:
    """Return the dataclass of a mapping, with the dataclasses in it; lists become tuples.

    Args:
        kind: a dataclass.
        values: its fields by name.
        path: what messages call it, such as `training`.

    Raises:
        ValueError: unknown or missing keys (the message lists the valid ones), or values that make no sense.
    """
    valid = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must be a mapping of {', '.join(valid)}; got {values!r}")
    if unknown := sorted(str(key) for key in values if key not in valid):
        raise ValueError(f"unknown key {', '.join(unknown)} in {path}; valid keys are {', '.join(valid)}")
    hints = typing.get_type_hints(kind)
    try:
        return kind(**{name: _value(hints[name], value, f"{path}.{name}") for name, value in values.items()})
    except TypeError as error:  # a key is missing, or there is a text where a number should be
        raise ValueError(f"{path}: {error}; valid keys are {', '.join(valid)}") from error


def take(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the dataclass whose fields are some of the keys of a command's configuration."""
    return build(kind, {field.name: values[field.name] for field in fields(kind)}, "configuration")  # type: ignore[arg-type]


def _value(hint: Any, value: Any, path: str) -> Any:
    """Convert a field's value: a mapping to the dataclass of its annotation (`A` or `A | None`), a list to a tuple."""
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    parts = [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
    if parts and not isinstance(value, (*parts, *(NoneType for kind in kinds if kind is NoneType))):
        return build(parts[0], value, path)
    return tuple(value) if isinstance(value, list) else value
