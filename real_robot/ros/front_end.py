"""A robot with ROS 2 topics as a `FrontEnd`, over any `RosNode`: the one behind `transport=dds` and behind rclpy.

    in    cameras (Image or CompressedImage), joint states, instruction
    out   commands (Float64MultiArray or JointTrajectory), in a dry run on ~/dry_run instead; /diagnostics
    ~/estop, ~/reset, ~/activate    as services (SetBool, Trigger, SetBool) and as topics (Bool, Empty, Bool)

Services of Cyclone DDS and of other middlewares do not reach each other; topics always do.

Shape legend: A action dimension, S state dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import Bridge
from cogvla.real_robot.control.observations import STATE
from cogvla.real_robot.ros.messages import (
    array_fields,
    compressed_image_of,
    diagnostics_fields,
    image_of,
    state_of,
    trajectory_fields,
)
from cogvla.real_robot.ros.node import (
    ARRAY,
    BOOL,
    COMPRESSED_IMAGE,
    DIAGNOSTICS,
    EMPTY,
    IMAGE,
    JOINT_STATE,
    SET_BOOL,
    STRING,
    TRAJECTORY,
    TRIGGER,
    Delivery,
    RosNode,
    seconds_of,
)

COMMANDS = {"array": ARRAY, "trajectory": TRAJECTORY}
STAMPS = ("header", "arrival")
DRIFT_S = 1e-3
"""Clocks that differ by more than before have drifted, or one was set."""


@dataclass(frozen=True)
class RosTopics:
    """Which topic is which part of an observation, and where commands go. The named ones: configs/topics/*.yaml.

    Attributes:
        cameras: camera of the embodiment -> topic; of a CompressedImage if it ends in `/compressed`.
        joint_states: topic of a JointState.
        joints: [S] name in the joint state of each entry of the embodiment's state.
        instruction: topic of a String: what to do; empty: hold.
        command: topic of the controller.
        command_type: "array", a Float64MultiArray with the action as it is; "trajectory", a JointTrajectory with one
            point, a control period ahead.
        command_joints: names in a trajectory, in the order of the action (without its gripper, if that goes apart).
        gripper: topic of a Float64MultiArray that gets the gripper's action alone; None: it is part of the command.
        stamps: "header", when the sensor says that it measured; "arrival", when the message came: for replays, and for
            drivers that do not fill in stamps.
    """

    cameras: Mapping[str, str]
    joint_states: str
    joints: tuple[str, ...]
    instruction: str
    command: str
    command_type: str = "array"
    command_joints: tuple[str, ...] | None = None
    gripper: str | None = None
    stamps: str = "header"

    def __post_init__(self) -> None:
        object.__setattr__(self, "joints", tuple(self.joints))
        if self.command_joints is not None:
            object.__setattr__(self, "command_joints", tuple(self.command_joints))
        if self.command_type not in COMMANDS:
            raise ValueError(f"topics.command_type must be one of {', '.join(COMMANDS)}, got {self.command_type!r}")
        if self.stamps not in STAMPS:
            raise ValueError(f"topics.stamps must be one of {', '.join(STAMPS)}, got {self.stamps!r}")
        if (self.command_type == "trajectory") != bool(self.command_joints):
            raise ValueError("topics.command_joints names the joints of a trajectory; an array has none")

    def check(self, embodiment: Embodiment) -> None:
        """ValueError unless these topics make up an observation and an action of this robot."""
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
        if self.gripper is not None and embodiment.gripper_index is None:
            raise ValueError(f"topics.gripper is given, but {embodiment.name!r} has no gripper_index; make it null")
        size = embodiment.action_dim - (self.gripper is not None)
        if self.command_joints is not None and len(self.command_joints) != size:
            raise ValueError(f"topics.command_joints names {len(self.command_joints)} joints, the command has {size}")


class RosFrontEnd:
    """See the module docstring.

    Args:
        node: not yet started, or already: either is fine.
        topics: checked against the embodiment here.
        embodiment: the bridge's.
    """

    def __init__(self, node: RosNode, topics: RosTopics, embodiment: Embodiment) -> None:
        topics.check(embodiment)
        self._node, self._topics = node, topics
        self._period_s = 1.0 / embodiment.control_hz
        self._gripper = embodiment.gripper_index if topics.gripper is not None else None
        self._arm = [i for i in range(embodiment.action_dim) if i != self._gripper]
        kind = COMMANDS[topics.command_type]
        self._command = node.advertise(topics.command, kind, Delivery.COMMAND)
        self._preview = node.advertise("~/dry_run", kind, Delivery.COMMAND)
        self._command_gripper = topics.gripper and node.advertise(topics.gripper, ARRAY, Delivery.COMMAND)
        self._diagnostics = node.advertise("/diagnostics", DIAGNOSTICS, Delivery.EVENTS)
        self._offset = ClockOffset()
        self._closed = False

    def start(self, bridge: Bridge) -> None:
        """Subscribe and serve."""
        node, topics = self._node, self._topics
        for camera, topic in topics.cameras.items():
            compressed = topic.endswith("/compressed")
            kind, read = (COMPRESSED_IMAGE, compressed_image_of) if compressed else (IMAGE, image_of)
            node.subscribe(topic, kind, Delivery.SENSOR, self._image(bridge, camera, read))
        node.subscribe(topics.joint_states, JOINT_STATE, Delivery.SENSOR, self._state(bridge))
        self._on(topics.instruction, STRING, lambda message: bridge.instruct(message.data), Delivery.LATCHED)
        self._on("~/estop", BOOL, lambda message: bridge.estop(message.data))
        self._on("~/reset", EMPTY, lambda _: bridge.reset())
        self._on("~/activate", BOOL, lambda message: bridge.activate(message.data))
        node.serve("~/estop", SET_BOOL, bridge.estop)
        node.serve("~/reset", TRIGGER, lambda _: bridge.reset())
        node.serve("~/activate", SET_BOOL, bridge.activate)

    def send(self, action_A: np.ndarray, dry_run: bool) -> None:
        """See `FrontEnd.send`."""
        arm_A = action_A[self._arm]
        if self._topics.command_joints is None:
            fields = array_fields(arm_A)
        else:
            fields = trajectory_fields(arm_A, self._topics.command_joints, self._period_s)
        if dry_run:
            self._preview(fields)
            return
        self._command(fields)
        if self._command_gripper:
            assert self._gripper is not None, "checked with the embodiment"
            self._command_gripper(array_fields(action_A[[self._gripper]]))

    def show(self, diagnostics: Mapping[str, Any]) -> None:
        """See `FrontEnd.show`."""
        self._diagnostics(diagnostics_fields(diagnostics, self._node.name, self._node.now()))

    def close(self) -> None:
        """The node belongs to whoever made it."""
        self._closed = True

    def _on(self, topic: str, kind: str, do: Callable[[Any], Any], delivery: Delivery = Delivery.EVENTS) -> None:
        def called(message: Any) -> None:
            if not self._closed:
                do(message)

        self._node.subscribe(topic, kind, delivery, called)

    def _image(self, bridge: Bridge, camera: str, read: Callable[[Any], np.ndarray]) -> Callable[[Any], None]:
        def take(message: Any) -> None:
            stamp = self._stamp(bridge, message)
            try:
                image_HW3 = read(message)
            except ValueError as error:
                bridge.refuse(camera, "unreadable", str(error))
            else:
                bridge.observe_image(camera, image_HW3, stamp)

        return take

    def _state(self, bridge: Bridge) -> Callable[[Any], None]:
        def take(message: Any) -> None:
            stamp = self._stamp(bridge, message)
            try:
                state_S = state_of(message, self._topics.joints)
            except ValueError as error:
                bridge.refuse(STATE, "unreadable", str(error))
            else:
                bridge.observe_state(state_S, stamp)

        return take

    def _stamp(self, bridge: Bridge, message: Any) -> float:
        """On the bridge's clock: now, less the sample's age on the ROS clock."""
        if self._topics.stamps == "arrival":
            return bridge.now()
        return seconds_of(message.header.stamp) + self._offset(bridge.now, self._node.now)


class ClockOffset:
    """Seconds from one clock to another. It stays as it is until the clocks drift, so that equal stamps stay equal."""

    def __init__(self) -> None:
        self._offset: float | None = None

    def __call__(self, to: Callable[[], float], of: Callable[[], float]) -> float:
        """What must be added to a time of the clock `of`."""
        offset = min((self._measured(to, of) for _ in range(3)), key=lambda measured: measured[1])[0]
        if self._offset is None or abs(offset - self._offset) > DRIFT_S:
            self._offset = offset
        return self._offset

    @staticmethod
    def _measured(to: Callable[[], float], of: Callable[[], float]) -> tuple[float, float]:
        """The offset, and how uncertain it is: another thread may have run between two readings."""
        before, other, after = to(), of(), to()
        return (before + after) / 2 - other, after - before
