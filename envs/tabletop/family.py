"""Definition of one tabletop suite: its tasks, items and random scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cogvla.envs.suite import Task
from cogvla.envs.tabletop.goals import Layout, Shifts
from cogvla.envs.tabletop.scene import Item


class Draw(Protocol):
    """Draws a scene."""

    def __call__(self, rng: np.random.Generator, task: int, moved: Shifts, /) -> Layout:
        """Return the layout of one scene of a task; `moved`: furniture -> how far it stands from where it would."""
        ...


@dataclass(frozen=True)
class Family:
    """Definition of one tabletop suite.

    Attributes:
        name, tasks, max_steps, labels: as in `Suite`.
        seed: first number of the seed of every initial state.
        items: all items that may stand on the table.
        draw: draws a scene; `goals` of its layout has the task and its alternatives.
        furniture: names of fixed items that stand at a fixed place, in groups that a perturbation moves together.
        sides: task -> -1 or 1 if its instruction names the leftmost or rightmost of all items of a kind.
    """

    name: str
    tasks: tuple[Task, ...]
    max_steps: int
    seed: int
    items: Sequence[Item]
    draw: Draw
    furniture: Sequence[Sequence[str]] = ()
    sides: Mapping[int, int] = field(default_factory=dict)
    labels: int | None = None
