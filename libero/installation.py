"""Read the installed LIBERO (extra `libero`): task names, initial states, BDDL files and assets.

What is unusual here, and why:

- LIBERO asks a question on the terminal when its configuration file is missing. We write that file before the import,
  into the folder of LIBERO_CONFIG_PATH, or else into `~/.cache/cogvla/libero`. We do not read or write `~/.libero`.
- This module does not import torch, so that environment processes stay small.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import pickle
import runpy
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogvla.files import write_atomic

ASSETS_VARIABLE = "COGVLA_LIBERO_ASSETS"
CONFIG_VARIABLE = "LIBERO_CONFIG_PATH"
INSTALL = "LIBERO is not installed: `uv sync --extra libero`, or `pip install 'cogvla[libero]'`"

Predicate = tuple[str, ...]
"""A predicate of a BDDL file and its arguments, for example ("in", "milk_1", "basket_1_contain_region")."""


@dataclass(frozen=True)
class Problem:
    """One task as its BDDL file describes it.

    Attributes:
        file: the BDDL file.
        kind: name of LIBERO's class for the scene, e.g. `libero_floor_manipulation`.
        objects, fixtures: category -> names.
        things: every name that a goal may use: objects, fixtures and their regions.
        start: predicates that hold at the beginning.
        goal: predicates that must hold for success.
        scene: key of the scene. Problems that differ only in their goal have the same key and share a compiled model.
    """

    file: Path
    kind: str
    objects: Mapping[str, tuple[str, ...]]
    fixtures: Mapping[str, tuple[str, ...]]
    things: frozenset[str]
    start: frozenset[Predicate]
    goal: tuple[Predicate, ...]
    scene: str


def package_folder() -> Path:
    """Return the folder of the installed LIBERO.

    Raises:
        ValueError: LIBERO or robosuite is not installed.
    """
    try:
        spec = importlib.util.find_spec("libero.libero")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or importlib.util.find_spec("robosuite") is None:
        raise ValueError(INSTALL)
    return Path(spec.origin).parent


def versions() -> dict[str, str]:
    """Return the versions of the simulators. Success rates change with them."""
    return {name: importlib.metadata.version(name) for name in ("mujoco", "robosuite", "hf-libero")}


def task_names(suite: str) -> tuple[str, ...]:
    """Return the names of a suite's tasks in the order of their indices. A name is also the stem of a task's files."""
    table = runpy.run_path(str(package_folder() / "benchmark" / "libero_suite_task_map.py"))["libero_task_map"]
    return tuple(table[suite])


def initial_states(suite: str, name: str) -> np.ndarray:
    """Read the fixed initial states of a task, float64 [50, time + positions + velocities]."""
    path = package_folder() / "init_files" / suite / f"{name}.pruned_init"
    with zipfile.ZipFile(path) as archive:  # torch.save wrote the file, but it holds one numpy array
        member = next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
        states = _ArrayUnpickler(io.BytesIO(archive.read(member))).load()
    return np.asarray(states, np.float64)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode") or module.partition(".")[0] == "numpy":
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"an initial state file wants to call {module}.{name}")


def assets_folder(wanted: str | None = None) -> Path:
    """Return the folder with LIBERO's meshes and textures; download it if necessary.

    Args:
        wanted: the folder. None: the folder in environment variable COGVLA_LIBERO_ASSETS, or else hf-libero's download
            from the hub.

    Raises:
        ValueError: the folder has no assets, or the download failed.
    """
    given = wanted or os.environ.get(ASSETS_VARIABLE)
    if given:
        folder = Path(given).expanduser().resolve()
        if not (folder / "scenes").is_dir():
            raise ValueError(f"{folder} has no LIBERO assets (no folder `scenes`): set libero.assets to another folder")
        return folder
    libero_module()
    from libero.libero.utils.download_utils import download_assets_from_huggingface

    try:
        with redirect_stdout(io.StringIO()):
            return Path(download_assets_from_huggingface())
    except Exception as error:  # the user can do the same two things, whatever the hub's client raises
        raise ValueError(
            f"could not download LIBERO's meshes and textures from the hub ({error}). Run once with a connection, "
            f"or name a folder that has them: libero.assets=FOLDER, or {ASSETS_VARIABLE}=FOLDER"
        ) from error


@functools.cache
def libero_module() -> Any:
    """Import and return the module `libero.libero`, without its question on the terminal."""
    folder = package_folder()
    home = os.environ.get(CONFIG_VARIABLE)
    config = (Path(home) if home else _cache() / "cogvla" / "libero") / "config.yaml"
    if not (home and config.exists()):
        config.parent.mkdir(parents=True, exist_ok=True)
        paths = {"benchmark_root": "", "bddl_files": "bddl_files", "init_states": "init_files", "datasets": "datasets"}
        values = {key: str(folder / path) for key, path in paths.items()} | {"assets": str(folder / "assets")}
        write_atomic(config, json.dumps(values))  # JSON is YAML
    os.environ[CONFIG_VARIABLE] = str(config.parent)
    # robosuite warns three times in every process that it has no file of private settings. Nobody needs that file.
    logging.getLogger("robosuite_logs").addFilter(lambda record: "macro" not in record.getMessage())
    return importlib.import_module("libero.libero")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@functools.cache
def problem(suite: str, name: str) -> Problem:
    """Parse the BDDL file of a task."""
    folder = package_folder()
    libero_module()
    from libero.libero.envs import bddl_utils

    file = folder / "bddl_files" / suite / f"{name}.bddl"
    parsed = bddl_utils.robosuite_parse_problem(str(file))
    objects, fixtures = ({k: tuple(v) for k, v in parsed[kind].items()} for kind in ("objects", "fixtures"))
    names = {name for group in (*objects.values(), *fixtures.values()) for name in group}
    start = frozenset(tuple(predicate) for predicate in parsed["initial_state"])
    same = (parsed["problem_name"], objects, fixtures, parsed["regions"], sorted(start))
    return Problem(
        file=file,
        kind=parsed["problem_name"],
        objects=objects,
        fixtures=fixtures,
        things=frozenset(names | set(parsed["regions"])),
        start=start,
        goal=tuple(tuple(predicate) for predicate in parsed["goal_state"]),
        scene=json.dumps(same, sort_keys=True, default=str),
    )


def goal_in_scene(scene: Problem, other: Problem) -> tuple[Predicate, ...] | None:
    """Return the goal of another task in this scene, or None if that task is not possible here.

    Some tasks have the same goal and differ only in where their object stands ("the bowl on the stove"). Such a task is
    possible if this scene has a second object of that kind at that place. The goal then names the second object.
    """
    if not {name for predicate in other.goal for name in predicate[1:]} <= scene.things:
        return None
    if other.goal != scene.goal:
        return other.goal
    for twins in scene.objects.values():
        for mine in twins:
            for twin in twins:
                places = {p for p in other.start if p[1] == mine}
                names = {name for predicate in other.goal for name in predicate[1:]}
                if mine == twin or mine not in names or not places:
                    continue
                if _renamed(places, mine, twin) <= scene.start and twin not in names:
                    return tuple(sorted(_renamed(other.goal, mine, twin)))
    return None


def _renamed(predicates: Iterable[Predicate], old: str, new: str) -> set[Predicate]:
    return {tuple(new if name == old else name for name in predicate) for predicate in predicates}
