"""List the tasks of LIBERO's suites, with their instructions and step limits."""

from __future__ import annotations

import re

from cogvla.envs.suite import Task
from cogvla.libero.installation import task_names

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Step limit of an episode, from OpenVLA-OFT's evaluation: about 1.5 times the longest demonstration."""
LIBERO_SUITES = tuple(MAX_STEPS)


def tasks(name: str) -> tuple[Task, ...]:
    """Return the tasks of a LIBERO suite. Needs an installed LIBERO, but no assets."""
    return tuple(Task(task, instruction(task)) for task in task_names(name))


def suites_of(task: str) -> tuple[str, ...]:
    """Return the names of the LIBERO suites that have a task of this name."""
    return tuple(suite for suite in LIBERO_SUITES if task in task_names(suite))


def instruction(task: str) -> str:
    """Return the instruction of a task: its name with spaces, without the scene prefix (see `place`).

    Published evaluations use this text; the BDDL files word it differently.
    """
    return task.removeprefix(place(task)).replace("_", " ")


def place(task: str) -> str:
    """Return the scene prefix of a task's name in libero_10 and libero_90 (`KITCHEN_SCENE3_`), or an empty string."""
    found = re.match(r"[A-Z_]+SCENE\d+_", task)
    return found[0] if found else ""
