"""Topics of a robot: where its sensors, its instruction and its controllers are, and what they take. Needs no ROS 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.control.settings import SafetyLimits
from cogvla.real_robot.ros.node import ARRAY, TRAJECTORY, TWIST, resolve

COMMANDS = {"array": ARRAY, "trajectory": TRAJECTORY, "twist": TWIST}
KINDS = {"trajectory": "absolute", "twist": "delta"}
"""Type of command -> `SafetyLimits.kind` of the actions that it can express."""
STAMPS = ("header", "arrival")
POINTS = ("next", "chunk")
GRIPPERS = ("array", "GripperCommand")


@dataclass(frozen=True)
class RosTopics:
    """Topics of a robot: its sensors, its instruction and its controller. Ready-made ones: configs/topics/*.yaml.

    Attributes:
        cameras: camera of the embodiment -> topic with an Image, or a CompressedImage if it ends in `/compressed`.
        joint_states: topic with a JointState.
        joints: [S] joint names in the JointState, one per entry of the embodiment's state.
        instruction: topic with the instruction as a String; empty text holds the arm.
        command: topic of the controller.
        command_type: "array" (Float64MultiArray with the action), "trajectory" (JointTrajectory) or "twist"
            (TwistStamped, for MoveIt Servo; the action is six displacements).
        points: points of a trajectory: "next" (the command of this tick, sent in each tick) or "chunk" (all that are
            known, sent when they change).
        point_periods: time until a trajectory's first point is reached, in control periods. With 1 and one point, the
            controller has nothing left to do whenever the next command is a little late, and stops; a larger value is
            slower to follow.
        twist_scale: [6] twist of the action 1.0: m/s and rad/s, or shares of MoveIt Servo's own limits (`unitless`).
        twist_frame: frame of the twist.
        command_joints: joint names of a trajectory in the order of the action, without a gripper with its own topic.
        gripper: topic or action of the controller of the gripper (of all grippers); None: the command contains them.
        gripper_type: "array" (Float64MultiArray with the action, in each tick) or "GripperCommand" (a goal of this
            action whenever the gripper has to move; for one gripper, with `gripper_positions`).
        gripper_effort: highest effort of such a goal; 0 leaves it to the gripper's controller.
        gripper_positions: what the controller gets for an open and a closed gripper; None: the action as it is.
        stamps: "header": the sensor's own time stamps; "arrival": the time of arrival.
            Use "arrival" for replays and for drivers that do not set time stamps.
    """

    cameras: Mapping[str, str]
    joint_states: str
    joints: tuple[str, ...]
    instruction: str
    command: str
    command_type: str = "array"
    command_joints: tuple[str, ...] | None = None
    gripper: str | None = None
    gripper_type: str = "array"
    gripper_effort: float = 0.0
    points: str = "next"
    point_periods: float = 1.5
    twist_scale: tuple[float, ...] | None = None
    twist_frame: str = ""
    gripper_positions: tuple[float, ...] | None = None
    stamps: str = "header"

    def __post_init__(self) -> None:
        self._check_names()
        for name, size in (("twist_scale", 6), ("gripper_positions", 2)):
            numbers = getattr(self, name)
            if numbers is not None:
                if not _is_list(numbers) or len(numbers) != size or not all(map(_is_number, numbers)):
                    raise ValueError(f"topics.{name} must be {size} finite numbers, got {numbers!r}")
                object.__setattr__(self, name, tuple(map(float, numbers)))
        allowed: dict[str, tuple[str, ...]] = {
            "command_type": tuple(COMMANDS),
            "gripper_type": GRIPPERS,
            "points": POINTS,
            "stamps": STAMPS,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"topics.{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if not _is_number(self.point_periods) or not 0 < self.point_periods <= 20:
            raise ValueError(f"topics.point_periods must be above 0 and at most 20, got {self.point_periods!r}")
        if (self.command_type == "twist") != (self.twist_scale is not None and bool(self.twist_frame)):
            raise ValueError("topics.twist_scale and twist_frame belong to command_type=twist, which needs both")
        if self.gripper_positions is not None and self.gripper_positions[0] == self.gripper_positions[1]:
            raise ValueError(f"topics.gripper_positions must be two different numbers, got {self.gripper_positions}")
        if not _is_number(self.gripper_effort) or self.gripper_effort < 0:
            raise ValueError(f"topics.gripper_effort must be 0 or more, got {self.gripper_effort!r}")
        if self.gripper_type == "GripperCommand" and (self.gripper is None or self.gripper_positions is None):
            raise ValueError("topics.gripper_type=GripperCommand needs gripper, an action, and gripper_positions")
        if self.gripper_effort and self.gripper_type != "GripperCommand":
            raise ValueError("topics.gripper_effort belongs to gripper_type=GripperCommand")
        if (self.command_type == "trajectory") != bool(self.command_joints):
            raise ValueError("topics.command_joints names the joints of a trajectory; other commands have none")
        if self.points == "chunk" and self.command_type != "trajectory":
            raise ValueError("topics.points=chunk needs command_type=trajectory; other commands have one point")

    def _check_names(self) -> None:
        if not isinstance(self.cameras, Mapping):
            raise ValueError(f"topics.cameras must be a mapping of cameras to topics, got {self.cameras!r}")
        topics = {f"cameras.{camera}": topic for camera, topic in self.cameras.items()}
        topics |= {name: getattr(self, name) for name in ("joint_states", "instruction", "command")}
        topics |= {} if self.gripper is None else {"gripper": self.gripper}
        used: dict[str, str] = {}
        for name, topic in topics.items():
            try:
                full = resolve(topic, "/node")
            except ValueError as error:
                raise ValueError(f"topics.{name}: {error}") from None
            if full in used:
                raise ValueError(f"topics.{name} and topics.{used[full]} are the same topic, {topic}")
            used[full] = name
        for name in ("joints", "command_joints"):
            joints = getattr(self, name)
            if joints is None and name == "command_joints":
                continue
            if not _is_list(joints) or not all(isinstance(joint, str) and joint for joint in joints):
                raise ValueError(f"topics.{name} must be a list of names, got {joints!r}")
            if twice := sorted({joint for joint in joints if joints.count(joint) > 1}):
                raise ValueError(f"topics.{name} names {', '.join(twice)} twice")
            object.__setattr__(self, name, tuple(joints))
        if not isinstance(self.twist_frame, str):
            raise ValueError(f"topics.twist_frame must be the name of a frame, got {self.twist_frame!r}")

    def names(self, embodiment: Embodiment) -> dict[str, tuple[str, ...]]:
        """Return the names of the numbers in a recording's features; an array of commands has none."""
        action = list(self.command_joints or ())
        if action and self.gripper is not None:
            for number, index in enumerate(embodiment.grippers, 1):
                action.insert(index, "gripper" if len(embodiment.grippers) == 1 else f"gripper {number}")
        return {"observation.state": self.joints} | ({"action": tuple(action)} if action else {})

    def check(self, embodiment: Embodiment, limits: SafetyLimits) -> None:
        """Raise ValueError if cameras, joints or commands do not match the embodiment or the limits of its actions."""
        if set(self.cameras) != set(embodiment.camera_names):
            raise ValueError(
                f"topics.cameras has {sorted(self.cameras)}, embodiment {embodiment.name!r} has "
                f"{sorted(embodiment.camera_names)}: give a topic for each"
            )
        if len(self.joints) != embodiment.state_dim:
            raise ValueError(
                f"topics.joints names {len(self.joints)} joints, the state of {embodiment.name!r} has "
                f"{embodiment.state_dim} entries"
            )
        for name in ("gripper", "gripper_positions"):
            if getattr(self, name) is not None and not embodiment.grippers:
                raise ValueError(f"topics.{name} is given, but {embodiment.name!r} has no gripper_index; make it null")
        if self.gripper_type == "GripperCommand" and len(embodiment.grippers) != 1:
            raise ValueError(
                f"topics.gripper_type=GripperCommand has one position, {embodiment.name!r} has "
                f"{len(embodiment.grippers)} grippers: use array"
            )
        size = embodiment.action_dim - (0 if self.gripper is None else len(embodiment.grippers))
        if self.command_type == "twist" and size != 6:
            raise ValueError(
                f"a twist has 6 numbers, the command of {embodiment.name!r} has {size}: give topics.gripper"
            )
        if self.command_joints is not None and len(self.command_joints) != size:
            raise ValueError(f"topics.command_joints names {len(self.command_joints)} joints, the command has {size}")
        if KINDS.get(self.command_type, limits.kind) != limits.kind:
            raise ValueError(
                f"topics.command_type={self.command_type} needs {KINDS[self.command_type]} actions, the robot's "
                f"limits.kind is {limits.kind}"
            )
        limits.check_names(embodiment, self.joints, self.names(embodiment).get("action", ()))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
