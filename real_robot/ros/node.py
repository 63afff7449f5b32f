"""What the robot's front end needs of a ROS 2 node, whoever provides it: `dds.DdsNode`, or rclpy in `package/`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol

Fields = Mapping[str, Any]
"""Field name -> value of a message; nested messages are mappings, too; what is left out is zero, empty or false."""
Answer = tuple[bool, str]
"""`success` and `message` of a service's response."""

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
JOINT_STATE = "sensor_msgs/msg/JointState"
STRING = "std_msgs/msg/String"
BOOL = "std_msgs/msg/Bool"
EMPTY = "std_msgs/msg/Empty"
ARRAY = "std_msgs/msg/Float64MultiArray"
TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"
SET_BOOL = "std_srvs/srv/SetBool"
TRIGGER = "std_srvs/srv/Trigger"


class Delivery(Enum):
    """The four ways in which messages are delivered here; a best-effort writer never reaches a reliable reader."""

    SENSOR = "best effort, volatile, keep last 5"
    COMMAND = "reliable, volatile, keep last 1"
    LATCHED = "reliable, transient local, keep last 1"
    EVENTS = "reliable, volatile, keep last 10"


class RosNode(Protocol):
    """Callbacks come from threads of the node, one at a time per topic or service."""

    @property
    def name(self) -> str:
        """Fully qualified, such as `/cogvla_bridge`; what `~` stands for."""
        ...

    def now(self) -> float:
        """Seconds of the ROS clock, which stamps messages: the system's clock."""
        ...

    def subscribe(self, topic: str, kind: str, delivery: Delivery, callback: Callable[[Any], None]) -> None:
        """Call back with every message of a topic; messages have their fields as attributes."""
        ...

    def advertise(self, topic: str, kind: str, delivery: Delivery) -> Callable[[Fields], None]:
        """What publishes a message of these fields."""
        ...

    def serve(self, service: str, kind: str, callback: Callable[[bool], Answer]) -> None:
        """Answer a `SET_BOOL` or `TRIGGER` service; the callback is given `data` (True for a trigger)."""
        ...


def resolve(name: str, node: str) -> str:
    """A topic's full name: `~/x` is below the node, `x` is `/x`."""
    if name.startswith("~"):
        return node + name[1:]
    return name if name.startswith("/") else "/" + name


def stamp_of(seconds: float) -> Fields:
    """A time as `builtin_interfaces/msg/Time`."""
    whole = math.floor(seconds)  # apart, because all of it in nanoseconds is more than a float holds
    carry, nanosec = divmod(round((seconds - whole) * 1e9), 10**9)
    return {"sec": whole + carry, "nanosec": nanosec}


def seconds_of(stamp: Any) -> float:
    """The inverse of `stamp_of`, of a message."""
    return stamp.sec + stamp.nanosec * 1e-9
