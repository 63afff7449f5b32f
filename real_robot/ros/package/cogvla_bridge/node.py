"""ROS 2 lifecycle node of the bridge: configure connects, activate starts the policy, deactivate stops it.

    unconfigured --configure--> inactive --activate--> active
         ^--------cleanup---------'  ^---deactivate------'

Cleanup disconnects. The logic is in `cogvla.real_robot.bridge.bridge.Bridge`; this file implements its `RosNode` with
rclpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rclpy
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rosidl_runtime_py.utilities import get_message, get_service

from cogvla.real_robot.bridge.bridge import Bridge
from cogvla.real_robot.ros.front_end import RosFrontEnd
from cogvla.real_robot.ros.node import TRIGGER, Answer, Delivery, Fields
from cogvla.real_robot.serving.reconnecting import ReconnectingClient
from cogvla_bridge.messages import fill
from cogvla_bridge.parameters import PARAMETERS, parts

DEPTH = {Delivery.SENSOR: 5, Delivery.EVENTS: 10}


def qos(delivery: Delivery) -> QoSProfile:
    """Return the QoS profile of rclpy for a delivery."""
    sensor, latched = delivery is Delivery.SENSOR, delivery is Delivery.LATCHED
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=DEPTH.get(delivery, 1),
        reliability=ReliabilityPolicy.BEST_EFFORT if sensor else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


class RclpyNode:
    """`RosNode` on a node of rclpy. `destroy` removes its subscriptions, publishers and services."""

    def __init__(self, node: LifecycleNode) -> None:
        self._node = node
        self._destroy: list[Callable[[], Any]] = []
        self.name = node.get_fully_qualified_name()

    def now(self) -> float:
        """Return the time of the ROS clock in seconds; simulated time if `use_sim_time` is set."""
        return self._node.get_clock().now().nanoseconds * 1e-9

    def subscribe(self, topic: str, kind: str, delivery: Delivery, callback: Callable[[Any], None]) -> None:
        """See `RosNode.subscribe`."""
        made = self._node.create_subscription(get_message(kind), topic, callback, qos(delivery))
        self._destroy.append(lambda: self._node.destroy_subscription(made))

    def advertise(self, topic: str, kind: str, delivery: Delivery) -> Callable[[Fields], None]:
        """See `RosNode.advertise`."""
        message = get_message(kind)
        made = self._node.create_publisher(message, topic, qos(delivery))
        self._destroy.append(lambda: self._node.destroy_publisher(made))
        return lambda fields: made.publish(fill(message(), fields, get_message))

    def serve(self, service: str, kind: str, callback: Callable[[bool], Answer]) -> None:
        """See `RosNode.serve`."""

        def answer(request: Any, response: Any) -> Any:
            response.success, response.message = callback(True if kind == TRIGGER else request.data)
            return response

        made = self._node.create_service(get_service(kind), service, answer)
        self._destroy.append(lambda: self._node.destroy_service(made))

    def destroy(self) -> None:
        """Remove all subscriptions, publishers and services."""
        while self._destroy:
            self._destroy.pop()()


class BridgeNode(LifecycleNode):
    """Lifecycle node of the bridge. The module docstring shows its states."""

    def __init__(self) -> None:
        super().__init__("cogvla_bridge")
        for name, (default, description) in PARAMETERS.items():
            self.declare_parameter(name, default, ParameterDescriptor(description=description))
        self._bridge: Bridge | None = None
        self._ros: RclpyNode | None = None

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Check the parameters and connect, without sending commands."""
        values = {name: self.get_parameter(name).value for name in PARAMETERS}
        try:
            made = parts(values)
        except (ValueError, TypeError, OSError) as error:
            self.get_logger().error(str(error))
            return TransitionCallbackReturn.FAILURE
        self._ros = RclpyNode(self)
        front_end = RosFrontEnd(self._ros, made.topics, made.embodiment)
        client = ReconnectingClient(values["server"], made.client)
        self._bridge = Bridge(made.robot, made.embodiment, client, front_end, made.settings).start()
        if values["instruction"]:
            self._bridge.instruct(values["instruction"])
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let the policy act; fail until a fault is reset."""
        assert self._bridge is not None, "configured"
        done, message = self._bridge.activate()
        if not done:
            self.get_logger().error(message)
            return TransitionCallbackReturn.FAILURE
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop sending commands."""
        assert self._bridge is not None, "configured"
        self._bridge.activate(False)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Disconnect."""
        self.disconnect()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Disconnect."""
        self.disconnect()
        return TransitionCallbackReturn.SUCCESS

    def disconnect(self) -> None:
        """Stop sending commands and disconnect."""
        if self._bridge is not None:
            self._bridge.close()
        if self._ros is not None:
            self._ros.destroy()
        self._bridge = self._ros = None


def main(arguments: list[str] | None = None) -> None:
    """Console entry point."""
    rclpy.init(args=arguments)
    node = BridgeNode()
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        node.get_logger().info("stopped")
    finally:
        node.disconnect()
        node.destroy_node()
        rclpy.try_shutdown()
