"""Drive a robot over ROS 2 topics: a `FrontEnd` on any `RosNode`.

    in    cameras (Image or CompressedImage), joint states, instruction
    out   commands (Float64MultiArray, JointTrajectory or TwistStamped), in a dry run on ~/dry_run instead; /diagnostics
    ~/estop, ~/reset, ~/activate    as services (SetBool, Trigger, SetBool) and as topics (Bool, Empty, Bool)

Shape legend: A action dimension, N ticks of a trajectory, S state dimension, H, W image size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import Bridge
from cogvla.real_robot.control.observations import STATE
from cogvla.real_robot.control.settings import SafetyLimits
from cogvla.real_robot.ros.commands import Commands
from cogvla.real_robot.ros.gripper import GripperGoals
from cogvla.real_robot.ros.messages import compressed_image_of, diagnostics_fields, image_of, state_of
from cogvla.real_robot.ros.node import (
    ARRAY,
    BOOL,
    COMPRESSED_IMAGE,
    DIAGNOSTICS,
    EMPTY,
    GRIPPER_COMMAND,
    IMAGE,
    JOINT_STATE,
    SET_BOOL,
    STRING,
    TRIGGER,
    Answer,
    Delivery,
    Fields,
    RosNode,
    seconds_of,
)
from cogvla.real_robot.ros.topics import COMMANDS, RosTopics

STOP_PERIODS = 2.0
"""Control periods without a command after which a twist of zero stops the arm, should the bridge hang."""
DRIFT_S = 1e-3
"""Change of a clock offset, in seconds, from which on the clocks have drifted or one was set."""


class RosFrontEnd:
    """Front end of a robot with ROS 2 topics.

    Args:
        node: ROS 2 node, started or not.
        topics: topics of the robot.
        embodiment: embodiment of the bridge.
        limits: limits of the bridge, for the kind of its actions and what measures their joints.
        orders: offer the operator's services and topics, see `offer_orders`.

    Raises:
        ValueError: the topics do not fit the embodiment or the limits.
    """

    def __init__(
        self, node: RosNode, topics: RosTopics, embodiment: Embodiment, limits: SafetyLimits, orders: bool = True
    ) -> None:
        topics.check(embodiment, limits)
        self._node, self._topics, self._orders = node, topics, orders
        self._period_s = 1.0 / embodiment.control_hz
        self._commands = Commands(topics, embodiment)
        kind = COMMANDS[topics.command_type]
        self._command = node.advertise(topics.command, kind, Delivery.COMMAND)
        self._preview = node.advertise("~/dry_run", kind, Delivery.COMMAND)
        self._goals: GripperGoals | None = None
        self._command_gripper = (
            node.advertise(topics.gripper, ARRAY, Delivery.COMMAND)
            if topics.gripper is not None and topics.gripper_type == "array"
            else None
        )
        self._diagnostics = node.advertise("/diagnostics", DIAGNOSTICS, Delivery.EVENTS)
        self._offset = ClockOffset()
        self._closed = False
        self._sending = threading.Lock()
        self._given: tuple[float, np.ndarray] | None = None  # when the last trajectory was sent, and its actions [N,A]
        self._sent, self._moving = threading.Event(), False
        self._silence: threading.Thread | None = None

    @property
    def ahead(self) -> bool:
        """See `FrontEnd.ahead`."""
        return self._topics.points == "chunk"

    def start(self, bridge: Bridge) -> None:
        """Subscribe to the topics and offer the services."""
        node, topics = self._node, self._topics
        node.on_failure(lambda error: bridge.fail(ConnectionError(f"ROS 2: {type(error).__name__}: {error}")))
        for camera, topic in topics.cameras.items():
            compressed = topic.endswith("/compressed")
            kind, read = (COMPRESSED_IMAGE, compressed_image_of) if compressed else (IMAGE, image_of)
            node.subscribe(topic, kind, Delivery.SENSOR, self._image(bridge, camera, read))
        node.subscribe(topics.joint_states, JOINT_STATE, Delivery.SENSOR, self._state(bridge))
        for delivery in (Delivery.LATCHED, Delivery.EVENTS):  # a latched reader never hears a volatile writer
            node.subscribe(topics.instruction, STRING, delivery, self._instruction(bridge))
        if topics.gripper_type == "GripperCommand":
            assert topics.gripper is not None
            assert topics.gripper_positions is not None
            give = node.pursue(topics.gripper, GRIPPER_COMMAND, self._refused(bridge))
            self._goals = GripperGoals(give, topics.gripper, topics.gripper_positions, topics.gripper_effort)
        if topics.command_type == "twist":
            self._silence = threading.Thread(target=self._stop_when_silent, args=(bridge,), daemon=True)
            self._silence.start()
        if self._orders:
            offer_orders(node, bridge, lambda: self._closed)

    def send(self, action_A: np.ndarray, coming_NA: np.ndarray | None, dry_run: bool) -> None:
        """See `FrontEnd.send`."""
        with self._sending:
            if not self.ahead:
                self._publish(action_A[None], dry_run)
            elif coming_NA is not None:
                actions_NA = np.concatenate([action_A[None], coming_NA])
                self._publish(actions_NA, dry_run)
                self._given = time.monotonic(), actions_NA
            if not dry_run:
                if self._command_gripper is not None:
                    self._command_gripper(self._commands.grippers(action_A))
                if self._goals is not None:
                    self._goals.send(self._commands.gripper(action_A))
                self._moving = True
                self._sent.set()

    def stop(self, dry_run: bool) -> None:
        """See `FrontEnd.stop`: send a twist of zero, or a trajectory that ends at the point the arm is heading for."""
        with self._sending:
            if self._topics.command_type == "twist":
                self._publish(self._commands.rest()[None], dry_run)
            elif self._given is not None:
                (sent_at, actions_NA), self._given = self._given, None
                gone_s = time.monotonic() - sent_at
                left_s = [self._commands.after_s(number) - gone_s for number in range(len(actions_NA) - 1)]
                next_one = next((i for i, seconds in enumerate(left_s) if seconds >= self._period_s / 2), None)
                if next_one is not None:  # else the trajectory is about to end by itself
                    self._publish(actions_NA[next_one][None], dry_run, left_s[next_one])
            if self._goals is not None:
                self._goals.forget()
            self._moving = False

    def _refused(self, bridge: Bridge) -> Callable[[Fields], None]:
        def fail(goal: Fields) -> None:
            position = goal["command"]["position"]
            error = f"the gripper's controller refuses to move it to {position:g}: compare topics.gripper_positions"
            bridge.fail(ValueError(error))

        return fail

    def _publish(self, actions_NA: np.ndarray, dry_run: bool, first_s: float | None = None) -> None:
        fields = self._commands.arm(actions_NA, self._node.now(), first_s)
        (self._preview if dry_run else self._command)(fields)

    def _stop_when_silent(self, bridge: Bridge) -> None:
        """Send a twist of zero when no commands come, because a velocity goes on until something ends it."""
        try:
            while not self._closed:
                self._sent.wait()
                while not self._closed and self._sent.wait(STOP_PERIODS * self._period_s):
                    self._sent.clear()
                if self._moving:
                    self.stop(dry_run=False)
        except Exception as error:
            bridge.fail(error)

    def show(self, diagnostics: Mapping[str, Any]) -> None:
        """See `FrontEnd.show`."""
        self._diagnostics(diagnostics_fields(diagnostics, self._node.name, self._node.now()))

    def close(self) -> None:
        """Stop calling the bridge. The caller closes the node."""
        self._closed = True
        self._sent.set()
        if self._silence is not None:
            self._silence.join()

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
