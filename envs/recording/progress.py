"""Notice that a policy does not get on with its task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

STEP_AHEAD = 0.01
"""Metres by which the way must get shorter to count as progress: a hovering hand trembles by less."""
ANOTHER_PLACE = 0.05
"""Metres: a target or goal that moves further in one control step is another one, of the next subgoal."""


class Progress:
    """The way that is left: from the gripper to the target, and from there to the goal.

    Args:
        patience: control steps in which the way must get shorter than it has ever been.
    """

    def __init__(self, patience: int) -> None:
        self._patience, self._steps, self._shortest = patience, 0, np.inf
        self._before: Mapping[str, np.ndarray] = {}
        self.at_next = False
        """True if the last state begins the next subgoal: its target or goal is another one."""

    def stuck(self, gripper: np.ndarray, labels: Mapping[str, np.ndarray]) -> bool:
        """Take note of one more state; return True if there was no progress for as long as `patience`.

        Args:
            gripper: position of the gripper [3].
            labels: `target` and `goal` [3], as in `Labels`.
        """
        moved = [float(np.linalg.norm(labels[name] - at)) for name, at in self._before.items()]
        self._before = {name: np.array(labels[name]) for name in ("target", "goal")}
        self.at_next = max(moved, default=0.0) > ANOTHER_PLACE
        if self.at_next:
            self._shortest = np.inf
        left = float(np.linalg.norm(gripper - labels["target"]) + np.linalg.norm(labels["target"] - labels["goal"]))
        self._steps += 1
        if left < self._shortest - STEP_AHEAD:
            self._shortest, self._steps = left, 0
        return self._steps >= self._patience
