"""Build an environment of a tabletop suite, with its own type."""

from __future__ import annotations

from typing import Any

from cogvla.envs.suite import get_suite
from cogvla.envs.tabletop.env import TabletopEnv


def tabletop(suite: str, **options: Any) -> TabletopEnv:
    """Return the environment of a suite without its wrappers; options are those of `Suite.make`."""
    env: Any = get_suite(suite).make(**options)
    assert isinstance(env.unwrapped, TabletopEnv)
    return env.unwrapped
