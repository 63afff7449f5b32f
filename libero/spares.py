"""Things that belong to no task, for the dimension `layout` of the robustness benchmark in LIBERO's scenes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spare:
    """A thing that is no part of any task: a shape of one colour, which no instruction names.

    Attributes:
        name: name of its body.
        shape: `box` or `cylinder`.
        size: half sizes of a box [3], or radius and half height of a cylinder [2], in metres.
        rgba: colour.
    """

    name: str
    shape: str
    size: tuple[float, ...]
    rgba: str

    @property
    def radius(self) -> float:
        """Radius of the upright cylinder around it, in metres."""
        return float(np.hypot(self.size[0], self.size[1])) if self.shape == "box" else self.size[0]

    @property
    def xml(self) -> str:
        """Its body for MuJoCo. Its mass is given: these models take masses only from geoms that are not drawn."""
        size = " ".join(map(str, self.size))
        return (
            f'<body name="{self.name}" pos="0 0 -1"><freejoint name="{self.name}_joint"/>'
            '<inertial pos="0 0 0" mass="0.15" diaginertia="0.0001 0.0001 0.0001"/>'
            f'<geom name="{self.name}_geom" type="{self.shape}" size="{size}" rgba="{self.rgba}" group="1"'
            ' friction="1 0.005 0.0001" solref="0.01 1"/></body>'
        )


SPARES = (
    Spare("spare_block", "box", (0.024, 0.024, 0.030), "0.48 0.22 0.62 1"),
    Spare("spare_drum", "cylinder", (0.028, 0.034), "0.05 0.45 0.42 1"),
    Spare("spare_puck", "cylinder", (0.034, 0.014), "0.90 0.48 0.68 1"),
)


def spares_for(suite: str, task: int, count: int) -> tuple[Spare, ...]:
    """Return the spares of a task's scene. They differ between tasks only, so that a scene is not built again."""
    order = np.random.default_rng([zlib.crc32(suite.encode()), task]).permutation(len(SPARES))
    return tuple(SPARES[int(i)] for i in order[:count])
