"""Import the modules that register suites and routers: those of this package, and those of other installed packages.

Another package names its modules as entry points of a group. A command also imports those of its key `imports`
(`scripts/command.py`). This file imports nothing of ours by itself, so that `routing` and `envs` can use it.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points

OURS = {"cogvla.suites": ("cogvla.envs", "cogvla.libero.suites"), "cogvla.routers": ("cogvla.routing.routers",)}
"""Modules of this package by group. They are no entry points, since the package also runs without being installed."""


@cache
def import_plugins(group: str) -> None:
    """Import all modules of a group, once.

    Args:
        group: one of `OURS`.

    Raises:
        ValueError: a module of an installed package cannot be imported; the message names both.
    """
    for module in OURS[group]:
        importlib.import_module(module)
    for entry in sorted(entry_points(group=group)):
        package = "?" if entry.dist is None else entry.dist.name
        import_plugin(entry.value, f"the installed package {package} (entry point {entry.name} of {group})")


def import_plugin(module: str, named_by: str) -> None:
    """Import a module; ValueError, which begins with who named it, if that fails."""
    try:
        importlib.import_module(module)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{named_by}: cannot import {module}: {type(error).__name__}: {text}") from error
