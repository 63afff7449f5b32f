"""Actions and weights to learn from data in which a policy acted, and a demonstrator corrected it or took over.

A chunk says what to do in a state and in those that follow when it is done. Where the policy acted instead, the next
states are others, so what the demonstrator said there is no continuation: a hand that hovers 3 cm too high is told to
go down again and again, and would learn to go down through the table. A chunk therefore teaches up to the first action
that was not carried out.

Shape legend: N frames of the data set, K chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXECUTED = "label.executed_action"
"""Feature of data sets whose actions are the demonstrator's everywhere, and not those that were executed."""


@dataclass(frozen=True)
class Teaching:
    """Number of actions to learn from each frame, and its weight.

    Attributes:
        actions_N: number of actions of the chunk that begins at a frame which may be learned, int64; it may reach
            beyond the end of the episode.
        weight_N: weight of the frame in the loss, float32.
    """

    actions_N: Tensor
    weight_N: Tensor

    @classmethod
    def of(cls, acted_N: Tensor, advised: bool, weight: float) -> Teaching:
        """Return what the frames of a data set teach.

        Args:
            acted_N: True where the demonstrator acted, False where the policy did.
            advised: the actions of all frames are the demonstrator's; False: only where it acted, as in recordings of
                robots, so that frames of the policy teach nothing.
            weight: weight of frames in which the demonstrator acted.
        """
        index_N = torch.arange(len(acted_N))
        ends_N = torch.where(acted_N, len(acted_N), index_N).flip(0).cummin(0).values.flip(0)
        weight_N = torch.where(acted_N, weight, 1.0)
        return cls(ends_N - index_N + int(advised), weight_N)

    @classmethod
    def everything(cls, frames: int, chunk: int) -> Teaching:
        """Return that all frames of a data set teach whole chunks."""
        return cls(torch.full((frames,), chunk), torch.ones(frames))


def concatenated(parts: Sequence[Teaching | None], frames: Sequence[int], chunk: int) -> Teaching | None:
    """Return what data sets of so many frames teach, one after the other; None stands for everything."""
    if all(part is None for part in parts):
        return None
    known = [part or Teaching.everything(count, chunk) for part, count in zip(parts, frames, strict=True)]
    return Teaching(torch.cat([k.actions_N for k in known]), torch.cat([k.weight_N for k in known]))


def acted(values: Tensor, key: str) -> Tensor:
    """Return the column as bool [N]; ValueError if its values are not true and false."""
    flat = values.reshape(len(values), -1)
    if flat.shape[1] != 1 or not ((flat == 0) | (flat == 1)).all():
        raise ValueError(
            f"{key!r} must say in each frame with one value, 0 or 1, whether the demonstrator acted; name another "
            "feature with data.intervention, or give data.intervention=null"
        )
    return flat[:, 0] == 1
