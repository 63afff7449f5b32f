"""The robustness benchmark: seven dimensions in which an episode may differ from training, in three levels each.

Everything that a perturbation draws follows from the suite, the task, the initial state, the dimension and the level,
so that runs repeat exactly and every policy meets the same scenes. docs/robustness.md says what each level does.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

DIMENSIONS = ("camera", "light", "background", "sensor", "layout", "robot", "wording")
OF_THE_PLAYER = ("sensor", "wording")
"""Dimensions that change observations of any environment; the others need `Perturbable` environments."""
LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class Perturbation:
    """One cell of the benchmark: a dimension, one of `DIMENSIONS`, and a level, one of `LEVELS`."""

    dimension: str
    level: int

    def __post_init__(self) -> None:
        if self.dimension not in DIMENSIONS:
            raise ValueError(f"unknown perturbation {self.dimension!r}; one of all, {', '.join(DIMENSIONS)}")
        if type(self.level) is not int or self.level not in LEVELS:
            raise ValueError(f"level must be 1, 2 or 3, got {self.level!r}")

    def __str__(self) -> str:
        return f"{self.dimension}_{self.level}"

    def seed(self, suite: str, task: int, initial_state: int) -> list[int]:
        """Return the seed of this perturbation's draws in an episode, for `numpy.random.default_rng`."""
        return [zlib.crc32(suite.encode()), task, initial_state, DIMENSIONS.index(self.dimension), self.level]

    def pick(self, *values: float) -> float:
        """Return the value of this level from those of the levels 1, 2 and 3."""
        return values[self.level - 1]


def away(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number with a magnitude in [low, high] and a random sign."""
    return float(rng.uniform(low, high) * rng.choice([-1.0, 1.0]))
