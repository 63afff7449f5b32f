"""Drive a robot over ROS 2 topics: a `FrontEnd` on any `RosNode`.

    in    cameras (Image or CompressedImage), joint states, instruction
    out   commands (Float64MultiArray, JointTrajectory or TwistStamped), in a dry run on ~/dry_run instead; /diagnostics
    ~/estop, ~/reset, ~/activate    as services (SetBool, Trigger, SetBool) and as topics (Bool, Empty, Bool)

Shape legend: A action dimension, S state dimension, G grippers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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
    twist_fields,
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
    TWIST,
    Answer,
    Delivery,
    RosNode,
    seconds_of,
)

COMMANDS = {"array": ARRAY, "trajectory": TRAJECTORY, "twist": TWIST}
STOP_PERIODS = 2.0
"""Control periods without a command after which a twist of zero stops the arm."""
STAMPS = ("header", "arrival")
DRIFT_S = 1e-3
"""Change of a clock offset, in seconds, from which on the clocks have drifted or one was set."""


@dataclass(frozen=True)
class RosTopics:
    """Topics of a robot: its sensors, its instruction and its controller. Ready-made ones: configs/topics/*.yaml.

    Attributes:
        cameras: camera of the embodiment -> topic with an Image, or a CompressedImage if it ends in `/compressed`.
        joint_states: topic with a JointState.
        joints: [S] joint names in the JointState, one per entry of the embodiment's state.
        instruction: topic with the instruction as a String; empty text holds the arm.
        command: topic of the controller.
        command_type: "array" (Float64MultiArray with the action), "trajectory" (JointTrajectory with one point) or
            "twist" (TwistStamped, for MoveIt Servo; the action is six displacements).
        point_periods: time until a trajectory's point is reached, in control periods. With 1 the controller has nothing
            left to do whenever the next command is a little late, and stops; a larger value is slower to follow.
        twist_scale: [6] twist of the action 1.0: m/s and rad/s, or shares of MoveIt Servo's own limits (`unitless`).
        twist_frame: frame of the twist.
        command_joints: joint names of a trajectory in the order of the action, without a gripper with its own topic.
        gripper: topic with a Float64MultiArray for the actions of all grippers; None: the command contains them.
        gripper_positions: what its topic gets for an open and a closed gripper; None: the action as it is.
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
    point_periods: float = 1.5
    twist_scale: tuple[float, ...] | None = None
    twist_frame: str = ""
    gripper_positions: tuple[float, ...] | None = None
    stamps: str = "header"

    def __post_init__(self) -> None:
        object.__setattr__(self, "joints", tuple(self.joints))
        if self.command_joints is not None:
            object.__setattr__(self, "command_joints", tuple(self.command_joints))
        for name, size in (("twist_scale", 6), ("gripper_positions", 2)):
            numbers = getattr(self, name)
            if numbers is not None:
                if len(numbers) != size or not np.isfinite(np.asarray(numbers, float)).all():
                    raise ValueError(f"topics.{name} must be {size} finite numbers, got {list(numbers)}")
                object.__setattr__(self, name, tuple(map(float, numbers)))
        if self.command_type not in COMMANDS:
            raise ValueError(f"topics.command_type must be one of {', '.join(COMMANDS)}, got {self.command_type!r}")
        if self.stamps not in STAMPS:
            raise ValueError(f"topics.stamps must be one of {', '.join(STAMPS)}, got {self.stamps!r}")
        if not 0 < self.point_periods <= 20:
            raise ValueError(f"topics.point_periods must be above 0 and at most 20, got {self.point_periods}")
        if (self.command_type == "twist") != (self.twist_scale is not None and bool(self.twist_frame)):
            raise ValueError("topics.twist_scale and twist_frame belong to command_type=twist, which needs both")
        if self.gripper_positions is not None and self.gripper is None:
            raise ValueError("topics.gripper_positions needs topics.gripper, the topic that gets them")
        if (self.command_type == "trajectory") != bool(self.command_joints):
            raise ValueError("topics.command_joints names the joints of a trajectory; other commands have none")

    def names(self, embodiment: Embodiment) -> dict[str, tuple[str, ...]]:
        """Return the names of the numbers in a recording's features; an array of commands has none."""
        action = list(self.command_joints or ())
        if action and self.gripper is not None:
            for number, index in enumerate(embodiment.grippers, 1):
                action.insert(index, "gripper" if len(embodiment.grippers) == 1 else f"gripper {number}")
        return {"observation.state": self.joints} | ({"action": tuple(action)} if action else {})

    def check(self, embodiment: Embodiment) -> None:
        """Raise ValueError if cameras, joints or commands do not match the embodiment."""
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
        if self.gripper is not None and not embodiment.grippers:
            raise ValueError(f"topics.gripper is given, but {embodiment.name!r} has no gripper_index; make it null")
        size = embodiment.action_dim - (0 if self.gripper is None else len(embodiment.grippers))
        if self.command_type == "twist" and size != 6:
            raise ValueError(
                f"a twist has 6 numbers, the command of {embodiment.name!r} has {size}: give topics.gripper"
            )
        if self.command_joints is not None and len(self.command_joints) != size:
            raise ValueError(f"topics.command_joints names {len(self.command_joints)} joints, the command has {size}")


class RosFrontEnd:
    """Front end of a robot with ROS 2 topics.

    Args:
        node: ROS 2 node, started or not.
        topics: topics of the robot; the constructor checks them against the embodiment.
        embodiment: embodiment of the bridge.
        orders: offer the operator's services and topics, see `offer_orders`.
    """

    def __init__(self, node: RosNode, topics: RosTopics, embodiment: Embodiment, orders: bool = True) -> None:
        topics.check(embodiment)
        self._node, self._topics, self._orders = node, topics, orders
        self._period_s = 1.0 / embodiment.control_hz
        self._grippers = list(embodiment.grippers) if topics.gripper is not None else []
        self._arm = [i for i in range(embodiment.action_dim) if i not in self._grippers]
        kind = COMMANDS[topics.command_type]
        self._command = node.advertise(topics.command, kind, Delivery.COMMAND)
        self._preview = node.advertise("~/dry_run", kind, Delivery.COMMAND)
        self._command_gripper = topics.gripper and node.advertise(topics.gripper, ARRAY, Delivery.COMMAND)
        self._diagnostics = node.advertise("/diagnostics", DIAGNOSTICS, Delivery.EVENTS)
        self._offset = ClockOffset()
        self._closed = False
        self._open_close = (embodiment.gripper_open, embodiment.gripper_close)
        self._sent, self._moving = threading.Event(), False
        self._stopping: threading.Thread | None = None

    def start(self, bridge: Bridge) -> None:
        """Subscribe to the topics and offer the services."""
        node, topics = self._node, self._topics
        for camera, topic in topics.cameras.items():
            compressed = topic.endswith("/compressed")
            kind, read = (COMPRESSED_IMAGE, compressed_image_of) if compressed else (IMAGE, image_of)
            node.subscribe(topic, kind, Delivery.SENSOR, self._image(bridge, camera, read))
        node.subscribe(topics.joint_states, JOINT_STATE, Delivery.SENSOR, self._state(bridge))
        for delivery in (Delivery.LATCHED, Delivery.EVENTS):  # a latched reader never hears a volatile writer
            node.subscribe(topics.instruction, STRING, delivery, self._instruction(bridge))
        if topics.command_type == "twist":
            self._stopping = threading.Thread(target=self._stop_when_silent, args=(bridge,), daemon=True)
            self._stopping.start()
        if self._orders:
            offer_orders(node, bridge, lambda: self._closed)

    def send(self, action_A: np.ndarray, dry_run: bool) -> None:
        """See `FrontEnd.send`."""
        fields = self._fields(action_A[self._arm])
        if dry_run:
            self._preview(fields)
            return
        self._command(fields)
        if self._command_gripper:
            self._command_gripper(array_fields(self._gripper_positions(action_A[self._grippers])))
        self._moving = True
        self._sent.set()

    def _fields(self, arm_A: np.ndarray) -> Mapping[str, Any]:
        topics = self._topics
        if topics.twist_scale is not None:
            return twist_fields(arm_A * np.array(topics.twist_scale), self._node.now(), topics.twist_frame)
        if topics.command_joints is not None:
            return trajectory_fields(arm_A, topics.command_joints, topics.point_periods * self._period_s)
        return array_fields(arm_A)

    def _gripper_positions(self, grip_G: np.ndarray) -> np.ndarray:
        if self._topics.gripper_positions is None:
            return grip_G
        opened, closed = self._open_close
        return np.interp((grip_G - opened) / (closed - opened), (0.0, 1.0), self._topics.gripper_positions)

    def _stop_when_silent(self, bridge: Bridge) -> None:
        """Send a twist of zero when commands stop, because a velocity goes on until something ends it."""
        try:
            while not self._closed or self._moving:
                self._sent.wait()
                if self._closed and not self._moving:
                    return
                while not self._closed and self._sent.wait(STOP_PERIODS * self._period_s):
                    self._sent.clear()
                self._moving = False
                self._command(self._fields(np.zeros(6)))
        except Exception as error:
            bridge.fail(error)

    def show(self, diagnostics: Mapping[str, Any]) -> None:
        """See `FrontEnd.show`."""
        self._diagnostics(diagnostics_fields(diagnostics, self._node.name, self._node.now()))

    def close(self) -> None:
        """Stop calling the bridge. The caller closes the node."""
        self._closed = True
        self._sent.set()
        if self._stopping is not None:
            self._stopping.join()

    def _instruction(self, bridge: Bridge) -> Callable[[Any], None]:
        def take(message: Any) -> None:
            if not self._closed:
                bridge.instruct(message.data)  # which ignores the same text again

        return take

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
        """Return a message's stamp on the bridge's clock: now minus the sample's age on the ROS clock."""
        if self._topics.stamps == "arrival":
            return bridge.now()
        return seconds_of(message.header.stamp) + self._offset(bridge.now, self._node.now)


class TakesOrders(Protocol):
    """Whoever obeys the operator: a `Bridge`, or the lifecycle node around it."""

    def estop(self, engaged: bool) -> Answer: ...

    def reset(self) -> Answer: ...

    def activate(self, active: bool) -> Answer: ...


def offer_orders(node: RosNode, orders: TakesOrders, closed: Callable[[], bool] = lambda: False) -> None:
    """Offer `~/estop`, `~/reset` and `~/activate` as services and as topics; the topics are ignored once `closed`."""

    def on(topic: str, kind: str, do: Callable[[Any], Any]) -> None:
        node.subscribe(topic, kind, Delivery.EVENTS, lambda message: None if closed() else do(message))

    on("~/estop", BOOL, lambda message: orders.estop(message.data))
    on("~/reset", EMPTY, lambda _: orders.reset())
    on("~/activate", BOOL, lambda message: orders.activate(message.data))
    node.serve("~/estop", SET_BOOL, orders.estop)
    node.serve("~/reset", TRIGGER, lambda _: orders.reset())
    node.serve("~/activate", SET_BOOL, orders.activate)


class ClockOffset:
    """Offset between two clocks in seconds. It stays constant until they drift, so that equal stamps stay equal."""

    def __init__(self) -> None:
        self._offset: float | None = None

    def __call__(self, to: Callable[[], float], of: Callable[[], float]) -> float:
        """Return the seconds to add to a time of the clock `of` to get a time of the clock `to`."""
        offset = min((self._measured(to, of) for _ in range(3)), key=lambda measured: measured[1])[0]
        if self._offset is None or abs(offset - self._offset) > DRIFT_S:
            self._offset = offset
        return self._offset

    @staticmethod
    def _measured(to: Callable[[], float], of: Callable[[], float]) -> tuple[float, float]:
        """Measure the offset and its uncertainty; another thread may run between two readings."""
        before, other, after = to(), of(), to()
        return (before + after) / 2 - other, after - before
