"""Samples of foresight: a frame, the actions that were executed from it on, and the frame after them.

What moved the arm is `DemonstrationData.executed_NA` in recordings of noisy experts and of corrections: there `action`
is what should have been done.

Shape legend: as in docs/architecture.md, with N frames of the data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogvla.policy.data.demonstrations import DemonstrationData


@dataclass(frozen=True)
class Window:
    """Samples, on the CPU: pictures uint8 [B,V,3,H,W] before and after, and in physical units state and actions."""

    before_BVCHW: Tensor
    after_BVCHW: Tensor
    state_BS: Tensor
    chunk_BKA: Tensor


class Windows:
    """All samples of a data set, or of a part of its episodes, whose frames are in one episode.

    Args:
        data: the demonstrations.
        executed: True: the actions that were executed; False: those to learn, for a comparison.

    Attributes:
        rows: first frames of the samples, int64.
        action_NA: the executed actions of all frames.

    Raises:
        ValueError: no episode is longer than the horizon.
    """

    def __init__(self, data: DemonstrationData, executed: bool = True) -> None:
        self.data, self.horizon = data, data.chunk
        self.action_NA = data.executed_NA if executed and data.executed_NA is not None else data.action_NA
        rows = data.all_rows
        later = (rows + self.horizon).clamp(max=len(data.episode_N) - 1)
        whole = (rows + self.horizon < len(data.episode_N)) & (data.episode_N[later] == data.episode_N[rows])
        self.rows = rows[whole]
        if not len(self.rows):
            longest = int(torch.bincount(data.episode_N[rows] - data.episode_N[rows].min()).max()) if len(rows) else 0
            raise ValueError(
                f"foresight looks {self.horizon} frames ahead, and the longest episode has {longest}; record longer "
                "ones, or use an embodiment with a shorter chunk"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def chunk(self, rows_B: Tensor) -> Tensor:
        """Return the actions [B,K,A] executed from these frames on."""
        return self.action_NA[rows_B[:, None] + torch.arange(self.horizon)]

    def gather(self, rows_B: Tensor) -> Window:
        """Return the samples that begin at these frames."""
        both = self.data.frames.take(np.concatenate([rows_B.numpy(), rows_B.numpy() + self.horizon]))
        before, after = torch.from_numpy(both).chunk(2)
        return Window(before, after, self.data.state_NS[rows_B], self.chunk(rows_B))

    def draw(self, count: int, seed: int) -> Tensor:
        """Draw first frames, with repetition; the same ones for the same seed."""
        return self.rows[torch.randint(len(self), (count,), generator=torch.Generator().manual_seed(seed))]
