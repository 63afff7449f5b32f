"""The gripper values of a data set, mapped to those of the embodiment.

Shape legend: N frames, A action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvla.policy.interface import Embodiment


@dataclass(frozen=True)
class GripperConvention:
    """The data set's values for one gripper; they are mapped to the embodiment's."""

    index: int
    open: float
    close: float

    def __post_init__(self) -> None:
        if self.open == self.close:
            raise ValueError(f"the gripper's open and close values must differ, both are {self.open}")


def convert_grippers(
    action_NA: Tensor, conventions: Sequence[GripperConvention] | None, embodiment: Embodiment
) -> Tensor:
    """Map the data set's gripper values to the embodiment's linearly, open to open and close to close.

    Args:
        action_NA: actions as stored.
        conventions: one for each gripper with other values than the embodiment's; None: all have the embodiment's.
        embodiment: the robot.

    Raises:
        ValueError: the gripper's index is outside of the action.
    """
    converted_NA = action_NA.clone() if conventions else action_NA
    for convention in conventions or ():
        if not 0 <= convention.index < action_NA.shape[1]:
            raise ValueError(
                f"data.gripper.index {convention.index} is outside the {action_NA.shape[1]} action dimensions"
            )
        closed_N = (action_NA[:, convention.index] - convention.open) / (convention.close - convention.open)
        converted_NA[:, convention.index] = torch.lerp(
            torch.tensor(embodiment.gripper_open), torch.tensor(embodiment.gripper_close), closed_N
        )
    return converted_NA
