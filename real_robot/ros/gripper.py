"""A gripper that takes goals of the action `GripperCommand` instead of a command in each tick. Needs no ROS 2."""

from __future__ import annotations

import time
from collections.abc import Callable

from cogvla.real_robot.ros.node import Fields

CHANGE = 0.02
"""Smallest change of the position that is a new goal, as a share of the stroke. The ends are always reached exactly."""
PATIENCE_S = 2.0
"""Seconds after the start in which the action server may still be unknown."""


class GripperGoals:
    """Gives the action server a goal whenever the gripper has to be elsewhere; it replaces the goal before.

    Args:
        give: gives the server a goal, see `RosNode.pursue`.
        action: name of the action, for the error.
        ends: positions of the open and of the closed gripper.
        effort: highest effort; 0 leaves it to the gripper's controller.
    """

    def __init__(self, give: Callable[[Fields], bool], action: str, ends: tuple[float, ...], effort: float) -> None:
        self._give, self._action, self._ends, self._effort = give, action, ends, effort
        self._goal: float | None = None
        self._patient_until = time.monotonic() + PATIENCE_S

    def send(self, position: float) -> None:
        """Have the gripper move to a position.

        Raises:
            ConnectionError: there is no action server.
        """
        if self._goal is not None:
            change = abs(position - self._goal)
            if change == 0 or (position not in self._ends and change < CHANGE * abs(self._ends[1] - self._ends[0])):
                return
        if self._give({"command": {"position": position, "max_effort": self._effort}}):
            self._goal = position
        elif time.monotonic() > self._patient_until:
            raise ConnectionError(f"the gripper has no action server {self._action}: start its controller")

    def forget(self) -> None:
        """Send the next position in any case, because the gripper may have been moved in the meantime."""
        self._goal = None
