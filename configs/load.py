"""Files of `configs/`, without Hydra: for what runs where Hydra is not, or gets its parameters from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from cogvla.configs.schema import DATACLASSES
from cogvla.files import KeyTwiceError, unique


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as a number, as Hydra does; YAML 1.1 says that it is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def names(group: str) -> list[str]:
    """Return the names of the files in `configs/GROUP`."""
    folder = resources.files("cogvla.configs") / group
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load(group: str, name: str) -> dict[str, Any]:
    """Return the values of `configs/GROUP/NAME.yaml`, or of the file `name` if it ends in .yaml.

    Values of files that it builds on (`defaults:`) are included, those that are the dataclass's own are not.

    Raises:
        ValueError: there is no such name (the text lists them); the file cannot be read, has a key twice or no mapping.
    """
    if not isinstance(name, str):
        raise ValueError(f"a default of {group} must be a name, got {name!r}")
    if name.endswith((".yaml", ".yml")):
        try:
            values = read_once(Path(name), f"{group} {name!r}")
        except OSError as error:
            raise ValueError(f"{group} {name!r} cannot be read: {error.strerror or error}") from None
    elif name in names(group):
        values = yaml.load((resources.files("cogvla.configs") / group / f"{name}.yaml").read_text(), _Loader)
    else:
        raise ValueError(f"{group} {name!r} is neither a YAML file nor one of {', '.join(names(group))}")
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{group} {name!r} holds no mapping")
    dataclasses = {dotted.rpartition(".")[2] for dotted in DATACLASSES.get(group, ())}
    found: dict[str, Any] = {}
    for default in values.pop("defaults", []):
        if default != "_self_" and str(default).partition("@")[0] not in dataclasses:
            found = _merged(found, load(group, default))
    return _merged(found, values)


def read_once(path: Path, where: str) -> Any:
    """Return the content of a YAML or JSON file, in which no mapping has a key twice.

    Args:
        path: the file; one that ends in .json is read as JSON.
        where: name of the file for messages.

    Raises:
        ValueError: it is not of this format, or has a key twice.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=unique)
        return yaml.load(text, _OnceLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = "" if mark is None else f" at line {mark.line + 1}"
        raise ValueError(f"{where} is no YAML{at}: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON at line {error.lineno}: {error.msg}") from error
    except KeyTwiceError as error:
        raise ValueError(f"{where} has {error}") from error


class _OnceLoader(_Loader):
    """Refuses mappings that have a key twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        unique([(str(key.value), value) for key, value in node.value])
        return super().construct_mapping(node, deep)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, as Hydra does; other values of `over` replace those of `under`."""
    nested = {key: _merged(under[key], over[key]) for key in under.keys() & over.keys() if _both(under[key], over[key])}
    return {**under, **over, **nested}


def _both(one: Any, other: Any) -> bool:
    return isinstance(one, Mapping) and isinstance(other, Mapping)
