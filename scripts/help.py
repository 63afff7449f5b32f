"""Text of `--help`: what a command does, its examples, and its keys with one line each.

It is read from the command's docstring, the comments of its YAML file and the docstrings of the dataclasses, without
importing them: neither torch nor Hydra is loaded.

    eval_libero --help                         the command and its keys
    eval_libero --help protocol engine         the keys of groups, with the values that the command would use
    eval_libero protocol=cogvla --help protocol
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from cogvla.configs.load import names
from cogvla.configs.schema import DATACLASSES, ROOT, attributes, defaults, summary

FLAGS = {"-h", "--help"}
INDENT, VALUE = 34, 60
FOOTER = """\
`--help GROUP` lists the keys of a group and the files to choose from.
Give a value as key=value; a key with ??? must be given. `--cfg job` prints the whole configuration, `-m key=a,b` runs
several, and `--hydra-help` lists what else Hydra can do."""


class Key(NamedTuple):
    """A key of a configuration with its default, as YAML writes it, and its one line of help."""

    name: str
    value: str
    text: str


def command_help(module: str, config: str, words: Sequence[str]) -> str:
    """Return what `--help` prints for a command that Hydra composes.

    Args:
        module: of `cogvla.scripts`, e.g. `measure.count_flops`.
        config: name of its file in configs.
        words: the command line: names of groups, and overrides for them; words that begin with - are passed over.

    Raises:
        ValueError: the command has no such group.
    """
    words = [word for word in words if not word.startswith("-")]
    if any("=" not in word for word in words):
        return keys_of_groups(config, words)
    source = (ROOT / "scripts" / module.replace(".", "/")).with_suffix(".py").read_text()
    docstring = (ast.get_docstring(ast.parse(source), clean=False) or "").strip()
    return f"{docstring}\n\n{keys_help(config)}\n\n{FOOTER}"


def keys_of_groups(config: str, words: Sequence[str]) -> str:
    """Return the keys of groups, with the values that the command would use, and the files to choose from.

    Raises:
        ValueError: the command has no such group.
    """
    overrides = [word for word in words if "=" in word]
    return "\n\n".join(_group_help(config, word, overrides) for word in words if "=" not in word)


def keys_help(config: str) -> str:
    """Return the list of a command's own keys, and the list of its groups."""
    lines = ["Keys:", *_lines(_own_keys(config))]
    groups = _groups(config)
    if groups:
        lines += ["", "Groups of keys:"]
        lines += _lines([key._replace(text=" ".join([key.text, *_one_of(key.name)])) for key in groups])
    return "\n".join(lines)


def argument_parser(name: str, docstring: str | None, config: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of ordinary options whose `--help` begins with the docstring of the command's module.

    Args:
        config: the file of configs whose keys it takes as KEY=VALUE, to list them.
    """
    return argparse.ArgumentParser(
        name,
        description=docstring,
        epilog=keys_help(config) if config else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def comments(text: str) -> dict[str, str]:
    """Return the comment of each key of a YAML text, by its dotted name.

    A comment stands at the end of the key's line, or on the lines directly above it. Elements of the list `defaults`
    that are mappings count as keys of `defaults`.
    """
    lines = text.splitlines()
    top = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    found: dict[str, str] = {}

    def visit(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.SequenceNode) and prefix == "defaults.":
            for element in node.value:
                visit(element, prefix)
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            found[prefix + key.value] = _comment(lines, top, key, value)
            visit(value, f"{prefix}{key.value}.")

    visit(yaml.compose(text), "")
    return found


def _comment(lines: Sequence[str], top: int, key: yaml.Node, value: yaml.Node) -> str:
    line = key.end_mark.line
    end = value.end_mark if value.end_mark.line == line else key.end_mark
    behind = re.match(r"\s*:?\s*#\s*(.*)", lines[line][end.column :])
    if behind:
        return behind[1]
    above = line
    while above > top and lines[above - 1].lstrip().startswith("#"):
        above -= 1
    return " ".join(each.strip(" #") for each in lines[above:line])


def _read(config: str) -> tuple[str, dict[str, Any]]:
    text = (ROOT / "configs" / f"{config}.yaml").read_text()
    return text, yaml.safe_load(text)


def _groups(config: str) -> list[Key]:
    text, values = _read(config)
    said = comments(text)
    pairs = [pair for each in values["defaults"] if isinstance(each, dict) for pair in each.items()]
    return [
        Key(group, _as_yaml(value), said[f"defaults.{group}"] or summary(DATACLASSES[group][0]))
        for group, value in pairs
        if group in DATACLASSES
    ]


def _own_keys(config: str) -> list[Key]:
    text, values = _read(config)
    said = comments(text)
    found: dict[str, Any] = {}
    for dotted in DATACLASSES[""]:
        if dotted.rpartition(".")[2] in values["defaults"]:
            said = {**attributes(dotted), **said}
            found |= dict(_flat(defaults(dotted)))
    groups = {"defaults", *(key.name for key in _groups(config))}
    found |= dict(_flat({name: value for name, value in values.items() if name not in groups}))
    return [Key(name, _as_yaml(value), said.get(name, "")) for name, value in found.items()]


def _group_help(config: str, group: str, overrides: Sequence[str]) -> str:
    known = [key.name for key in _groups(config)]
    if group not in known:
        raise ValueError(f"{config} has no group {group!r}; it has {', '.join(known) or 'none'}")
    from omegaconf import OmegaConf

    from cogvla.scripts.command import compose  # imports Hydra

    choices = [(name, _read(f"{group}/{name}")[0]) for name in (names(group) if _is_folder(group) else ())]
    places = {found[1]: found[2] for _, text in choices for found in re.finditer(r"- (\w+)@(\w+)\n", text)}
    said: dict[str, str] = {}
    for dotted in DATACLASSES[group]:
        place = places.get(dotted.rpartition(".")[2])
        said |= {f"{place}.{name}" if place else name: text for name, text in attributes(dotted).items()}
    values = OmegaConf.to_container(compose(config, overrides)[group])
    lines = [f"Keys of {group}:"]
    lines += _lines([Key(f"{group}.{name}", _as_yaml(value), said.get(name, "")) for name, value in _flat(values)])
    if choices:
        lines += ["", f"Files of {group}:"]
        lines += _lines([Key(group, name, _top_comment(text)) for name, text in choices])
    return "\n".join(lines)


def _one_of(group: str) -> list[str]:
    return [f"[{', '.join(names(group))}]"] if _is_folder(group) else []


def _is_folder(group: str) -> bool:
    return (ROOT / "configs" / group).is_dir()


def _top_comment(text: str) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.strip("# ") for line in lines if "@package" not in line)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value and all(str(key).isidentifier() for key in value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return textwrap.shorten(text.removesuffix("\n").removesuffix("\n...").strip("'"), VALUE, placeholder=" ...")


def _lines(keys: Sequence[Key]) -> list[str]:
    width = max(100, min(shutil.get_terminal_size().columns, 140))
    found = []
    for key in keys:
        start = f"  {key.name}={key.value}"
        if len(start) > INDENT - 2:
            found.append(start)
            start = ""
        text = textwrap.wrap(key.text, width - INDENT) or [""]
        first = f"{start:<{INDENT}}{text[0]}".rstrip()
        found += [first] if first else []
        found += [" " * INDENT + line for line in text[1:]]
    return found
