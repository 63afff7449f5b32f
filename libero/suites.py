"""LIBERO behind the suite interface; `libero/env.py` plays its tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from cogvla.envs.suite import Suite, get_suite, register_suite
from cogvla.libero.env import LiberoEnv, LiberoSettings
from cogvla.libero.installation import assets_folder, versions
from cogvla.libero.tasks import LIBERO_SUITES, MAX_STEPS, tasks

if TYPE_CHECKING:
    from cogvla.libero.experts.expert import LiberoExpert

PROTOCOL = "openvla_oft"
"""The protocol when none is named: the one that most published numbers follow."""
SETTLING_STEPS = 10
"""Initial states hold objects a little above the table; the published protocols wait as long."""


def libero_suite(name: str, settings: LiberoSettings | None = None) -> Suite:
    """One of `LIBERO_SUITES`; ValueError when LIBERO or its assets are missing, with what to do about it."""
    settings = settings or LiberoSettings()
    listed = tasks(name)
    assets = assets_folder(settings.assets)
    values = asdict(settings) | {"assets": str(assets)}
    if settings.robot_meshes is not None:
        values["robot_meshes"] = str(Path(settings.robot_meshes).resolve())
    return Suite(
        name,
        listed,
        MAX_STEPS[name],
        partial(LiberoEnv, name, LiberoSettings(**values)),
        protocol=PROTOCOL,
        settings=_identity(settings, assets),
        expert=libero_expert,
        settling_steps=SETTLING_STEPS,
    )


def configured_suite(name: str, libero: Mapping[str, Any]) -> Suite:
    """A registered suite; those of LIBERO with the settings of a configuration (keys of `LiberoSettings`)."""
    return get_suite(name, {"libero": libero})


def _identity(settings: LiberoSettings, assets: Path) -> dict[str, Any]:
    """What decides an episode apart from the protocol, whatever machine the folders are on."""
    identity: dict[str, Any] = {
        **versions(),
        "assets": _digest(assets),
        "rendering": "lean" if settings.lean else "full",
    }
    if settings.lean:
        identity["reflections"] = settings.reflections
        identity["extra_passes"] = settings.extra_passes
        identity["robot_meshes"] = None if settings.robot_meshes is None else _digest(Path(settings.robot_meshes))
    return identity


@cache
def _digest(folder: Path) -> str:
    """Tells one set of files from another by their names and sizes, without reading them."""
    files = sorted((str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*") if file.is_file())
    files = [file for file in files if not file[0].startswith(".")]  # what a download leaves behind
    return f"{hashlib.sha256(repr(files).encode()).hexdigest()[:12]} ({len(files)} files)"


def libero_expert(env: gym.Env, rng: np.random.Generator, noise: float = 0.0) -> LiberoExpert:
    """The scripted expert for the task that `env` has been reset to."""
    from cogvla.libero.experts.expert import LiberoExpert

    return LiberoExpert(env, rng, noise)


def make_env(suite: str, **options: Any) -> gym.Env:
    """Entry point of the gymnasium ids `cogvla/<suite>-v0`: keys of `LiberoSettings`, `image_size`, `render`."""
    settings = {f.name: options.pop(f.name) for f in fields(LiberoSettings) if f.name in options}
    return LiberoEnv(suite, LiberoSettings(**settings), **options)


def _configured(name: str, **values: Any) -> Suite:
    return libero_suite(name, LiberoSettings(**values))


for _name in LIBERO_SUITES:
    register_suite(_name, partial(_configured, _name), group="libero")
    gym.register(f"cogvla/{_name}-v0", entry_point="cogvla.libero.suites:make_env", kwargs={"suite": _name})
