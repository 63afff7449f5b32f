"""Register LIBERO's suites, with their settings and expert; `libero/env.py` is their environment."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from cogvla.configs.build import build
from cogvla.envs.suite import Suite, register_suite
from cogvla.files import visible
from cogvla.libero.env import LiberoEnv, LiberoSettings
from cogvla.libero.installation import assets_folder, versions
from cogvla.libero.perturbations import PERTURBATIONS
from cogvla.libero.tasks import LIBERO_SUITES, MAX_STEPS, tasks

if TYPE_CHECKING:
    from cogvla.libero.experts.expert import LiberoExpert

PROTOCOL = "openvla_oft"
"""Default protocol. Most published numbers follow it."""
SETTLING_STEPS = 10
"""Control steps without motion at the start, as in the published protocols: initial states hold objects a little above
the table."""


def libero_suite(name: str, settings: LiberoSettings | None = None) -> Suite:
    """Build one of `LIBERO_SUITES`.

    Raises:
        ValueError: LIBERO or its assets are missing.
    """
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
        perturbations=PERTURBATIONS,
        settling_steps=SETTLING_STEPS,
    )


def _identity(settings: LiberoSettings, assets: Path) -> dict[str, Any]:
    """Return everything besides the protocol that changes an episode. The paths of folders are not part of it."""
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
    """Hash the names and sizes of a folder's files, without reading the files."""
    found = [file for file in visible(folder, "**/*") if file.is_file()]  # a download leaves hidden files behind
    files = sorted((str(file.relative_to(folder)), file.stat().st_size) for file in found)
    return f"{hashlib.sha256(repr(files).encode()).hexdigest()[:12]} ({len(files)} files)"


def libero_expert(env: gym.Env, rng: np.random.Generator, noise: float = 0.0) -> LiberoExpert:
    """Build the scripted expert for the task that `env` was last reset to."""
    from cogvla.libero.experts.expert import LiberoExpert

    return LiberoExpert(env, rng, noise)


def make_env(suite: str, **options: Any) -> gym.Env:
    """Build an environment for gymnasium id `cogvla/<suite>-v0`.

    Args:
        suite: one of `LIBERO_SUITES`.
        options: fields of `LiberoSettings`, and `image_size` and `render` of `LiberoEnv`.
    """
    settings = {f.name: options.pop(f.name) for f in fields(LiberoSettings) if f.name in options}
    return LiberoEnv(suite, LiberoSettings(**settings), **options)


def _configured(name: str, **values: Any) -> Suite:
    return libero_suite(name, build(LiberoSettings, values, "libero"))


for _name in LIBERO_SUITES:
    register_suite(_name, partial(_configured, _name), group="libero")
    gym.register(f"cogvla/{_name}-v0", entry_point="cogvla.libero.suites:make_env", kwargs={"suite": _name})
