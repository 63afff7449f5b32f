"""A benchmark suite: tasks, an environment that can play any of them, and a protocol; and the registry of suites.

`eval_libero`, the recorder and training know suites only through this file, so LIBERO and the tabletop are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

from cogvla.envs.contract import Expert, SuiteEnv
from cogvla.envs.perturbation import sensor, wording
from cogvla.envs.perturbation.perturbation import SENSOR, WORDING, Perturbation, Values
from cogvla.plugins import import_plugins

EVALUATION_STATES = 50
"""Initial states 0..49 of every task are for evaluation; recorders start at `FIRST_TRAINING_STATE`."""
FIRST_TRAINING_STATE = 1000
EVERYWHERE: Mapping[str, Sequence[Values]] = {SENSOR: sensor.LEVELS, WORDING: wording.LEVELS}
"""Perturbations that every suite supports, since the rollout carries them out."""


@dataclass(frozen=True)
class Task:
    """One task of a suite: a short name for tables and files, and the instruction given to the policy."""

    name: str
    instruction: str


@dataclass(frozen=True)
class Suite:
    """A named list of tasks.

    Attributes:
        name: registry key, e.g. `tabletop_object`.
        tasks: in a fixed order; their index is the task's id.
        max_steps: control steps before an episode is a failure.
        make: `make(image_size: int = 128, render: bool = True)` builds an environment that plays any of the tasks
            (`envs/contract.py`), with black images if `render` is False. It is a function of a module or a partial of
            one, so that processes can be sent it.
        initial_states: how many fixed initial states the protocol has per task.
        protocol: name of the evaluation protocol that is taken when none is named.
        settings: what else decides the numbers (rendering, assets); reports and recordings say it.
        expert: `expert(env, rng, noise=...)` builds the scripted expert for the scene that `env` was reset to. It is
            importable, like `make`; None: there is none.
        settling_steps: control steps with an open hand before an expert begins, for things to come to rest.
        perturbations: dimension of the robustness benchmark -> magnitudes of its levels. Others than `sensor` and
            `wording` need the part `Perturbable` of the contract.
        labels: number of the meaning of the labels, raised when it changes: data sets with another one are not reused
            or continued; None: the first one.
    """

    name: str
    tasks: tuple[Task, ...]
    max_steps: int
    make: Callable[..., SuiteEnv]
    initial_states: int = EVALUATION_STATES
    protocol: str = "tabletop"
    settings: Mapping[str, Any] = field(default_factory=dict)
    expert: Callable[..., Expert] | None = None
    settling_steps: int = 0
    perturbations: Mapping[str, Sequence[Values]] = field(default_factory=lambda: EVERYWHERE)
    labels: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.initial_states <= FIRST_TRAINING_STATE:
            raise ValueError(
                f"suite {self.name!r}: initial_states must be 1 to {FIRST_TRAINING_STATE}, got {self.initial_states}: "
                "recordings show those that come after, and an evaluation may not"
            )

    def magnitudes(self, perturbation: Perturbation) -> Values:
        """Return the magnitudes of a perturbation; ValueError if the suite does not support this dimension."""
        if perturbation.dimension not in self.perturbations:
            raise ValueError(
                f"suite {self.name!r} cannot be perturbed in {perturbation.dimension!r}; it supports "
                f"{', '.join(self.perturbations)}"
            )
        return self.perturbations[perturbation.dimension][perturbation.level - 1]

    def chosen_tasks(self, tasks: Sequence[int]) -> tuple[int, ...]:
        """Return indices of tasks, each once; ValueError if one does not exist, or if there is none."""
        listed = tasks if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
        whole = all(isinstance(task, int) and not isinstance(task, bool) for task in listed)
        if not listed or not whole or not all(0 <= task < len(self.tasks) for task in listed):
            raise ValueError(f"suite {self.name!r} has tasks 0 to {len(self.tasks) - 1}, got tasks={tasks!r}")
        return tuple(dict.fromkeys(listed))


_ALIASES = {
    **dict.fromkeys(("libero_long", "libero10", "libero_ten", "libero_100", "long_libero"), "libero_10"),
    **dict.fromkeys(("libero90", "libero_short"), "libero_90"),
    **dict.fromkeys(("libero", "libero_4_task_suites"), "all_libero"),
    "tabletop": "all_tabletop",
}
"""Names that others use -> ours, for the hint of an error."""
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


def unknown_suite(name: str, others: Iterable[str] = ()) -> ValueError:
    """Return the error about a name that no suite has; it names those that were probably meant.

    Args:
        name: the unknown name.
        others: names that a command takes beside those of suites.
    """
    known = [*suite_names(), *others]
    plain = re.sub(r"_+(no_?noops?|lerobot|rlds|hdf5)\b", "", re.sub(r"[\W_]+", "_", str(name).lower()).strip("_"))
    family, _, rest = plain.partition("_")
    plain = _ALIASES.get(plain, plain)
    meant = [suite for suite in known if suite == plain] or [n for n in known if plain and n.endswith(f"_{plain}")]
    meant = meant or [suite for suite in known if rest and suite == f"{rest}_{family}"]
    meant = meant or get_close_matches(plain, known, n=3, cutoff=0.7)
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return ValueError(f"unknown suite {name!r}; one of {', '.join(known)}{hint}")


def get_suite(name: str, configuration: Mapping[str, Any] | None = None) -> Suite:
    """Build the suite of that name.

    Args:
        name: name of a registered suite.
        configuration: configuration of a command; a suite with settings reads them under the name of its group.

    Raises:
        ValueError: no suite has this name (the message lists all names), or it cannot be built here.
    """
    if name not in suite_names():
        raise unknown_suite(name)
    factory, group = _SUITES[name]
    return factory(**(configuration or {}).get(group, {})) if group else factory()


def chosen_start(options: Mapping[str, Any], tasks: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return the task and the initial state from the options of `reset`.

    A missing task is drawn from all tasks, a missing initial state from the training states.

    Raises:
        ValueError: an option is unknown or no whole number, or the task or state does not exist.
    """
    unknown = set(options) - {"task", "initial_state", "asked"}
    if unknown:
        raise ValueError(f"unknown reset options {sorted(unknown)}; use task, initial_state, asked")
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
            raise ValueError(f"reset options are whole numbers, got {name}={value!r}")
    task, state = options.get("task"), options.get("initial_state")
    task = int(rng.integers(tasks) if task is None else task)
    state = int(rng.integers(FIRST_TRAINING_STATE, 2**31) if state is None else state)
    if not 0 <= task < tasks or state < 0:
        raise ValueError(f"task must be in 0..{tasks - 1} and initial_state at least 0, got {task} and {state}")
    return task, state
