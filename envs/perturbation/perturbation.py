"""The robustness benchmark: seven dimensions in which an episode may differ from training, in three levels each.

Everything that a perturbation draws follows from the suite, the task, the initial state, the dimension and the level,
so that runs repeat exactly and every policy meets the same scenes. docs/robustness.md says what each level does.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

CAMERA, LIGHT, BACKGROUND, SENSOR = "camera", "light", "background", "sensor"
LAYOUT, ROBOT, WORDING = "layout", "robot", "wording"
DIMENSIONS = (CAMERA, LIGHT, BACKGROUND, SENSOR, LAYOUT, ROBOT, WORDING)
OF_THE_PLAYER = (SENSOR, WORDING)
"""Dimensions that change observations of any environment; the others need `Perturbable` environments."""
OF_THE_SCENE = tuple(name for name in DIMENSIONS if name not in OF_THE_PLAYER)
LEVELS = (1, 2, 3)
Values = Mapping[str, Any]
"""Magnitudes of one level, as plain values."""


class CrowdedSceneError(RuntimeError):
    """There is no room for what a perturbation adds to a scene; in another initial state there may be."""


@dataclass(frozen=True)
class Perturbation:
    """One cell of the benchmark: a dimension, one of `DIMENSIONS`, and a level, one of `LEVELS`."""

    dimension: str
    level: int

    def __post_init__(self) -> None:
        if self.dimension not in DIMENSIONS:
            known = ("all", *DIMENSIONS)
            meant = get_close_matches(str(self.dimension).lower(), known, n=1)
            hint = f"; did you mean {meant[0]}?" if meant else ""
            raise ValueError(f"unknown perturbation {self.dimension!r}; one of {', '.join(known)}{hint}")
        if type(self.level) is not int or self.level not in LEVELS:
            raise ValueError(f"level must be 1, 2 or 3, got {self.level!r}")

    def __str__(self) -> str:
        return f"{self.dimension}_{self.level}"

    def seed(self, suite: str, task: int, initial_state: int) -> list[int]:
        """Return the seed of this perturbation's draws in an episode, for `numpy.random.default_rng`.

        All levels have the same: an episode changes in the same direction, only further.
        """
        return [zlib.crc32(suite.encode()), task, initial_state, DIMENSIONS.index(self.dimension)]


def by_level(**values: Sequence[Any]) -> tuple[Values, ...]:
    """Return the magnitudes of each level, from name -> value at the levels 1, 2 and 3."""
    return tuple({name: each[level - 1] for name, each in values.items()} for level in LEVELS)


def changes(
    perturbations: Sequence[Perturbation], offered: Mapping[str, Sequence[Values]], suite: str, task: int, state: int
) -> dict[str, tuple[np.random.Generator, Values]]:
    """Return what an environment must change in an episode: dimension -> source of its draws, and its magnitudes.

    Args:
        perturbations: of the episode.
        offered: the suite's dimensions -> magnitudes of the levels.
        suite: name of the suite.
        task: index of the task.
        state: number of the initial state.

    Raises:
        ValueError: a perturbation is none, has the dimension of another one, or is not for the environment.
    """
    found: dict[str, tuple[np.random.Generator, Values]] = {}
    for each in perturbations:
        if not isinstance(each, Perturbation):
            raise ValueError(f"perturbations must be of the class Perturbation, got {each!r}")
        if each.dimension in OF_THE_PLAYER:
            raise ValueError(f"a rollout carries out the perturbation {each.dimension!r}, not the environment")
        if each.dimension not in offered:
            known = ", ".join(name for name in offered if name in OF_THE_SCENE)
            raise ValueError(f"scenes of {suite!r} cannot be perturbed in {each.dimension!r}, only in {known}")
        if each.dimension in found:
            raise ValueError(f"two perturbations are of the dimension {each.dimension!r}")
        rng = np.random.default_rng(each.seed(suite, task, state))
        found[each.dimension] = rng, offered[each.dimension][each.level - 1]
    return found


def within(rng: np.random.Generator, limits: Sequence[float]) -> float:
    """Draw a number within two limits."""
    low, high = limits
    return float(rng.uniform(low, high))


def signed(rng: np.random.Generator, limits: Sequence[float]) -> float:
    """Draw a number whose size is within two limits, of either sign."""
    sign = 1.0 if rng.random() < 0.5 else -1.0
    return sign * within(rng, limits)


def direction(rng: np.random.Generator) -> np.ndarray:
    """Draw a unit vector [3]."""
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)
