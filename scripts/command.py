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
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import resources
from typing import Any, cast

import hydra
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from cogvla.configs.build import check_kind
from cogvla.configs.schema import DATACLASSES, defaults
from cogvla.plugins import import_plugin
from cogvla.processes import WorkersDiedError

MISTAKES: tuple[type[Exception], ...] = (ValueError, OSError, MissingMandatoryValue, WorkersDiedError)
"""Exceptions for what the user of a command can mend."""


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


TEXT = {"output", "record", "folder", "monitor", "certificate", "instruction", "repo_id", "license"}
"""Keys that are text although they are null in the files of commands."""
ONE = {"imports", "tasks"}
"""Lists that take a single entry, too."""


def check_kinds(command: str, config: DictConfig) -> None:
    """Check that keys are of the kind that they have in the file of a command.

    All but truth values and the output's folder may be null, and text may be a list. Hydra reads the folder 2024 as a
    number. Keys of groups are checked where they are built.

    Raises:
        ValueError: one is not.
    """

    def check(default: Any, value: Any, key: str) -> None:
        if key and key in DATACLASSES:  # "" is the whole configuration
            return
        if (isinstance(default, str) or key in TEXT) and isinstance(value, bool | int | float):
            raise ValueError(f"""{key} must be text, got {value!r}: put it in quotes twice, '{key}="{value}"'""")
        if isinstance(default, list) and isinstance(value, str | float | bool) and key not in ONE:
            raise ValueError(f"{key} must be a list, got {value!r}: write {key}=[{value}]")
        if key == "output" and isinstance(default, str) and value is None:
            raise ValueError("output must be a folder or file, got null")
        number = isinstance(default, int | float) and value is not None and "${" not in str(value)
        if isinstance(default, bool) or number:
            check_kind(type(default), value, key)
        if key.rpartition(".")[2] == "seed" and type(default) is int and value is None:
            raise ValueError(f"{key} must be a whole number, got null")
        if key.rpartition(".")[2] == "seed" and isinstance(value, int) and value < 0:
            raise ValueError(f"{key} must not be negative, got {value}")
        if isinstance(default, dict) and value is not None:
            check_kind(Mapping[str, Any], value, key or command)
            for name in default.keys() & value.keys():
                check(default[name], value[name], f"{key}.{name}" if key else str(name))

    check(usual(command), OmegaConf.to_container(config), "")


def check_counts(values: Mapping[str, Any], *names: str) -> None:
    """Check that the values of these keys are whole numbers of at least 1; ValueError if one is not."""
    for name in names:
        if type(values[name]) is not int or values[name] < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, got {values[name]}")


def usual(command: str) -> dict[str, Any]:
    """Return the values in the file of a command, without those of groups."""
    with resources.as_file(resources.files("cogvla.configs") / f"{command}.yaml") as file:
        return cast(Any, OmegaConf.to_container(OmegaConf.load(file)))


def compose(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration of a command with some values changed, as on its command line.

    In a running command, its `--config-dir` holds for the other one, too.
    """
    register()
    check_overrides(overrides)
    running = GlobalHydra.instance().is_initialized()
    with nullcontext() if running else initialize_config_module("cogvla.configs", version_base="1.3"):
        config = hydra.compose(command, renamed(command, overrides))
    check_kinds(command, config)
    return config


def config_dir() -> list[str]:
    """Return the words that give the `--config-dir` of the running command to another one; none without it."""
    loader = GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else None
    given = [] if loader is None else [each for each in loader.get_sources() if each.provider == "command-line"]
    return [word for each in given for word in ("--config-dir", each.path)]


def plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, or a group of it, as plain values; MissingMandatoryValue where one is ???."""
    if isinstance(config, DictConfig):
        config = cast(Any, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    return {str(key): value for key, value in config.items()}


def import_modules(modules: str | Sequence[str]) -> None:
    """Import the modules of the key `imports`, which register suites or routers; ValueError names one that fails."""
    for module in [modules] if isinstance(modules, str) else modules:
        import_plugin(str(module), "imports")


def as_typed(command: str) -> str:
    """Return the command line of the running Hydra command, for reports, which others read: without `api_key`."""
    words = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # `${suite}` as it was typed
    told = [word for word in map(str, cast(Any, words)) if word.lstrip("+").partition("=")[0] != "api_key"]
    return shlex.join([command, *told])


def stop_event() -> threading.Event:
    """Set by SIGINT, SIGTERM and SIGHUP from now on; by nothing outside of the main thread: it has no signals."""
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *ending_signals()):
            signal.signal(number, lambda *_: stop.set())
    return stop


def end_on_sigterm() -> None:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, so that robot and processes are left in order."""
    for number in ending_signals():
        signal.signal(number, signal.default_int_handler)


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a command besides Ctrl-C: also that of a lost terminal, unless `nohup` ignores it."""
    return [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else [])]
