"""The data sets of a mixture: what the configuration says about each, and where each is in the arrays of them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class DataPart:
    """One data set of a mixture, as a part of `DemonstrationData`.

    Attributes:
        name: its name in metrics, messages and reports.
        start: its first frame in the arrays.
        end: the frame after its last one.
        first_episode: what is added to its own episode numbers.
        weight: how often each of its frames is drawn, relative to a frame of a data set of weight 1.
        content: fingerprints, see `DemonstrationData.content`.
        provenance: its description for reports.
    """

    name: str
    start: int
    end: int
    first_episode: int
    weight: float = 1.0
    content: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, rows: Tensor) -> Tensor:
        """Return True for the frames that are of this data set."""
        return (rows >= self.start) & (rows < self.end)
