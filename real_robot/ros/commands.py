"""Convert actions to the messages of a robot's controllers, and back. Needs no ROS 2.

Shape legend: A action dimension, D numbers of the arm's command (the action without grippers with their own topic),
G grippers with their own topic, N ticks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.ros.messages import array_fields, trajectory_fields, trajectory_of, twist_fields, twist_of
from cogvla.real_robot.ros.node import Fields
from cogvla.real_robot.ros.topics import RosTopics


class Commands:
    """Messages of the commands to one robot.

    Args:
        topics: topics of the robot, checked against the embodiment.
        embodiment: sizes and grippers of the action.
    """

    def __init__(self, topics: RosTopics, embodiment: Embodiment) -> None:
        self._topics = topics
        self._period_s = 1.0 / embodiment.control_hz
        self._grippers = list(embodiment.grippers) if topics.gripper is not None else []
        self._arm = [i for i in range(embodiment.action_dim) if i not in self._grippers]
        self._scaled = [] if topics.gripper_positions is None else list(embodiment.grippers)
        self._open_close = (embodiment.gripper_open, embodiment.gripper_close)
        self._size = embodiment.action_dim

    def after_s(self, number: int) -> float:
        """Return the seconds from now in which the controller reaches the point of a trajectory."""
        return (self._topics.point_periods + number) * self._period_s

    def arm(self, actions_NA: np.ndarray, stamp: float, first_s: float | None = None) -> Fields:
        """Return the message of actions [N,A] of this tick and the following ones; N is 1 without trajectories.

        Args:
            actions_NA: the actions.
            stamp: now, on the ROS clock.
            first_s: seconds until the first point of a trajectory is reached; None: as the topics say.
        """
        topics = self._topics
        arm_ND = self._with_positions(actions_NA)[:, self._arm]
        if topics.command_joints is not None:
            first_s = self.after_s(0) if first_s is None else first_s
            times = [first_s + i * self._period_s for i in range(len(arm_ND))]
            return trajectory_fields(arm_ND, topics.command_joints, times)
        assert len(arm_ND) == 1, "only trajectories hold several actions"
        if topics.twist_scale is not None:
            return twist_fields(arm_ND[0] * np.array(topics.twist_scale), stamp, topics.twist_frame)
        return array_fields(arm_ND[0])

    def grippers(self, action_A: np.ndarray) -> Fields:
        """Return the message to the topic of the grippers."""
        return array_fields(self._with_positions(action_A[None])[0, self._grippers])

    def gripper(self, action_A: np.ndarray) -> float:
        """Return the position of the only gripper."""
        return float(self._with_positions(action_A[None])[0, self._grippers[0]])

    def rest(self) -> np.ndarray:
        """Return the action [A] of displacements that does not move the arm."""
        return np.zeros(self._size)

    def arm_of(self, message: Any) -> np.ndarray:
        """Return the numbers [N,D] of the arm's command in the units of the action; the inverse of `arm`.

        Raises:
            ValueError: the message does not hold them.
        """
        topics = self._topics
        if topics.command_joints is not None:
            arm_ND, times_N = trajectory_of(message, topics.command_joints)
            if topics.points == "next":
                arm_ND = arm_ND[:1]
            elif (np.abs(np.diff(times_N) - self._period_s) > self._period_s / 4).any():
                raise ValueError(f"the points of a trajectory must be {self._period_s:g} s apart, the control period")
        elif topics.twist_scale is not None:
            scale = np.array(topics.twist_scale)  # 0 for a direction that is switched off
            arm_ND = np.divide(twist_of(message), scale, out=np.zeros(6), where=scale != 0)[None]
        else:
            arm_ND = np.asarray(message.data, float)[None]
        if arm_ND.shape[1] != len(self._arm):
            raise ValueError(f"the command has {arm_ND.shape[1]} numbers, it should have {len(self._arm)}")
        return self._as_actions(arm_ND, self._arm)

    def grippers_of(self, message: Any) -> np.ndarray:
        """Return the actions [G] of the grippers; the inverse of `grippers`. ValueError if there are others."""
        grip_G = np.asarray(message.data, float)
        if grip_G.shape != (len(self._grippers),):
            raise ValueError(f"the command has {grip_G.size} numbers, there are {len(self._grippers)} grippers")
        return self._as_actions(grip_G[None], self._grippers)[0]

    def action(self, arm_D: np.ndarray, grip_G: np.ndarray | None) -> np.ndarray:
        """Return the action [A] of the arm's numbers and those of the grippers with their own topic."""
        action_A = np.empty(self._size)
        action_A[self._arm] = arm_D
        if grip_G is not None:
            action_A[self._grippers] = grip_G
        return action_A

    def _with_positions(self, actions_NA: np.ndarray) -> np.ndarray:
        positions = self._topics.gripper_positions
        if positions is None:
            return actions_NA
        scaled_NA = actions_NA.astype(float)
        scaled_NA[:, self._scaled] = _mapped(scaled_NA[:, self._scaled], self._open_close, positions)
        return scaled_NA

    def _as_actions(self, values_ND: np.ndarray, of: list[int]) -> np.ndarray:
        """Scale the positions of grippers back; `of` are the indices of the columns in the action."""
        positions = self._topics.gripper_positions
        columns = [column for column, index in enumerate(of) if index in self._scaled]
        if positions is not None and columns:
            values_ND = values_ND.copy()
            values_ND[:, columns] = _mapped(values_ND[:, columns], positions, self._open_close)
        return values_ND


def _mapped(values: np.ndarray, before: tuple[float, ...], after: tuple[float, ...]) -> np.ndarray:
    """Map the values of `before`, for an open and a closed gripper, to those of `after`."""
    share = np.clip((values - before[0]) / (before[1] - before[0]), 0.0, 1.0)
    return (1.0 - share) * after[0] + share * after[1]  # exact at both ends
