"""All that tells one tabletop suite from another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cogvla.envs.suite import Task
from cogvla.envs.tabletop.goals import Layout
from cogvla.envs.tabletop.scene import Item


@dataclass(frozen=True)
class Family:
    """All that tells one suite from another.

    Attributes:
        name, tasks, max_steps: as in `Suite`.
        seed: first entry of every initial state's seed.
        items: everything that may stand on the table.
        draw: (rng, task) -> the layout of one scene; `layout.goals` holds the task and all its alternatives.
    """

    name: str
    tasks: tuple[Task, ...]
    max_steps: int
    seed: int
    items: Sequence[Item]
    draw: Callable[[np.random.Generator, int], Layout]
