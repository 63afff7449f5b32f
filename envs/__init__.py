"""Register the tabletop suites and their gymnasium ids, without importing the simulator."""

from __future__ import annotations

import importlib
from functools import partial

import gymnasium as gym

from cogvla.envs.suite import Suite, register_suite

TABLETOP_SUITES = ("tabletop_object", "tabletop_spatial", "tabletop_goal", "tabletop_long")


def _load(name: str) -> Suite:
    module = importlib.import_module(f"cogvla.envs.tabletop.tasks_{name.removeprefix('tabletop_')}")
    suites = importlib.import_module("cogvla.envs.tabletop.suites")
    suite: Suite = suites.tabletop_suite(module.family())
    return suite


for _name in TABLETOP_SUITES:
    register_suite(_name, partial(_load, _name))
    gym.register(f"cogvla/{_name}-v0", entry_point="cogvla.envs.tabletop.suites:make_env", kwargs={"suite": _name})
