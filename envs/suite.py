"""What every benchmark suite is: tasks, an environment that can play any of them, and a protocol.

`eval_libero`, the recorder and training know suites only through this file, so LIBERO and the tabletop are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from cogvla.plugins import import_plugins

EVALUATION_STATES = 50
"""Initial states 0..49 of every task are for evaluation; recorders start at `FIRST_TRAINING_STATE`."""
FIRST_TRAINING_STATE = 1000


@dataclass(frozen=True)
class Task:
    """One task of a suite: a short name for tables and files, and the instruction given to the policy."""

    name: str
    instruction: str


@dataclass(frozen=True)
class Suite:
    """A named list of tasks.

    The environment that `make` builds plays any task of the suite:

    - `make(image_size: int = 128, render: bool = True) -> gym.Env` (one per process; `render=False`: black images)
    - `env.reset(seed=None, options={"task": int, "initial_state": int})` is deterministic in (task, initial_state)
    - observation: `agentview`, `wrist` uint8 [H,W,3]; `state` float32 [8]
    - action: float32 [7] in [-1,1], gripper -1 open, +1 close
    - `info`: `success` bool, `instruction` str; after `reset` also `alternatives` and `alternative_tasks`: the
      instructions and indices of the suite's other tasks that can be carried out in the same scene and ask for
      something else
    - `options["asked"]`, one of those indices, swaps the instruction: `success` is then that task's, and
      `info["scene_task_success"]` that of `task`
    - `step` returns terminated=True on success and truncated=True at `max_steps`
    - optional, to save time: the attribute `skip_images` (True: observations may hold old images), and
      `render_camera(name, height, width)` for videos

    Attributes:
        name: registry key, e.g. `tabletop_object`.
        tasks: in a fixed order; their index is the task's id.
        max_steps: control steps before an episode is a failure.
        make: builds the environment; a function of a module or a partial of one, so that processes can be sent it.
        initial_states: how many fixed initial states the protocol has per task.
        protocol: name of the evaluation protocol that is taken when none is named.
        settings: what else decides the numbers (rendering, assets); reports and recordings say it.
        expert: builds the scripted expert, `expert(env, rng, noise=...)`; importable, like `make`; None: there is none.
        settling_steps: control steps with an open hand before an expert begins, for things to come to rest.
    """

    name: str
    tasks: tuple[Task, ...]
    max_steps: int
    make: Callable[..., gym.Env]
    initial_states: int = EVALUATION_STATES
    protocol: str = "tabletop"
    settings: Mapping[str, Any] = field(default_factory=dict)
    expert: Callable[..., Any] | None = None
    settling_steps: int = 0


_SUITES: dict[str, tuple[Callable[..., Suite], str | None]] = {}


def register_suite(name: str, factory: Callable[..., Suite], group: str | None = None) -> None:
    """Register a suite.

    Args:
        name: name of the suite.
        factory: function that builds the suite. `get_suite` calls it, so that registering imports no simulator.
        group: group of the configuration whose values the factory gets as keywords; None: the factory gets none.

    Raises:
        ValueError: another suite has this name.
    """
    if name in _SUITES:
        factories = (each.func if isinstance(each, partial) else each for each in (_SUITES[name][0], factory))
        both = " and ".join(f"{each.__module__}.{each.__qualname__}" for each in factories)
        raise ValueError(f"two suites have the name {name!r}: {both}")
    _SUITES[name] = factory, group


def suite_names() -> list[str]:
    """Return the names of all registered suites, in alphabetical order."""
    import_plugins("cogvla.suites")
    return sorted(_SUITES)


def get_suite(name: str, configuration: Mapping[str, Any] | None = None) -> Suite:
    """Build the suite of that name.

    Args:
        name: name of a registered suite.
        configuration: configuration of a command; a suite with settings reads them under the name of its group.

    Raises:
        ValueError: no suite has this name (the message lists all names), or it cannot be built here.
    """
    if name not in suite_names():
        raise ValueError(f"unknown suite {name!r}; one of {', '.join(suite_names())}")
    factory, group = _SUITES[name]
    return factory(**(configuration or {}).get(group, {})) if group else factory()


def chosen_start(options: Mapping[str, Any], tasks: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return the task and the initial state from the options of `reset`.

    A missing task is drawn from all tasks, a missing initial state from the training states.

    Raises:
        ValueError: an option is unknown, or the task or state does not exist.
    """
    unknown = set(options) - {"task", "initial_state", "asked"}
    if unknown:
        raise ValueError(f"unknown reset options {sorted(unknown)}; use task, initial_state, asked")
    task, state = options.get("task"), options.get("initial_state")
    task = int(rng.integers(tasks) if task is None else task)
    state = int(rng.integers(FIRST_TRAINING_STATE, 2**31) if state is None else state)
    if not 0 <= task < tasks or state < 0:
        raise ValueError(f"task must be in 0..{tasks - 1} and initial_state at least 0, got {task} and {state}")
    return task, state
