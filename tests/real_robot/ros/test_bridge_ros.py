"""ROS 2 messages, the front end over a node that only remembers, and the rclpy package as far as it needs no ROS 2."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.ros import messages as messages
from cogvla.real_robot.ros import network
from cogvla.real_robot.ros.commands import Commands
from cogvla.real_robot.ros.front_end import ClockOffset, RosFrontEnd
from cogvla.real_robot.ros.network import PROFILE, PROFILE_VARIABLES, RosSettings, environment
from cogvla.real_robot.ros.node import ARRAY, TRAJECTORY, TWIST, Answer, Delivery, Fields, resolve, seconds_of, stamp_of
from cogvla.real_robot.ros.parameters import API_KEY, PARAMETERS, check_names, parts
from cogvla.real_robot.ros.stepping_clock import SteppingClock
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.real_robot.serving.async_client import ClientSettings
from cogvla.real_robot.serving.reconnecting import check_server
from cogvla.scripts.command import compose, plain
from cogvla.scripts.robot.robots import ros_node
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import ROOT
from cogvla.tests.support.policy_servers import SumPolicy, free_port, serving
from cogvla.tests.support.waiting import until

ROS2 = ROOT / "real_robot" / "ros" / "package"


def as_message(fields: Any) -> Any:
    """Nested values with attributes, as any message has."""
    if isinstance(fields, dict):
        return SimpleNamespace(**{key: as_message(value) for key, value in fields.items()})
    return [as_message(each) for each in fields] if isinstance(fields, list) else fields


# --- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "pixel"),
    [
        ("rgb8", [1, 2, 3]),
        ("bgr8", [3, 2, 1]),
        ("8UC3", [3, 2, 1]),
        ("rgba8", [1, 2, 3, 9]),
        ("bgra8", [3, 2, 1, 9]),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_images_of_every_encoding_are_rgb(encoding: str, pixel: list[int], padding: int) -> None:
    row = np.array(pixel * 4 + [0] * padding, np.uint8)
    message = SimpleNamespace(encoding=encoding, height=2, width=4, step=len(row), data=np.tile(row, 2))
    image = messages.image_of(message)
    assert image.shape == (2, 4, 3)
    assert image.dtype == np.uint8
    assert (image == [1, 2, 3]).all()
    message.data = message.data.tobytes()
    np.testing.assert_array_equal(messages.image_of(message), image)


def test_images_that_cannot_be_read_are_refused() -> None:
    message = SimpleNamespace(encoding="16UC1", height=2, width=4, step=8, data=np.zeros(16, np.uint8))
    with pytest.raises(ValueError, match="encoding '16UC1' is not supported"):
        messages.image_of(message)
    message.encoding = "rgb8"
    with pytest.raises(ValueError, match="rows of 8 bytes has only 16 bytes"):
        messages.image_of(message)
    with pytest.raises(ValueError, match="cannot be read"):
        messages.compressed_image_of(SimpleNamespace(format="jpeg", data=np.zeros(9, np.uint8)))


def test_images_come_back_as_they_were_sent() -> None:
    image = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    sent = as_message(messages.image_fields(image, 12.5, "wrist"))
    np.testing.assert_array_equal(messages.image_of(sent), image)
    assert seconds_of(sent.header.stamp) == 12.5
    smooth = np.full((16, 16, 3), (200, 50, 20), np.uint8)
    packed = as_message(messages.compressed_image_fields(smooth, 0.0, "wrist"))
    assert np.abs(messages.compressed_image_of(packed).astype(int) - smooth).max() < 6


def test_joints_are_found_by_name() -> None:
    message = as_message(messages.joint_state_fields({"b": 2.0, "other": 9.0, "a": 1.0}, 3.0))
    np.testing.assert_array_equal(messages.state_of(message, ["a", "b"]), [1.0, 2.0])
    with pytest.raises(ValueError, match="no position of c; there are b, other, a"):
        messages.state_of(message, ["a", "c"])
    message.name[1] = "a"
    with pytest.raises(ValueError, match="names a twice"):
        messages.state_of(message, ["a", "b"])
    message.name[1], message.position = "other", message.position[:2]
    with pytest.raises(ValueError, match="no position of a; there are b, other"):
        messages.state_of(message, ["a", "b"])


def test_a_trajectory_starts_now_and_takes_one_period() -> None:
    fields = messages.trajectory_fields(np.array([[0.1, 0.2]]), ["j1", "j2"], [0.05])
    assert "header" not in fields, "stamp 0 means now"
    assert fields["points"][0]["time_from_start"] == {"sec": 0, "nanosec": 50_000_000}


def test_stamps_are_exact() -> None:
    assert stamp_of(1795359282.25) == {"sec": 1795359282, "nanosec": 250_000_000}
    assert stamp_of(-0.25) == {"sec": -1, "nanosec": 750_000_000}
    assert resolve("~/estop", "/ns/node") == "/ns/node/estop"
    assert resolve("joint_states", "/node") == "/joint_states"


def test_equal_stamps_stay_equal_until_a_clock_is_set() -> None:
    offset, times = ClockOffset(), iter(np.arange(100.0, 200.0, 1e-5))
    wall = 0.0
    first = offset(lambda: next(times), lambda: next(times) + wall)
    assert offset(lambda: next(times), lambda: next(times) + wall) == first
    wall = 5.0
    assert offset(lambda: next(times), lambda: next(times) + wall) == pytest.approx(first - 5, abs=1e-3)


# --- the front end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [0.002, 0.1, 0.5])
def test_time_goes_on_between_two_steps_of_a_simulation_for_one_step(period: float) -> None:
    clock = SteppingClock()
    assert clock.now(7.0, 100.0) == 7.0, "no simulation: the system's clock"
    clock.step(5.0, 100.0)
    assert clock.now(5.0, 100.1) == 5.0, "the length of a step is not known yet"
    clock.step(5.0 + period, 101.0)
    shown = [clock.now(5.0 + period, 101.0 + period * share) for share in (0.0, 0.5, 1.0, 9.0)]
    assert shown == pytest.approx([5.0 + period * steps for steps in (1.0, 1.5, 2.0, 2.0)])
    assert clock.now(5.0 + 2 * period, 102.0) == 5.0 + 2 * period, "a step that has only just come"


@pytest.mark.parametrize("set_to", [3.0, 1e9])
def test_a_simulation_whose_clock_was_set_stands_still_until_the_next_step(set_to: float) -> None:
    clock = SteppingClock()
    clock.step(5.0, 100.0)
    clock.step(set_to, 100.1)
    assert clock.now(set_to, 101.0) == set_to
    clock.step(set_to + 0.1, 101.0)
    assert clock.now(set_to + 0.1, 101.05) == pytest.approx(set_to + 0.15)


@dataclass
class Remembers:
    """A `RosNode` without a network."""

    name: str = "/bridge"
    subscribed: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    deliveries: list[tuple[str, Delivery]] = field(default_factory=list)
    published: list[tuple[str, str, Fields]] = field(default_factory=list)
    served: dict[str, Callable[[bool], Answer]] = field(default_factory=dict)
    fail: Callable[[BaseException], Any] | None = None

    def now(self) -> float:
        return time.time()

    def subscribe(self, topic: str, kind: str, delivery: Delivery, callback: Callable[[Any], None]) -> None:
        self.subscribed[topic] = callback
        self.deliveries.append((topic, delivery))

    def advertise(self, topic: str, kind: str, delivery: Delivery) -> Callable[[Fields], None]:
        return lambda fields: self.published.append((topic, kind, fields))

    def pursue(self, action: str, kind: str, refused: Callable[[Fields], None]) -> Callable[[Fields], bool]:
        raise AssertionError("no gripper of these tests has an action")

    def serve(self, service: str, kind: str, callback: Callable[[bool], Answer]) -> None:
        self.served[service] = callback

    def on_failure(self, call: Callable[[BaseException], Any]) -> None:
        self.fail = call


class Bridge:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def now(self) -> float:
        return time.monotonic()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self.told.append((name, *arguments))


def front(name: str, **changes: Any) -> tuple[Remembers, Bridge, RosFrontEnd, Embodiment]:
    node, bridge = Remembers(), Bridge()
    embodiment = build(Embodiment, load("embodiment", name), "embodiment")
    limits = build(RobotConfig, load("robot", name), "robot").limits
    made = RosFrontEnd(node, build(RosTopics, load("topics", name) | changes, "topics"), embodiment, limits)
    made.start(bridge)  # type: ignore[arg-type]
    return node, bridge, made, embodiment


def test_sensors_reach_the_bridge_on_its_own_clock() -> None:
    node, bridge, _, embodiment = front("tabletop")
    image = np.zeros((128, 128, 3), np.uint8)
    joints = dict.fromkeys(build(RosTopics, load("topics", "tabletop"), "topics").joints, 0.5)
    first = bridge.now()
    node.subscribed["/wrist/image_raw"](as_message(messages.image_fields(image, node.now() - 0.25, "wrist")))
    node.subscribed["/joint_states"](as_message(messages.joint_state_fields(joints, node.now() - 0.1)))
    taken = 1e-3 + bridge.now() - first  # seconds; a busy machine may stop for a while anywhere in between
    (what, camera, got, stamp), (state, values, state_stamp) = bridge.told
    assert (what, camera, state) == ("observe_image", "wrist", "observe_state")
    np.testing.assert_array_equal(got, image)
    assert stamp == pytest.approx(first - 0.25, abs=2 * taken)
    assert state_stamp == pytest.approx(first - 0.1, abs=2 * taken)
    assert len(values) == embodiment.state_dim
    assert ("/wrist/image_raw", Delivery.SENSOR) in node.deliveries
    assert [d for topic, d in node.deliveries if topic == "/instruction"] == [Delivery.LATCHED, Delivery.EVENTS]


def test_the_time_of_arrival_can_stand_for_the_stamp() -> None:
    node, bridge, _, _ = front("tabletop", stamps="arrival")
    image = as_message(messages.image_fields(np.zeros((2, 2, 3), np.uint8), 17.0, "wrist"))
    first = bridge.now()
    node.subscribed["/wrist/image_raw"](image)
    assert first <= bridge.told[0][3] <= bridge.now()


def test_what_cannot_be_read_is_counted() -> None:
    node, bridge, _, _ = front("tabletop")
    node.subscribed["/joint_states"](as_message(messages.joint_state_fields({"tcp_x": 0.0}, node.now())))
    bad = as_message(messages.image_fields(np.zeros((2, 2, 3), np.uint8), node.now(), "wrist"))
    bad.encoding = "mono16"
    node.subscribed["/wrist/image_raw"](bad)
    assert [told[:3] for told in bridge.told] == [
        ("refuse", "state", "unreadable"),
        ("refuse", "wrist", "unreadable"),
    ]


def test_orders_come_by_topic_and_by_service() -> None:
    node, bridge, made, _ = front("tabletop")
    node.subscribed["/instruction"](SimpleNamespace(data="stack the cubes"))
    node.subscribed["~/estop"](SimpleNamespace(data=True))
    node.subscribed["~/reset"](SimpleNamespace())
    node.subscribed["~/activate"](SimpleNamespace(data=False))
    node.served["~/estop"](False)
    node.served["~/reset"](True)
    node.served["~/activate"](True)
    assert bridge.told == [
        ("instruct", "stack the cubes"), ("estop", True), ("reset",), ("activate", False),
        ("estop", False), ("reset",), ("activate", True),
    ]  # fmt: skip
    made.close()
    node.subscribed["~/activate"](SimpleNamespace(data=True))
    assert len(bridge.told) == 7


def test_a_node_that_fails_stops_the_bridge() -> None:
    node, bridge, _, _ = front("tabletop")
    assert node.fail is not None
    node.fail(KeyError("data"))
    [(what, error)] = bridge.told
    assert what == "fail"
    with pytest.raises(ConnectionError, match=r"^ROS 2: KeyError: 'data'$"):
        raise error


def test_a_thread_of_ros_2_that_ends_is_a_failure_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    rclpy_node = pytest.importorskip("rclpy", reason=needs("ros")) and import_module("cogvla.real_robot.ros.rclpy_node")
    failures: list[BaseException] = []
    node = rclpy_node.OwnNode("/dies")
    monkeypatch.setattr(node._executor, "spin_once", lambda _: 1 / 0)
    node.on_failure(failures.append)
    with node:
        until(lambda: failures)
    node.on_failure(failures.append)
    assert failures == [node.failure] * 2, "also who asks too late is told"
    assert isinstance(node.failure, ZeroDivisionError)


def test_displacements_go_out_as_they_are() -> None:
    node, _, made, _ = front("tabletop")
    action = np.linspace(-1, 1, 7)
    made.send(action, None, False)
    made.send(action, None, True)
    (topic, kind, fields), (preview, _, _) = node.published
    assert (topic, kind, preview) == ("/arm_controller/commands", ARRAY, "~/dry_run")
    np.testing.assert_array_equal(fields["data"], action)


def test_joint_targets_go_out_as_a_trajectory_and_a_gripper() -> None:
    node, _, made, embodiment = front("six_joints")
    made.send(np.arange(7.0), None, False)
    (topic, kind, fields), (gripper, gripper_kind, grip) = node.published
    assert (topic, kind) == ("/joint_trajectory_controller/joint_trajectory", TRAJECTORY)
    assert fields["joint_names"] == [f"joint{i}" for i in range(1, 7)]
    np.testing.assert_array_equal(fields["points"][0]["positions"], np.arange(6.0))
    assert fields["points"][0]["time_from_start"]["nanosec"] == round(1.5e9 / embodiment.control_hz)
    assert (gripper, gripper_kind) == ("/gripper_controller/commands", ARRAY)
    np.testing.assert_array_equal(grip["data"], [6.0])


CHUNK = {"points": "chunk", "gripper_positions": [0.04, 0.0]}
PLAN = np.linspace(0.0, 0.6, 49).reshape(7, 7)


def positions(fields: Fields) -> np.ndarray:
    return np.array([point["positions"] for point in fields["points"]])


def seconds(fields: Fields) -> list[float]:
    return [point["time_from_start"]["sec"] + point["time_from_start"]["nanosec"] * 1e-9 for point in fields["points"]]


def test_a_chunk_goes_out_as_one_trajectory_and_the_gripper_in_every_tick() -> None:
    node, _, made, embodiment = front("six_joints", **CHUNK)
    assert made.ahead
    assert not front("six_joints")[2].ahead
    made.send(PLAN[0], PLAN[1:], False)
    made.send(PLAN[1], None, False)
    (topic, kind, fields), (_, _, grip), (next_topic, _, next_grip) = node.published
    assert (topic, kind) == ("/joint_trajectory_controller/joint_trajectory", TRAJECTORY)
    np.testing.assert_array_equal(positions(fields), PLAN[:, :6])
    np.testing.assert_allclose(seconds(fields), (1.5 + np.arange(7)) / embodiment.control_hz, atol=1e-9)
    assert next_topic == "/gripper_controller/commands"
    opened, closed = embodiment.gripper_open, embodiment.gripper_close
    for got, action in ((grip, PLAN[0]), (next_grip, PLAN[1])):
        assert got["data"] == pytest.approx([0.04 * (closed - action[6]) / (closed - opened)])


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_stop_replaces_the_chunk_by_the_point_that_the_arm_is_heading_for(dry_run: bool) -> None:
    node, _, made, embodiment = front("six_joints", **CHUNK)
    made.stop(dry_run)
    assert node.published == [], "there is no trajectory"
    made.send(PLAN[0], np.tile(PLAN[1:], (200, 1)), dry_run)
    began = time.monotonic()
    time.sleep(3.2 / embodiment.control_hz)
    made.stop(dry_run)
    gone = (time.monotonic() - began) * embodiment.control_hz
    made.stop(dry_run)
    sent = [fields for topic, _, fields in node.published if topic != "/gripper_controller/commands"]
    assert len(sent) == 2, "it is stopped once"
    [left] = seconds(sent[1])
    assert 0.5 - 1e-6 <= left * embodiment.control_hz <= 1.5 + 1e-6
    heading_for = round(gone - 1.5 + left * embodiment.control_hz)  # it comes to rest at this point
    assert heading_for >= 2
    np.testing.assert_array_equal(positions(sent[1]), positions(sent[0])[[heading_for]])
    assert {topic for topic, _, _ in node.published} & {"~/dry_run"} == ({"~/dry_run"} if dry_run else set())


def test_a_trajectory_that_ends_by_itself_is_not_stopped() -> None:
    for coming, wait_s in ((PLAN[1:1], 0.0), (PLAN[1:2], 0.2)):
        node, _, made, _ = front("six_joints", **CHUNK)
        made.send(PLAN[0], coming, False)
        time.sleep(wait_s)
        made.stop(False)
        assert [topic for topic, _, _ in node.published].count("/joint_trajectory_controller/joint_trajectory") == 1


GRIPS = {"gripper_positions": [0.04, 0.0]}
JOINTS = {"command_type": "trajectory", "command_joints": [f"joint{i}" for i in range(1, 7)]}


@pytest.mark.parametrize(
    ("robot", "changes"),
    [
        ("tabletop", {}),
        ("tabletop", GRIPS),
        ("tabletop", {"gripper": "/gripper"} | GRIPS),
        ("tabletop", {"command_type": "twist", "gripper": "/gripper", "twist_frame": "b", "twist_scale": [2] * 6}),
        ("six_joints", {}),
        ("six_joints", GRIPS),
        ("six_joints", CHUNK),
        ("six_joints", GRIPS | JOINTS | {"gripper": None, "command_joints": [*JOINTS["command_joints"], "gripper"]}),
    ],
)
def test_commands_can_be_read_again(robot: str, changes: dict[str, Any]) -> None:
    """So that a bag of them holds the actions of the policy, whatever a gripper or MoveIt Servo gets."""
    embodiment = build(Embodiment, load("embodiment", robot), "embodiment")
    topics = build(RosTopics, load("topics", robot) | changes, "topics")
    commands = Commands(topics, embodiment)
    plan = PLAN if topics.points == "chunk" else PLAN[:1]
    arm = commands.arm_of(as_message(commands.arm(plan, 1.0)))
    grips = [commands.grippers_of(as_message(commands.grippers(action))) for action in plan] if topics.gripper else None
    read = [commands.action(arm[i], None if grips is None else grips[i]) for i in range(len(plan))]
    np.testing.assert_allclose(read, plan, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": []}, "has no points"),
        ({"joint_names": ["joint1"] * 6}, "must name joint1, joint2"),
        ({"joint_names": ["a", *JOINTS["command_joints"]]}, "a point has 6 positions, the trajectory 7 joints"),
        ({"joint_names": [*JOINTS["command_joints"][:5], "x"]}, "must name joint6 once; it names joint1"),
    ],
)
def test_trajectories_that_cannot_be_read_are_refused(changes: dict[str, Any], words: str) -> None:
    embodiment = build(Embodiment, load("embodiment", "six_joints"), "embodiment")
    commands = Commands(build(RosTopics, load("topics", "six_joints") | CHUNK, "topics"), embodiment)
    good = dict(commands.arm(PLAN, 0.0))
    with pytest.raises(ValueError, match=words):
        commands.arm_of(as_message(good | changes))
    slow = [point | {"time_from_start": stamp_of(1.0 + i)} for i, point in enumerate(good["points"])]
    with pytest.raises(ValueError, match=r"must be 0\.0333333 s apart"):
        commands.arm_of(as_message(good | {"points": slow}))


TWISTS = {"twist_scale": [1, 1, 1, 2, 2, 2], "twist_frame": "base"}


def test_a_twist_is_scaled_and_ends_when_commands_end() -> None:
    grips = {"gripper": "/gripper/commands", "gripper_positions": [0.04, 0.0]}
    node, _, made, embodiment = front("tabletop", command_type="twist", **TWISTS, **grips)
    opened, closed = embodiment.gripper_open, embodiment.gripper_close
    made.send(np.array([0.1, 0, 0, 0, 0, 0.5, closed]), None, False)
    made.send(np.array([0.1, 0, 0, 0, 0, 0.5, opened]), None, False)
    until(lambda: [topic for topic, _, _ in node.published].count("/arm_controller/commands") == 3)
    made.close()
    (_, kind, fields), (_, _, grip), _, (_, _, later), (_, _, last) = node.published[:5]
    assert kind == TWIST
    assert fields["header"]["frame_id"] == "base"
    assert (fields["twist"]["linear"]["x"], fields["twist"]["angular"]["z"]) == (0.1, 1.0)
    assert (grip["data"], later["data"]) == (pytest.approx([0.0]), pytest.approx([0.04]))
    assert not any([*last["twist"]["linear"].values(), *last["twist"]["angular"].values()]), "it stops by itself"
    assert len(node.published) == 5, "at rest, the end says nothing"


def test_a_twist_is_stopped_at_once() -> None:
    node, _, made, _ = front("tabletop", command_type="twist", gripper="/gripper/commands", **TWISTS)
    made.send(np.ones(7), None, False)
    made.stop(False)
    topic, _, fields = node.published[-1]
    assert topic == "/arm_controller/commands"
    assert not any([*fields["twist"]["linear"].values(), *fields["twist"]["angular"].values()])
    made.close()


def test_a_dry_run_sends_no_twist_and_the_end_of_a_motion_stops_it() -> None:
    for dry_run, sent in ((True, 0), (False, 2)):
        node, _, made, _ = front("tabletop", command_type="twist", gripper="/gripper/commands", **TWISTS)
        made.send(np.ones(7), None, dry_run)
        made.close()
        assert [topic for topic, _, _ in node.published].count("/arm_controller/commands") == sent


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cameras": {"agentview": "/a"}}, "give a topic for each"),
        ({"joints": ["a", "b"]}, "names 2 joints, the state of 'tabletop_panda' has 8 entries"),
        ({"command_type": "speed"}, "command_type must be one of array, trajectory, twist"),
        ({"stamps": "now"}, "stamps must be one of header, arrival"),
        ({"command_type": "trajectory"}, "command_joints names the joints of a trajectory"),
        ({"command_type": "twist"}, "command_type=twist, which needs both"),
        ({"command_type": "twist", **TWISTS}, "a twist has 6 numbers, the command of 'tabletop_panda' has 7"),
        ({"gripper_positions": [1, 1]}, "gripper_positions must be two different numbers"),
        ({"gripper_positions": [0, "1"]}, "gripper_positions must be 2 finite numbers"),
        ({"gripper_type": "GripperCommand"}, "GripperCommand needs gripper, an action, and gripper_positions"),
        ({"gripper_type": "effort"}, "gripper_type must be one of array, GripperCommand"),
        ({"gripper_effort": 5}, "gripper_effort belongs to gripper_type=GripperCommand"),
        ({"gripper_effort": -1}, "gripper_effort must be 0 or more"),
        ({"points": "chunk"}, "points=chunk needs command_type=trajectory"),
        ({"points": 3}, "points must be one of next, chunk"),
        ({"point_periods": "1"}, "point_periods must be above 0"),
        ({"point_periods": float("nan")}, "point_periods must be above 0"),
        ({"cameras": ["/a", "/b"]}, "cameras must be a mapping"),
        ({"cameras": {"agentview": "/a b", "wrist": "/c"}}, "cameras.agentview: '/a b' is no name of a topic"),
        (
            {"cameras": {"agentview": "/a", "wrist": "a"}},
            "wrist and topics.cameras.agentview are the same",
        ),
        ({"joint_states": 7}, "joint_states: 7 is no name of a topic"),
        ({"command": ""}, "command: '' is no name of a topic"),
        ({"gripper": "/arm_controller/commands"}, "gripper and topics.command are the same topic"),
        ({"joints": "tcp_x"}, "joints must be a list of names, got 'tcp_x'"),
        ({"joints": ["a", None]}, "joints must be a list of names"),
        ({"joints": ["a", "b", "a"]}, "joints names a twice"),
        ({"twist_frame": ["base"]}, "twist_frame must be the name of a frame"),
        ({"command_type": "trajectory", "command_joints": list("abcdefg")}, "needs absolute actions, the robot's"),
        ({"twist_scale": [1, 2]}, "twist_scale must be 6 finite numbers"),
        ({"twist_scale": 0.5}, "twist_scale must be 6 finite numbers"),
        ({"point_periods": 0}, "point_periods must be above 0"),
        ({"command_type": "trajectory", "command_joints": ["a"]}, "names 1 joints, the command has 7"),
    ],
)
def test_topics_that_do_not_fit_the_robot_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        front("tabletop", **changes)


ELBOW_FIRST = ["joint3", "joint2", "joint1", "joint4", "joint5", "joint6", "gripper"]


@pytest.mark.parametrize("gripper", [0, 3, 6])
def test_a_joint_that_is_measured_by_another_is_refused(gripper: int) -> None:
    """The first command starts from the measured position: the arm would jump."""
    embodiment = replace(build(Embodiment, load("embodiment", "six_joints"), "embodiment"), gripper_index=gripper)
    limits = build(RobotConfig, load("robot", "six_joints"), "robot").limits
    topics = build(RosTopics, load("topics", "six_joints") | {"joints": ELBOW_FIRST}, "topics")
    inside = list(topics.command_joints or ())
    inside.insert(gripper, "gripper")
    for each in (topics, replace(topics, gripper=None, command_joints=tuple(inside))):
        with pytest.raises(ValueError, match=r"state_index of joint1 is 0, the position of joint3: give 2$"):
            each.check(embodiment, limits)
        each.check(embodiment, replace(limits, state_index=(2, 1, 0, 3, 4, 5)))
        unknown = ("a", "b", "c", "d", "e", "f", "gripper")
        replace(each, joints=unknown).check(embodiment, limits)
    array = replace(topics, command_type="array", command_joints=None)
    array.check(embodiment, limits)  # names nothing


@pytest.mark.parametrize("name", ["tabletop", "six_joints"])
def test_the_files_of_a_robot_fit_together(name: str) -> None:
    embodiment = build(Embodiment, load("embodiment", name), "embodiment")
    limits = build(RobotConfig, load("robot", name), "robot").limits
    limits.check(embodiment)
    build(RosTopics, load("topics", name), "topics").check(embodiment, limits)


def test_named_configs_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"topics 'nothing' is neither a YAML file nor one of six_joints, tabletop"):
        load("topics", "nothing")
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    assert load("topics", str(tmp_path / "mine.yaml")) == {"a": 1}
    for text, words in (
        ("", "holds no mapping"),
        ("- 1", "holds no mapping"),
        ("a: [1", "is no YAML at line"),
        ("a: 1\na: 2\n", "has the key 'a' twice"),
        ("defaults: [{a: b}]", "a default of topics must be a name"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            load("topics", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("command", ["robot_bridge", "sim_robot", "drive_robot"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["transport=dds"], "transport must be rclpy, got 'dds'"),
        (["transport=rclpy", "ros.domain=400"], "ros.domain must be from 0 to 232"),
        (["transport=rclpy", "ros.sim_time=maybe"], "ros.sim_time must be true or false, got 'maybe'"),
        (["transport=rclpy", "ros.discovery=ETH0"], "ros.discovery must be one of OFF, LOCALHOST"),
        (["transport=rclpy"], r"transport=rclpy needs ROS 2, .*: `uv sync --extra ros`"),
    ],
)
def test_mistakes_of_the_command_are_explained(
    command: str, changes: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cogvla.real_robot.ros.rclpy_node", None)  # as if it could not be imported
    config = compose(command, changes)
    with pytest.raises(ValueError, match=words):
        ros_node(config.transport, config.node, plain(config.ros))


@pytest.mark.parametrize("mine", [*PROFILE_VARIABLES, None])
def test_the_profile_for_large_images_is_loaded_unless_the_user_has_one(
    mine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PROFILE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if mine is not None:
        monkeypatch.setenv(mine, "/my/profile.xml")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    before = dict(os.environ)
    with environment(RosSettings()):
        assert os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
        assert os.environ.get(PROFILE_VARIABLES[0]) == (
            str(PROFILE) if mine is None else before.get(PROFILE_VARIABLES[0])
        )
        assert os.environ.get(PROFILE_VARIABLES[1]) == before.get(PROFILE_VARIABLES[1])
    assert dict(os.environ) == before
    assert int(ElementTree.parse(PROFILE).findtext(".//{*}segment_size", "0")) == 64 * 2**20


@pytest.mark.parametrize("locked_before", [True, False])
@pytest.mark.parametrize("others_write", [True, False])
def test_a_port_of_a_dead_process_is_not_taken_while_others_write_into_it(
    others_write: bool, locked_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SHARED_MEMORY", tmp_path)
    port, lock = tmp_path / "fastdds_port99999", tmp_path / "fastdds_port99999_el"
    port.write_bytes(bytes(4096))
    if locked_before:
        lock.touch()

    def free() -> bool:
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with port.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as writer:
        if not others_write:
            writer.close()
        with environment(RosSettings()):
            assert free() is not others_write
        assert free()
        with lock.open() as living:
            fcntl.flock(living, fcntl.LOCK_EX)
            with environment(RosSettings()):  # no fault
                assert not free()
        assert free()


def test_a_policy_for_another_robot_is_refused_before_anything_starts() -> None:
    settings = ClientSettings(robot=build(Embodiment, load("embodiment", "tabletop"), "embodiment"))
    with serving(SumPolicy()) as (uri, _), pytest.raises(ValueError, match="does not fit the robot 'tabletop_panda'"):
        asyncio.run(check_server(uri, settings))


def test_a_server_that_is_not_there_yet_is_no_mistake() -> None:
    waiting = asyncio.run(check_server(f"ws://127.0.0.1:{free_port()}", ClientSettings()))
    assert waiting is not None
    assert "cannot be reached" in waiting


@pytest.mark.parametrize(
    ("uri", "certificate", "words"),
    [
        ("nonsense", None, "is no address"),
        ("http://127.0.0.1:1", None, "is no address"),
        ("ws://127.0.0.1:99999", None, "'ws://127.0.0.1:99999' is no address"),
        ("ws://127.0.0.1:port", None, "'ws://127.0.0.1:port' is no address"),
        ("wss://127.0.0.1:1", "missing.pem", "certificate missing.pem cannot be used"),
        ("ws://127.0.0.1:1", "missing.pem", "no address of a server with TLS"),
    ],
)
def test_a_server_that_can_never_be_reached_is_a_mistake(uri: str, certificate: str | None, words: str) -> None:
    settings = ClientSettings(certificate=None if certificate is None else Path(certificate))
    with pytest.raises(ValueError, match=words):
        asyncio.run(check_server(uri, settings))


# --- the lifecycle node, as far as it needs no ROS 2 ----------------------------------------------------------------

DEFAULTS = {name: default for name, (default, _) in PARAMETERS.items()}


def test_parameters_make_a_bridge_and_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    made = parts(DEFAULTS)
    assert made.settings.dry_run
    assert made.client.api_key is None
    monkeypatch.setenv(API_KEY, "12345")
    assert parts(DEFAULTS).client.api_key == "12345"
    (tmp_path / "key").write_text("67890\n")
    assert parts(DEFAULTS | {"api_key_file": str(tmp_path / "key")}).client.api_key == "67890"
    made = parts(DEFAULTS | {"diagnostics_s": 2, "instruction": 7})
    assert (made.settings.diagnostics_s, made.instruction) == (2.0, "7")
    assert made.client.jpeg_quality is None
    assert parts(DEFAULTS | {"jpeg_quality": 90}).client.jpeg_quality == 90


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"robot": "crane"}, "robot 'crane' is neither"),
        ({"robot": 7}, "robot '7' is neither"),
        ({"topics": "six_joints"}, "names 7 joints"),
        ({"dry_run": "false"}, "parameter dry_run must be true or false, got 'false'"),
        ({"dry_run": 0}, "parameter dry_run must be true or false, got 0"),
        ({"diagnostics_s": "1"}, "parameter diagnostics_s must be a number, got '1'"),
        ({"diagnostics_s": True}, "parameter diagnostics_s must be a number"),
        ({"diagnostics_s": 0}, "diagnostics_s must be 0.01 to"),
        ({"diagnostics_s": float("inf")}, "diagnostics_s must be 0.01 to"),
        ({"topics": "/nowhere.yaml"}, "topics '/nowhere.yaml' cannot be read: No such file"),
        ({"jpeg_quality": 90.5}, "parameter jpeg_quality must be a whole number, got 90.5"),
        ({"jpeg_quality": True}, "parameter jpeg_quality must be a whole number"),
        ({"jpeg_quality": 200}, "jpeg_quality must be 1 to 95"),
        ({"instruction": False}, "parameter instruction must be a text"),
        ({"api_key_file": "/nowhere/key"}, "api_key_file '/nowhere/key' cannot be read"),
    ],
)
def test_wrong_parameters_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parts(DEFAULTS | changes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("api_key", f"set the variable {API_KEY}, or api_key_file"),
        ("dryrun", "there is no parameter dryrun; there are"),
    ],
)
def test_parameters_that_ros_2_would_ignore_are_refused(name: str, words: str) -> None:
    check_names([*PARAMETERS, "use_sim_time", "qos_overrides./a.publisher.depth"])
    with pytest.raises(ValueError, match=words):
        check_names(["server", name])


def test_the_parameter_file_has_every_parameter() -> None:
    written = yaml.safe_load((ROS2 / "config" / "tabletop.yaml").read_text())["/cogvla_bridge"]["ros__parameters"]
    assert written == DEFAULTS


def test_the_package_says_the_same_everywhere() -> None:
    manifest = ElementTree.parse(ROS2 / "package.xml")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert manifest.findtext("version") == version
    assert manifest.findtext("name") == "cogvla_bridge"
    assert (ROS2 / "resource" / "cogvla_bridge").is_file()
    setup = (ROS2 / "setup.py").read_text()
    assert f'version="{version}"' in setup
    for file in ("launch/bridge.launch.py", "config/tabletop.yaml", "package.xml"):
        assert f'"{file}"' in setup
        assert (ROS2 / file).is_file()
    sources = [ROOT / "real_robot" / "ros" / f"{name}.py" for name in ("rclpy_node", "lifecycle_node", "node")]
    text = "\n".join(source.read_text() for source in [*sources, ROS2 / "launch" / "bridge.launch.py"])
    used = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) | set(
        re.findall(r'"(\w+)/(?:msg|srv)/', text)
    )
    declared = {element.text for element in manifest.iter("exec_depend")}
    assert used - sys.stdlib_module_names - {"cogvla", "numpy", "launch"} == declared
