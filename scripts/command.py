"""The part that all console commands share: their configuration as plain data, and how they end.

Hydra composes the configuration in each command's own file, which `[project.scripts]` of pyproject.toml names.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import hydra
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from cogvla.configs.schema import DATACLASSES, defaults
from cogvla.plugins import import_plugin

MISTAKES: tuple[type[Exception], ...] = (ValueError, OSError, MissingMandatoryValue)
"""Exceptions for mistakes that the user of a command can mend."""


@contextmanager
def mistakes_in_one_line(*others: type[Exception], stopped: str | None = None) -> Iterator[None]:
    """End the command with one line and status 1 on a mistake of its user, with status 130 on Ctrl-C.

    Everything else is a bug, and keeps its traceback.

    Args:
        others: exceptions that are mistakes, beside `MISTAKES`.
        stopped: what is said after Ctrl-C.
    """
    mistakes = (*MISTAKES, *others)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        yield
    except mistakes as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as error:
        if stopped is not None:
            print(f"\n{stopped}", file=sys.stderr)
        raise SystemExit(130) from error


ALSO_WRITTEN = {"record_demonstrations": {"policy": "checkpoint"}}
"""Command -> another name of a key -> the key. Hydra takes no value for a key with the name of a group of configs."""


def renamed(command: str, overrides: Sequence[str]) -> list[str]:
    """Return overrides with the command's own names of keys."""
    names = ALSO_WRITTEN.get(command, {})
    split = [override.partition("=") for override in overrides]
    return [names.get(key, key) + equals + value for key, equals, value in split]


@cache
def register() -> None:
    """Let Hydra know the defaults of all dataclasses, so that the files of configs can build on them."""
    for group, dataclasses in DATACLASSES.items():
        for dotted in dataclasses:
            ConfigStore.instance().store(dotted.rpartition(".")[2], defaults(dotted), group or None)


def check_overrides(words: Sequence[str]) -> None:
    """Check that no word of a command line is a list of files of one group: Hydra would merge them into one.

    Raises:
        ValueError: one is.
    """
    for word in words:
        group, equals, value = word.lstrip("+").partition("=")
        if not (equals and group in DATACLASSES and group and value.lstrip().startswith("[")):
            continue
        how = f"give one file, and change its keys with {group}.KEY=VALUE"
        if group == "data":
            how = "mix data sets with 'data.mixture=[{root: A}, {root: B, weight: 2}]', suites with suite=[A,B]"
        raise ValueError(f"{word}: Hydra would merge the files of a list into one; {how}")


def compose(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration of a command with some values changed, as on its command line."""
    register()
    check_overrides(overrides)
    with initialize_config_module("cogvla.configs", version_base="1.3"):
        return hydra.compose(command, renamed(command, overrides))


def plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, or a group of it, as plain values; MissingMandatoryValue where one is ???."""
    if isinstance(config, DictConfig):
        config = cast(Any, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    return {str(key): value for key, value in config.items()}


def import_modules(modules: Sequence[str]) -> None:
    """Import the modules of the key `imports`, which register suites or routers; ValueError names one that fails."""
    for module in modules:
        import_plugin(module, "imports")


def as_typed(command: str) -> str:
    """Return the command line of the running Hydra command, for reports."""
    words = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # `${suite}` as it was typed
    return shlex.join([command, *map(str, cast(Any, words))])


def stop_event() -> threading.Event:
    """Set by SIGINT and SIGTERM from now on; by nothing outside of the main thread, where there are no signals."""
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
    return stop
