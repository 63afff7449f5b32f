"""Build a tabletop suite from a family, its environment and its expert."""

from __future__ import annotations

from functools import partial

import gymnasium as gym

from cogvla.envs.suite import Suite, get_suite
from cogvla.envs.tabletop.env import TabletopEnv
from cogvla.envs.tabletop.expert import Expert
from cogvla.envs.tabletop.family import Family
from cogvla.envs.tabletop.perturbations import PERTURBATIONS


def tabletop_suite(family: Family) -> Suite:
    """Build the suite of a family."""
    # A partial and no closure, because rollouts pickle it for their environment processes.
    make = partial(TabletopEnv, family)
    return Suite(
        family.name,
        family.tasks,
        family.max_steps,
        make,
        expert=Expert,
        perturbations=PERTURBATIONS,
        labels=family.labels,
    )


def make_env(suite: str, image_size: int = 128, render: bool = True) -> gym.Env:
    """Build an environment for gymnasium id `cogvla/<suite>-v0`."""
    return get_suite(suite).make(image_size=image_size, render=render)
