"""Build dataclasses from plain data, as YAML and JSON give it."""

from __future__ import annotations

import numbers
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from os import PathLike
from types import NoneType, UnionType
from typing import Any, TypeVar

T = TypeVar("T")

NUMBERS = {int: numbers.Integral, float: numbers.Real}


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
    given = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in given if name not in values]:
        raise ValueError(f"{path}: {', '.join(missing)} missing; valid keys are {', '.join(valid)}")
    hints = typing.get_type_hints(kind)
    taken = {name: _value(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    wrong = [name for name, value in values.items() if not _fits(hints[name], value)]
    try:
        built = kind(**taken)
    except (TypeError, AttributeError):  # without a wrong value it is a bug of the class
        if not wrong:
            raise
    for name in wrong:  # said last, because what a class says about its values is clearer
        check_kind(hints[name], values[name], f"{path}.{name}")
    return built


def take(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the dataclass whose fields are some of the keys of a command's configuration."""
    return build(kind, {field.name: values[field.name] for field in fields(kind)}, "configuration")  # type: ignore[arg-type]


def check_kind(hint: Any, value: Any, path: str) -> None:
    """Check that a value is what an annotation says, such as `int` or `float | None`.

    Text is no truth value: Hydra reads `no` and a misspelt `flase` as text, which Python takes for true. And a size of
    2.5 would fail far from here, or not at all.

    Raises:
        ValueError: it is not.
    """
    if not _fits(hint, value):
        raise ValueError(f"{path} must be {_said(hint)}, got {value!r}")


def _value(hint: Any, value: Any, path: str) -> Any:
    """Convert a value: mappings to the dataclasses of its annotation (`A`, `tuple[A, ...]`), a list to a tuple."""
    parts: list[Any] = [kind for kind in _kinds(hint) if is_dataclass(kind)]
    if parts and value is not None and not isinstance(value, tuple(parts)):
        return build(parts[0], value, path)
    entry = next((typing.get_args(kind)[0] for kind in _kinds(hint) if typing.get_origin(kind) is tuple), Any)
    if is_dataclass(entry) and isinstance(value, Mapping):
        return (_value(entry, value, path),)
    if not isinstance(value, list):
        return value
    return tuple(_value(entry, each, f"{path}[{number}]") for number, each in enumerate(value))


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)


def _fits(hint: Any, value: Any) -> bool:
    return any(_is(kind, value) for kind in _kinds(hint))


def _is(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if kind is NoneType or value is None:
        return kind is NoneType and value is None
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind])
    if typing.get_origin(kind) is tuple:
        entry, *others = typing.get_args(kind)
        if is_dataclass(entry) and isinstance(value, Mapping):  # a list of one
            return True
        if not isinstance(value, list | tuple) or (Ellipsis not in others and len(value) != 1 + len(others)):
            return False
        return all(_fits(entry, each) for each in value)
    if typing.get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(_fits(typing.get_args(kind)[1], each) for each in value.values())
    if is_dataclass(kind):
        return isinstance(value, Mapping | kind)  # type: ignore[operator]
    return kind is not str or isinstance(value, str | PathLike)


def _said(hint: Any) -> str:
    """Return an annotation in words."""
    words = {NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    said = []
    for kind in _kinds(hint):
        if typing.get_origin(kind) is tuple:
            entries = ["..." if entry is Ellipsis else _said(entry) for entry in typing.get_args(kind)]
            said.append(f"a list [{', '.join(entries)}]")
        elif typing.get_origin(kind) is typing.Literal:
            said.append(f"one of {', '.join(map(str, typing.get_args(kind)))}")
        elif typing.get_origin(kind) is Mapping and (entry := typing.get_args(kind)[1]) is not Any:
            said.append(f"a mapping to {_said(entry)}")
        else:
            said.append(words.get(kind, "a mapping"))
    return " or ".join(said)
