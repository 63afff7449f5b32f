"""The tasks of LIBERO's suites, in words."""

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
"""Control steps of OpenVLA-OFT's evaluation, about 1.5 times the longest demonstration."""
LIBERO_SUITES = tuple(MAX_STEPS)


def tasks(name: str) -> tuple[Task, ...]:
    """The tasks of a LIBERO suite; needs LIBERO, but no assets."""
    return tuple(Task(task, instruction(task)) for task in task_names(name))


def instruction(task: str) -> str:
    """What the policy is told: the task's name in words, as published evaluations do (BDDL files word it differently).

    The place at the beginning of names of libero_10 and libero_90 (`KITCHEN_SCENE3_`) is left out.
    """
    return task.removeprefix(place(task)).replace("_", " ")


def place(task: str) -> str:
    """The beginning of a task's name that says which scene it happens in, or an empty text."""
    found = re.match(r"[A-Z_]+SCENE\d+_", task)
    return found[0] if found else ""
