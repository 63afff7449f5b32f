"""`RosNode` with rclpy. Only this file and `lifecycle_node.py` import ROS 2.

`RclpyNode` works on any node, such as the lifecycle node. `OwnNode` is a whole node for a command, with a thread.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, Self

import numpy as np
import rclpy
from rclpy.action import ActionClient
from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from rclpy.exceptions import NameValidationException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from cogvla.real_robot.ros.network import RosSettings, environment
from cogvla.real_robot.ros.node import TRIGGER, Answer, Delivery, Fields, resolve
from cogvla.real_robot.ros.stepping_clock import SteppingClock

_log = logging.getLogger(__name__)
_DEPTH = {Delivery.SENSOR: 5, Delivery.EVENTS: 10}
_ELEMENT = re.compile(r"sequence<(\w+)/(\w+)(?:, \d+)?>")
REPEAT_S = 3.0
"""Seconds after which a call without an answer is repeated."""
SPIN_S = 0.5
"""Longest wait of the thread for something to do, in seconds; it then looks whether it is to end."""


class RclpyNode:
    """`RosNode` on a node of rclpy. `destroy` removes its subscriptions, publishers, services and clients.

    Args:
        node: node of rclpy; its executor makes the callbacks.

    Attributes:
        failure: first exception of a callback or of the thread that makes them, or None.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._on_failure: Callable[[BaseException], Any] = lambda _: None
        self._destroy: list[Callable[[], Any]] = []
        self._clients: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self._stepping = SteppingClock()
        every = JumpThreshold(min_forward=Duration(nanoseconds=1), min_backward=Duration(nanoseconds=-1))
        self._jumps = node.get_clock().create_jump_callback(
            every, post_callback=lambda _: self._stepping.step(self._clock_s(), time.monotonic())
        )

    @property
    def name(self) -> str:
        return str(self._node.get_fully_qualified_name())

    def now(self) -> float:
        """Return the time of the ROS clock in seconds; with `use_sim_time` the simulation's, see `SteppingClock`."""
        return self._stepping.now(self._clock_s(), time.monotonic())

    def subscribe(self, topic: str, kind: str, delivery: Delivery, callback: Callable[[Any], None]) -> None:
        """See `RosNode.subscribe`."""
        self._subscribe(topic, kind, delivery, lambda message: self._guarded(callback, message))

    def advertise(self, topic: str, kind: str, delivery: Delivery) -> Callable[[Fields], None]:
        """See `RosNode.advertise`."""
        made, publish = ros_type(kind), self._publisher(topic, kind, delivery)
        return lambda fields: publish(fill(made(), fields))

    def pursue(self, action: str, kind: str, refused: Callable[[Fields], None]) -> Callable[[Fields], bool]:
        """See `RosNode.pursue`."""
        made, client = ros_type(kind), ActionClient(self._node, ros_type(kind), resolve(action, self.name))
        self._destroy.append(client.destroy)

        def give(fields: Fields) -> bool:
            if not client.server_is_ready():
                return False
            answer = client.send_goal_async(fill(made.Goal(), fields))
            answer.add_done_callback(lambda done: None if done.result().accepted else self._guarded(refused, fields))
            return True

        return give

    def serve(self, service: str, kind: str, callback: Callable[[bool], Answer]) -> None:
        """See `RosNode.serve`."""

        def answer(request: Any, response: Any) -> Any:
            def ask() -> None:
                response.success, response.message = callback(True if kind == TRIGGER else request.data)

            self._guarded(ask)
            return response

        name = resolve(service, self.name)
        made = self._node.create_service(ros_type(kind), name, answer)
        self._destroy.append(lambda: self._node.destroy_service(made))

    def on_failure(self, call: Callable[[BaseException], Any]) -> None:
        """See `RosNode.on_failure`."""
        self._on_failure = call
        if self.failure is not None:
            call(self.failure)

    # --- further methods for operators and tests ----------------------------------------------------------------------

    def advertise_raw(self, topic: str, kind: str, delivery: Delivery) -> Callable[[bytes], None]:
        """Return a function that publishes serialised messages, such as those of a bag."""
        return self._publisher(topic, kind, delivery)

    def heard(self, topic: str) -> bool:
        """Return whether another node's subscription has found this node's publisher of a topic."""
        name = resolve(topic, self.name)
        return any(made.topic_name == name and made.get_subscription_count() > 0 for made in self._node.publishers)

    def subscribe_raw(
        self, topic: str, kind: str, delivery: Delivery, callback: Callable[[bytes, float], None]
    ) -> None:
        """Subscribe to serialised messages; the callback also gets the computer's time of sending, in seconds."""

        def called(cdr: bytes, info: Mapping[str, Any]) -> None:
            self._guarded(callback, cdr, info["source_timestamp"] * 1e-9)

        self._subscribe(topic, kind, delivery, called, raw=True)

    def request(self, service: str, kind: str, fields: Fields, timeout_s: float = 5.0) -> Any:
        """Call a service of another node from another thread than the executor's, and return its response.

        Raises:
            TimeoutError: no answer in time.
        """
        client, done = self.client(service, kind), threading.Event()
        if not client.wait_for_service(timeout_s):
            raise TimeoutError(f"{service} did not appear within {timeout_s:g} s")
        future = client.call_async(fill(ros_type(kind).Request(), fields))
        future.add_done_callback(lambda _: done.set())
        if not done.wait(timeout_s):
            client.remove_pending_request(future)
            raise TimeoutError(f"{service} did not answer within {timeout_s:g} s")
        return future.result()

    def client(self, service: str, kind: str) -> Any:
        """Return the client of a service, made by the first call."""
        name = resolve(service, self.name)
        if name not in self._clients:
            made = self._clients[name] = self._node.create_client(ros_type(kind), name)
            self._destroy.append(lambda: self._node.destroy_client(made))
        return self._clients[name]

    def call(self, service: str, kind: str, data: bool = True, timeout_s: float = 5.0) -> Answer:
        """Call a `SET_BOOL` or `TRIGGER` service of another node, see `request`.

        The call is repeated, because a service that does not know its client yet acts, but its answer is lost.
        """
        last = time.monotonic() + timeout_s
        while True:
            try:
                answer = self.request(
                    service, kind, {} if kind == TRIGGER else {"data": data}, min(timeout_s, REPEAT_S)
                )
                return answer.success, answer.message
            except TimeoutError:
                if time.monotonic() > last:
                    raise

    def destroy(self) -> None:
        """Remove all subscriptions, publishers and services."""
        self._jumps.unregister()
        self._clients.clear()
        while self._destroy:
            self._destroy.pop()()

    def _clock_s(self) -> float:
        return float(self._node.get_clock().now().nanoseconds * 1e-9)

    # --- internals ----------------------------------------------------------------------------------------------------

    def _subscribe(
        self, topic: str, kind: str, delivery: Delivery, callback: Callable[..., None], raw: bool = False
    ) -> None:
        made = self._node.create_subscription(
            ros_type(kind), resolve(topic, self.name), callback, qos(delivery), raw=raw
        )
        self._destroy.append(lambda: self._node.destroy_subscription(made))

    def _publisher(self, topic: str, kind: str, delivery: Delivery) -> Callable[[Any], None]:
        made = self._node.create_publisher(ros_type(kind), resolve(topic, self.name), qos(delivery))
        self._destroy.append(lambda: self._node.destroy_publisher(made))
        publish: Callable[[Any], None] = made.publish
        return publish

    def _guarded(self, callback: Callable[..., Any], *arguments: Any) -> None:
        """Call back. An exception must not end the executor, which also hears the emergency stop."""
        try:
            callback(*arguments)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            _log.error("%s has failed", self.name, exc_info=error)
            self._on_failure(error)


