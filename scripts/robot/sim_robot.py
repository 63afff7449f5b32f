"""`sim_robot`: simulate the tabletop arm as a robot with ROS 2 topics.

    sim_robot
    sim_robot suite=tabletop_goal task=3 initial_state=7

It publishes cameras and joint states, as in configs/topics/tabletop.yaml, and

    ~/status    std_msgs/String, JSON: state of the scene (`SceneStatus`)

It takes commands (Float64MultiArray: 6 displacements and the gripper), and

    ~/scene     std_msgs/String, JSON: set up another scene (`SceneStart`)
    ~/fault     std_msgs/String, JSON: break a sensor (`SensorFaults`)

Ctrl-C ends it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.suite import get_suite
from cogvla.real_robot.ros.messages import compressed_image_fields, image_fields, joint_state_fields
from cogvla.real_robot.ros.node import ARRAY, COMPRESSED_IMAGE, IMAGE, JOINT_STATE, STRING, Delivery, RosNode
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.real_robot.simulated.sensor_faults import SensorFaults
from cogvla.real_robot.simulated.simulated_arm import SceneStart, SceneStatus, SimulatedArm
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain, stop_event
from cogvla.scripts.robot.robots import ros_node

_log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
    """Simulate until SIGINT, SIGTERM or SIGHUP."""
    stop = stop_event()
    import_modules(config.imports)
    topics = build(RosTopics, plain(config.topics), "topics")
    with ros_node(config.transport, config.node, plain(config.ros)) as node:
        robot = SimRobot(node, topics, config.suite, config.image_size, config.max_steps)
        robot.arm.set_scene(SceneStart(0, config.task, config.initial_state))
        print(f"{node.name} plays {config.suite}", flush=True)
        while not stop.is_set() and node.failure is None:
            robot.arm.step()
        robot.arm.close()
        if node.failure is not None:
            raise node.failure


class SimRobot:
    """Connects a `SimulatedArm` to topics.

    Args:
        node: running node of the topics.
        topics: topics of the robot.
        suite: name of a tabletop suite.
        image_size: side of the camera images, in pixels.
        max_steps: control steps until a scene ends; None: twice the suite's, because pauses count here.
    """

    def __init__(
        self, node: RosNode, topics: RosTopics, suite: str, image_size: int, max_steps: int | None = None
    ) -> None:
        self._node = node
        self._faults = SensorFaults()
        self._compressed = {camera: topic.endswith("/compressed") for camera, topic in topics.cameras.items()}
        self._cameras = {
            camera: node.advertise(topic, COMPRESSED_IMAGE if self._compressed[camera] else IMAGE, Delivery.SENSOR)
            for camera, topic in topics.cameras.items()
        }
        self._joint_states = node.advertise(topics.joint_states, JOINT_STATE, Delivery.SENSOR)
        self._status = node.advertise("~/status", STRING, Delivery.LATCHED)
        played = get_suite(suite)
        self.arm = SimulatedArm(
            played,
            image_size,
            2 * played.max_steps if max_steps is None else max_steps,
            self._show_joints,
            self._show_images,
            self._show_status,
        )
        node.subscribe(topics.command, ARRAY, Delivery.COMMAND, self._command)
        node.subscribe("~/scene", STRING, Delivery.EVENTS, self._scene)
        node.subscribe("~/fault", STRING, Delivery.EVENTS, self._fault)

    def _show_joints(self, joints: Mapping[str, float]) -> None:
        def send(values: Mapping[str, float], stamp: float) -> None:
            self._joint_states(joint_state_fields(values, stamp))

        self._faults.state(joints, self._node.now(), send)

    def _show_images(self, images: Mapping[str, np.ndarray], age_s: float) -> None:
        stamp = self._node.now() - age_s
        for camera, image_HW3 in images.items():
            self._faults.image(camera, image_HW3, stamp, partial(self._show_image, camera))

    def _show_image(self, camera: str, image_HW3: np.ndarray, stamp: float) -> None:
        fields = compressed_image_fields if self._compressed[camera] else image_fields
        self._cameras[camera](fields(image_HW3, stamp, camera))

    def _show_status(self, status: SceneStatus) -> None:
        self._status({"data": json.dumps(asdict(status))})

    # Wrong messages are logged and ignored.

    def _command(self, message: Any) -> None:
        try:
            self.arm.command(message.data)
        except ValueError as error:
            _log.warning("%s", error)

    def _scene(self, message: Any) -> None:
        try:
            self.arm.set_scene(SceneStart(**json.loads(message.data)))
        except (ValueError, TypeError) as error:
            _log.warning("no scene is set up: %s", error)

    def _fault(self, message: Any) -> None:
        try:
            self._faults = SensorFaults.from_json(message.data, self._cameras)
        except ValueError as error:
            _log.warning("%s", error)


if __name__ == "__main__":
    console.sim_robot()
