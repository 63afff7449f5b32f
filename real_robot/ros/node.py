"""Interface of a ROS 2 node as the front end needs it; implemented with rclpy in `rclpy_node.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol

Fields = Mapping[str, Any]
"""Field name -> value of a message. Nested messages are mappings; missing fields are zero, empty or false."""
Answer = tuple[bool, str]
"""`success` and `message` of a service's response."""

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
JOINT_STATE = "sensor_msgs/msg/JointState"
STRING = "std_msgs/msg/String"
BOOL = "std_msgs/msg/Bool"
EMPTY = "std_msgs/msg/Empty"
ARRAY = "std_msgs/msg/Float64MultiArray"
TWIST = "geometry_msgs/msg/TwistStamped"
TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
GRIPPER_COMMAND = "control_msgs/action/GripperCommand"
DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"
SET_BOOL = "std_srvs/srv/SetBool"
TRIGGER = "std_srvs/srv/Trigger"
_NAME = re.compile(r"(/[A-Za-z_][A-Za-z0-9_]*)+")


class Delivery(Enum):
    """Quality of service of a topic. A best-effort writer never reaches a reliable reader."""

    SENSOR = "best effort, volatile, keep last 5"
    COMMAND = "reliable, volatile, keep last 1"
    LATCHED = "reliable, transient local, keep last 1"
    EVENTS = "reliable, volatile, keep last 10"


class RosNode(Protocol):
    """Interface of a ROS 2 node. Its own threads make the callbacks, one at a time per topic or service."""

    @property
    def name(self) -> str:
        """Fully qualified name, such as `/cogvla_bridge`; `~` in a topic stands for it."""
        ...

    def now(self) -> float:
        """Return the time of the ROS clock, which stamps messages, in seconds."""
        ...

    def subscribe(self, topic: str, kind: str, delivery: Delivery, callback: Callable[[Any], None]) -> None:
        """Call back with every message of a topic; messages have their fields as attributes."""
        ...

    def advertise(self, topic: str, kind: str, delivery: Delivery) -> Callable[[Fields], None]:
        """Return a function that publishes a message with the given fields."""
        ...

    def pursue(self, action: str, kind: str, refused: Callable[[Fields], None]) -> Callable[[Fields], bool]:
        """Return a function that gives an action server a goal: False if there is no server.

        `refused` is called back with a goal that the server does not accept.
        """
        ...

    def serve(self, service: str, kind: str, callback: Callable[[bool], Answer]) -> None:
        """Offer a `SET_BOOL` or `TRIGGER` service; the callback receives `data` (True for a trigger)."""
        ...

    def on_failure(self, call: Callable[[BaseException], Any]) -> None:
        """Call back with the first exception of a callback or a thread of the node, also with one before this call."""
        ...


def resolve(name: str, node: str) -> str:
    """Return the full name of a topic or service: `~/x` is below the node, `x` is `/x`.

    Raises:
        ValueError: ROS 2 does not allow the name.
    """
    if isinstance(name, str):
        full = node + name[1:] if name.startswith("~") else name if name.startswith("/") else "/" + name
        if _NAME.fullmatch(full) and "__" not in full:
            return full
    raise ValueError(f"{name!r} is no name of a topic or service: use letters, digits, _ and /")


def stamp_of(seconds: float) -> Fields:
    """Convert a time in seconds to the fields of `builtin_interfaces/msg/Time`."""
    whole = math.floor(seconds)  # separate, because a float cannot hold such a time in nanoseconds exactly
    carry, nanosec = divmod(round((seconds - whole) * 1e9), 10**9)
    return {"sec": whole + carry, "nanosec": nanosec}


def seconds_of(stamp: Any) -> float:
    """Convert a `builtin_interfaces/msg/Time` message to seconds."""
    return stamp.sec + stamp.nanosec * 1e-9