class OwnNode(RclpyNode):
    """Node with a context and a thread of its own, which makes all callbacks. Use it as a context manager.

    Args:
        name: fully qualified name, such as `/cogvla_bridge`.
        settings: network and clock; None for the defaults, which reach this machine only.

    Raises:
        ValueError: ROS 2 does not allow the name.
    """

    def __init__(self, name: str, settings: RosSettings | None = None) -> None:
        settings = settings or RosSettings()
        namespace, _, short = name.rpartition("/")
        self._context = rclpy.Context()
        with environment(settings):
            rclpy.init(
                args=[],
                context=self._context,
                domain_id=settings.domain,
                signal_handler_options=SignalHandlerOptions.NO,
            )
            try:
                node = rclpy.create_node(
                    short,
                    namespace=namespace or "/",
                    context=self._context,
                    use_global_arguments=False,
                    parameter_overrides=[Parameter("use_sim_time", value=settings.sim_time)],
                )
            except NameValidationException as error:
                self._context.try_shutdown()
                raise ValueError(f"node={name} is no name of a node: use letters, digits, _ and /") from error
        super().__init__(node)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(node)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._spin, name=f"ros {name}", daemon=True)

    def start(self) -> Self:
        """Start the callbacks."""
        self._thread.start()
        return self

    def close(self) -> None:
        """End the callbacks and leave the network."""
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._executor.wake()
            self._thread.join()
        self._executor.shutdown()
        self.destroy()
        self._node.destroy_node()
        self._context.try_shutdown()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spin(self) -> None:
        try:
            while not self._closed.is_set():
                self._executor.spin_once(SPIN_S)
        except BaseException as error:  # nobody hears the emergency stop any more
            self._fail(error)


def qos(delivery: Delivery) -> QoSProfile:
    """Return the QoS profile of rclpy for a delivery."""
    sensor, latched = delivery is Delivery.SENSOR, delivery is Delivery.LATCHED
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=_DEPTH.get(delivery, 1),
        reliability=ReliabilityPolicy.BEST_EFFORT if sensor else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


@cache
def ros_type(name: str) -> Any:
    """Return the class of a message, service or action type, such as `std_msgs/msg/String`.

    Raises:
        ValueError: its package is not installed.
    """
    package, kind, short = name.split("/")
    try:
        return getattr(import_module(f"{package}.{kind}"), short)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} needs the ROS 2 package {package}: apt install ros-$ROS_DISTRO-{package.replace('_', '-')}"
        ) from error


def fill(message: Any, fields: Mapping[str, Any]) -> Any:
    """Set the fields of a message and return it; the other fields keep their values.

    Args:
        message: message of rclpy.
        fields: field name -> value; a mapping for a nested message, a list of mappings for a sequence of messages, a
            list or numpy array for numbers.
    """
    for name, value in fields.items():
        present = getattr(message, name)
        if isinstance(value, Mapping):
            fill(present, value)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            element = _ELEMENT.fullmatch(message.get_fields_and_field_types()[name])
            assert element is not None, f"{name} is a sequence of messages"
            kind = ros_type(f"{element[1]}/msg/{element[2]}")
            setattr(message, name, [fill(kind(), each) for each in value])
        elif isinstance(present, bytes):  # `byte` is bytes of length one in Python
            setattr(message, name, bytes([value]))
        elif isinstance(present, array):
            numbers = array(present.typecode)
            numbers.frombytes(np.ascontiguousarray(value, present.typecode).tobytes())
            setattr(message, name, numbers)
        else:
            setattr(message, name, value)
    return message
