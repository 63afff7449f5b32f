"""Definition of one tabletop suite: its tasks, items and random scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cogvla.envs.suite import Task
from cogvla.envs.tabletop.goals import Layout
from cogvla.envs.tabletop.scene import Item


@dataclass(frozen=True)
class Family:
    """Definition of one tabletop suite.

    Attributes:
        name, tasks, max_steps: as in `Suite`.
        seed: first number of the seed of every initial state.
        items: all items that may stand on the table.
        draw: function (rng, task) -> layout of one scene; `layout.goals` has the task and its alternatives.
        by_place: instructions name free items by their place in the picture, such as `leftmost`.
    """

    name: str
    tasks: tuple[Task, ...]
    max_steps: int
    seed: int
    items: Sequence[Item]
    draw: Callable[[np.random.Generator, int], Layout]
    by_place: bool = False
