"""Stored frames of demonstrations, whatever holds them.

Shape legend: N frames, B frames of a batch, V views, H, W image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Frames(Protocol):
    """The pictures of N frames, all of one size."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, V, 3, H, W)."""
        ...

    def __len__(self) -> int:
        """Return N."""
        ...

    def take(self, rows_B: np.ndarray) -> np.ndarray:
        """Return the pictures of these frames, in any order and also repeatedly; several threads may call it.

        Args:
            rows_B: indices of frames, int64 [B].

        Returns:
            uint8 [B,V,3,H,W], a copy.
        """
        ...


@dataclass(frozen=True)
class ArrayFrames:
    """Frames in an array, in memory or memory-mapped.

    Attributes:
        pixels_NVCHW: uint8 [N,V,3,H,W].
    """

    pixels_NVCHW: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pixels_NVCHW.shape

    def __len__(self) -> int:
        return len(self.pixels_NVCHW)

    def take(self, rows_B: np.ndarray) -> np.ndarray:
        # numpy's take copies a frame in one piece; torch's index_select takes five times as long here
        return np.take(self.pixels_NVCHW, rows_B, axis=0)


@dataclass(frozen=True)
class ConcatenatedFrames:
    """The frames of several data sets, one after the other.

    Attributes:
        parts: the frames of each, all of one shape but for their number.
    """

    parts: tuple[Frames, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.parts[0].shape[1:])

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def take(self, rows_B: np.ndarray) -> np.ndarray:
        ends = np.cumsum([len(part) for part in self.parts])
        part_B = np.searchsorted(ends, rows_B, side="right")
        pixels_BVCHW = np.empty((len(rows_B), *self.shape[1:]), np.uint8)
        for number in np.unique(part_B):
            mine = part_B == number
            part = self.parts[number]
            pixels_BVCHW[mine] = part.take(rows_B[mine] - (ends[number] - len(part)))
        return pixels_BVCHW
