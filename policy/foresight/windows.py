"""Samples of foresight: a frame, the actions that were executed from it on, and the frame after them.

What moved the arm is `label.executed_action` in recordings of noisy experts and of corrections: there `action` is what
should have been done.

Shape legend: as in docs/architecture.md, with N frames of the data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogvla.policy.data.demonstrations import DemonstrationData

EXECUTED_LABEL = "executed_action"
"""Label in which a data set's executed actions are read."""


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
        executed: True: the executed actions are in the label `EXECUTED_LABEL`; False: they are `action`.

    Attributes:
        rows: first frames of the samples, int64.
        action_NA: the executed actions of all frames.

    Raises:
        ValueError: the label is missing or has another size, or no episode is longer than the horizon.
    """

    def __init__(self, data: DemonstrationData, executed: bool = True) -> None:
        self.data, self.horizon = data, data.chunk
        self.action_NA = data.action_NA
        if executed:
            label = data.frame_labels.get(EXECUTED_LABEL)
            if label is None:
                raise ValueError(
                    "not all data sets say which actions were executed; if `action` is what was executed, give "
                    "executed=null"
                )
            self.action_NA = label.float().reshape(len(label), -1)
            if self.action_NA.shape != data.action_NA.shape:
                raise ValueError(
                    f"the executed actions have {self.action_NA.shape[1]} numbers, `action` has "
                    f"{data.action_NA.shape[1]}; name the right feature with executed=KEY"
                )
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
