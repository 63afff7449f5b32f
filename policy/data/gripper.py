"""The gripper values of a data set: checked, and mapped to those of the embodiment.

Shape legend: N frames, A action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvla.policy.interface import Embodiment

OUTSIDE = 0.05
"""Fraction of the range from open to close by which values may lie outside of it."""
REACHED = 0.1
"""Fraction of the range: values closer than this to an end count as that end."""


@dataclass(frozen=True)
class GripperConvention:
    """The data set's values for one gripper; they are mapped to the embodiment's.

    Attributes:
        index: action dimension of the gripper.
        open: value of an open gripper.
        close: value of a closed gripper.
        part: True if the data may use only a part of the range, for a gripper that never opens or closes completely.
    """

    index: int
    open: float
    close: float
    part: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.open) and math.isfinite(self.close)):
            raise ValueError(f"data.gripper: open and close must be finite numbers, got {self.open} and {self.close}")
        if self.open == self.close:
            raise ValueError(f"the gripper's open and close values must differ, both are {self.open}")


def convert_grippers(
    action_NA: Tensor, conventions: Sequence[GripperConvention] | None, embodiment: Embodiment
) -> Tensor:
    """Check the data set's gripper values, and map them linearly to the embodiment's: open to open, close to close.

    Args:
        action_NA: actions as stored.
        conventions: one for each gripper with other values than the embodiment's; None: all have the embodiment's.
        embodiment: the robot.

    Raises:
        ValueError: a convention is not for a gripper of the embodiment, or the values are not of their convention.
    """
    mapped_NA = map_grippers(action_NA, conventions, embodiment)
    if wrong := gripper_mistakes(action_NA, conventions, embodiment):
        raise ValueError("; ".join(wrong))
    return mapped_NA


def map_grippers(action_NA: Tensor, conventions: Sequence[GripperConvention] | None, embodiment: Embodiment) -> Tensor:
    """Map gripper values as `convert_grippers` does, whatever they are.

    Raises:
        ValueError: a convention is not for a gripper of the embodiment.
    """
    named = [convention.index for convention in conventions or ()]
    for index in named:
        if index not in embodiment.grippers:
            raise ValueError(
                f"data.gripper.index {index} is no gripper of embodiment {embodiment.name!r}: its gripper_index is "
                f"{list(embodiment.grippers) or 'null'}"
            )
    if len(set(named)) != len(named):
        raise ValueError(f"data.gripper has two entries of one index; the indices are {named}")
    mapped_NA = action_NA.clone() if conventions else action_NA
    for convention in conventions or ():
        closed_N = (action_NA[:, convention.index] - convention.open) / (convention.close - convention.open)
        mapped_NA[:, convention.index] = torch.lerp(
            torch.tensor(float(embodiment.gripper_open)), torch.tensor(float(embodiment.gripper_close)), closed_N
        )
    return mapped_NA


def gripper_mistakes(
    action_NA: Tensor, conventions: Sequence[GripperConvention] | None, embodiment: Embodiment
) -> list[str]:
    """Return a sentence for each gripper whose stored values are not those of its convention.

    All values must lie between open and close, and both ends must be reached, or always the same one. One frame in a
    thousand must be near an end to reach it.
    """
    declared = {convention.index: convention for convention in conventions or ()}
    mistakes = []
    for index in embodiment.grippers if len(action_NA) else ():
        default = GripperConvention(index, embodiment.gripper_open, embodiment.gripper_close)
        convention = declared.get(index, default)
        value_N = action_NA[:, index].double()
        found = float(value_N.min()), float(value_N.max())
        closed_N = (value_N - convention.open) / (convention.close - convention.open)
        inside = bool(((closed_N >= -OUTSIDE) & (closed_N <= 1 + OUTSIDE)).all())
        frames = max(1, len(value_N) // 1000)
        at_open, at_close = int((closed_N < REACHED).sum()), int((closed_N > 1 - REACHED).sum())
        still = math.isclose(*found, rel_tol=0, abs_tol=1e-6 * abs(convention.close - convention.open))
        ends = max(at_open, at_close) if still else min(at_open, at_close)
        if inside and (convention.part or ends >= frames):
            continue
        source = "data.gripper" if index in declared else f"embodiment {embodiment.name!r}"
        said = (
            f"action {index} of the data, a gripper, has values from {found[0]:g} to {found[1]:g}, but {source} says "
            f"{convention.open:g} open, {convention.close:g} close"
        )
        if still:
            mistakes.append(f"{said}: give its open and close values in data.gripper")
            continue
        low_opens = convention.open < convention.close and index in declared
        first, second = found if low_opens else found[::-1]
        fits = f"{{index: {index}, open: {first:.6g}, close: {second:.6g}}}"
        kept = f"{{index: {index}, open: {convention.open:g}, close: {convention.close:g}, part: true}}"
        stays = f"; if it never opens or closes completely, give data.gripper={kept}" if inside else ""
        mistakes.append(f"{said}: map it with data.gripper={fits} if {first:.6g} opens, else exchange them{stays}")
    return mistakes
