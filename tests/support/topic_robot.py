"""A robot of topics in this process: it sends what a test says, follows trajectories and remembers all commands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rclpy.serialization import deserialize_message

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.ros.messages import joint_state_fields, trajectory_of
from cogvla.real_robot.ros.network import RosSettings
from cogvla.real_robot.ros.node import COMPRESSED_IMAGE, IMAGE, JOINT_STATE, Delivery, Fields, stamp_of
from cogvla.real_robot.ros.rclpy_node import OwnNode, ros_type
from cogvla.real_robot.ros.topics import COMMANDS, RosTopics
from cogvla.tests.support.image_files import encoded
from cogvla.tests.support.ros_images import fields_of, one_colour
from cogvla.tests.support.trajectory_controller import TrajectoryController

PERIOD = 0.02
CLOCK = "rosgraph_msgs/msg/Clock"


class TopicRobot:
    """Joint states and images at 50 Hz. Use it as a context manager.

    Attributes:
        images: camera -> fields of its messages, without a header.
        now: clock of its stamps.
        clock_period: seconds between two messages of /clock; None for none.
        commands: (seconds since the epoch at which it was sent, message) of every command of the arm.
        sent: number of samples that it has sent.
        desired: (monotonic seconds, [D]) of the controller of its trajectories.
    """

    def __init__(self, topics: RosTopics, embodiment: Embodiment, domain: int) -> None:
        self.node = OwnNode("/robot", RosSettings(domain=domain))
        self._topics = topics
        self.images: dict[str, Fields] = {}
        self._cameras: dict[str, Callable[[Fields], None]] = {}
        for camera in embodiment.cameras:
            compressed = topics.cameras[camera.name].endswith("/compressed")
            kind = COMPRESSED_IMAGE if compressed else IMAGE
            self._cameras[camera.name] = self.node.advertise(topics.cameras[camera.name], kind, Delivery.SENSOR)
            rows = one_colour("rgb8", "grey", camera.height, camera.width)
            png = encoded(rows.reshape(camera.height, camera.width, 3), "PNG")
            raw = fields_of("rgb8", rows, camera.width)
            self.images[camera.name] = {"format": "png", "data": np.frombuffer(png, np.uint8)} if compressed else raw
        self._joints = self.node.advertise(topics.joint_states, JOINT_STATE, Delivery.SENSOR)
        self._clock = self.node.advertise("/clock", CLOCK, Delivery.EVENTS)
        self.now: Callable[[], float] = self.node.now
        self.clock_period: float | None = None
        self.state = np.zeros(embodiment.state_dim)
        self.controller = TrajectoryController(np.zeros(len(topics.command_joints or ())))
        self.commands: list[tuple[float, Any]] = []
        self.desired: list[tuple[float, np.ndarray]] = []
        self.node.subscribe_raw(topics.command, COMMANDS[topics.command_type], Delivery.COMMAND, self._command)
        self.sent = 0
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=do) for do in (self._sense, self._tick_clock)]

    def __enter__(self) -> TopicRobot:
        self.node.start()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self.node.close()

    def since(self, when: float) -> list[Any]:
        """Commands that were sent after a time in seconds since the epoch."""
        return [message for sent, message in list(self.commands) if sent > when]

    def _command(self, cdr: bytes, sent: float) -> None:
        message = deserialize_message(cdr, ros_type(COMMANDS[self._topics.command_type]))
        self.commands.append((sent, message))
        if self._topics.command_joints is not None:
            points_ND, times = trajectory_of(message, self._topics.command_joints)
            with self._lock:
                self.controller.take(times, points_ND, time.monotonic())

    def _sense(self) -> None:
        while not self._end.wait(PERIOD):
            with self._lock:
                at = time.monotonic()
                desired = self.controller.desired(at)
                self.desired.append((at, desired))
            state = self.state.copy()
            state[: len(desired)] = desired
            stamp = self.now()
            self._joints(joint_state_fields(dict(zip(self._topics.joints, state, strict=True)), stamp))
            for camera, send in self._cameras.items():
                send({"header": {"stamp": stamp_of(stamp)}, **self.images[camera]})
            self.sent += 1 + len(self._cameras)

    def _tick_clock(self) -> None:
        while not self._end.wait(self.clock_period or PERIOD):
            if self.clock_period is not None:
                self._clock({"clock": stamp_of(self.now())})


def speeds(desired: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """The speed of the fastest joint between each two of the samples."""
    times = np.array([at for at, _ in desired])
    values = np.array([value for _, value in desired])
    return np.abs(np.diff(values, axis=0)).max(axis=1) / np.diff(times)
