"""ROS 2 lifecycle node of the bridge: configure connects, activate starts the policy, deactivate stops it.

    unconfigured --configure--> inactive --activate--> active
         ^--------cleanup---------'  ^---deactivate------'

Cleanup disconnects. The operator's services and topics exist in all states, and an emergency stop outlives cleanup and
configure. Parameters are read by configure; until cleanup they cannot be changed. Start it with

    ros2 launch cogvla_bridge bridge.launch.py
    python -m cogvla.real_robot.ros.lifecycle_node --ros-args --params-file my_robot.yaml     without the package
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Sequence

import rclpy
from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterUninitializedException
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions

from cogvla.real_robot.bridge.bridge import Bridge
from cogvla.real_robot.ros.front_end import RosFrontEnd, offer_orders
from cogvla.real_robot.ros.network import no_port_of_the_dead, profile_variables
from cogvla.real_robot.ros.node import Answer
from cogvla.real_robot.ros.parameters import PARAMETERS, check_names, parts, typed
from cogvla.real_robot.ros.rclpy_node import RclpyNode
from cogvla.real_robot.serving.reconnecting import ReconnectingClient, check_server

WATCH_S = 0.2
"""Seconds between two looks at whether the bridge has failed, or the process is to end."""


class Orders:
    """The operator's orders to whatever bridge there is. They keep an emergency stop while there is none."""

    def __init__(self) -> None:
        self.bridge: Bridge | None = None
        self.active = False
        self._engaged = self._stopped = False

    def connect(self, bridge: Bridge) -> None:
        """Hand the emergency stop to a new bridge, before it starts."""
        if self._stopped:
            bridge.estop(True)
            if not self._engaged:
                bridge.estop(False)
        self.bridge = bridge

    def estop(self, engaged: bool) -> Answer:
        """Engage or release the emergency stop."""
        self._engaged = engaged
        self._stopped = self._stopped or engaged
        if self.bridge is not None:
            return self.bridge.estop(engaged)
        return True, "engaged" if engaged else "released, reset to go on" if self._stopped else "released"

    def reset(self) -> Answer:
        """Clear a fault and a released emergency stop."""
        done, message = self.bridge.reset() if self.bridge is not None else (not self._engaged, "unconfigured")
        self._stopped = self._stopped and not done
        return done, message if done or not self._engaged else "the emergency stop is engaged"

    def activate(self, active: bool) -> Answer:
        """Start or stop the policy, while the lifecycle is active."""
        if self.bridge is not None and (self.active or not active):
            return self.bridge.activate(active)
        return not active, "not active: activate the lifecycle node first" if active else "unconfigured"


class BridgeNode(LifecycleNode):
    """Lifecycle node of the bridge. The module docstring shows its states."""

    def __init__(self) -> None:
        super().__init__("cogvla_bridge", automatically_declare_parameters_from_overrides=True)
        self._names = list(self.get_parameters_by_prefix(""))
        given = {name: self.get_parameter(name).value for name in self._names if name in PARAMETERS}
        for name in self._names:
            if name in PARAMETERS or name == "api_key":
                self.undeclare_parameter(name)
        for name, (default, description) in PARAMETERS.items():
            described = ParameterDescriptor(description=description, dynamic_typing=True)
            self.declare_parameter(name, given.get(name, default), described, ignore_override=True)
        self.add_on_set_parameters_callback(self._may_set)
        self._orders = Orders()
        self._ros: RclpyNode | None = None
        self._always = RclpyNode(self)
        self._always.on_failure(self._failed)
        offer_orders(self._always, self._orders)
        self._seen_failure: BaseException | None = None
        self.create_timer(WATCH_S, self._watch, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Check the parameters and the policy server, and connect, without sending commands."""
        try:
            check_names(self._names)
            if not isinstance(sim_time := self.get_parameter("use_sim_time").value, bool):
                raise ValueError(f"parameter use_sim_time must be true or false, got {sim_time!r}")
            made = parts({name: self.get_parameter(name).value for name in PARAMETERS})
            waiting = asyncio.run(check_server(made.server, made.client))
            self._ros = RclpyNode(self)
            front_end = RosFrontEnd(self._ros, made.topics, made.embodiment, made.robot.limits, orders=False)
            client = ReconnectingClient(made.server, made.client)
            bridge = Bridge(made.robot, made.embodiment, client, front_end, made.settings)
            self._orders.connect(bridge)
            self._seen_failure = None
            bridge.start()
        except (ValueError, TypeError, OSError, ParameterUninitializedException) as error:
            self.get_logger().error(f"not configured: {error}")
            self.disconnect()
            return TransitionCallbackReturn.FAILURE
        if waiting is not None:
            self.get_logger().warning(f"no policy server yet, the arm will hold until there is one: {waiting}")
        if made.instruction:
            bridge.instruct(made.instruction)
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let the policy act; fail until a fault is reset."""
        assert self._orders.bridge is not None, "configured"
        done, message = self._orders.bridge.activate()
        if not done:
            self.get_logger().error(f"not activated: {message}")
            return TransitionCallbackReturn.FAILURE
        self._orders.active = True
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop sending commands."""
        assert self._orders.bridge is not None, "configured"
        self._orders.active = False
        self._orders.bridge.activate(False)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Disconnect. An emergency stop stays."""
        self.disconnect()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Disconnect."""
        self.disconnect()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Disconnect after an exception of a transition."""
        self.disconnect()
        return TransitionCallbackReturn.SUCCESS

    def disconnect(self) -> None:
        """Stop sending commands and disconnect from the robot and the server."""
        self._orders.active = False
        bridge, self._orders.bridge = self._orders.bridge, None
        if bridge is not None:
            bridge.close()
        if self._ros is not None:
            self._ros.destroy()
            self._ros = None

    def _may_set(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        """Refuse what would change nothing until the next configure."""
        mine = [parameter for parameter in parameters if parameter.name in PARAMETERS]
        try:
            for parameter in mine:
                typed(parameter.name, parameter.value)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if mine and self._orders.bridge is not None:
            reason = f"{mine[0].name} is read when the node is configured: deactivate and clean up first"
            return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    def _failed(self, error: BaseException) -> None:
        """Stop for good after an exception of a callback, whose traceback is in the log."""
        if self._orders.bridge is not None:
            self._orders.bridge.fail(error)

    def _watch(self) -> None:
        """Leave the state active when the bridge has failed; the diagnostics go on and say why."""
        bridge = self._orders.bridge
        if bridge is None or bridge.failure is None or bridge.failure is self._seen_failure:
            return
        self._seen_failure = bridge.failure
        self.get_logger().error(f"{bridge.fault}; clean up and configure to start again")
        if self._orders.active:
            self.trigger_deactivate()


def main(arguments: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    os.environ.update(profile_variables())
    try:
        with no_port_of_the_dead():
            rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
            node = BridgeNode()
    except (RuntimeError, ValueError) as error:  # wrong --ros-args, or a file of parameters that cannot be read
        raise SystemExit(f"error: {error}") from None
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stop.is_set():
            executor.spin_once(WATCH_S)
    finally:
        node.disconnect()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
