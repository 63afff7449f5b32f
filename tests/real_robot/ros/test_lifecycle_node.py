"""The lifecycle node as a process, between a policy server and the simulated robot, by its services and topics only."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvla.tests.support.extras import needs
from cogvla.tests.support.policy_servers import SumPolicy, free_port, get, serving
from cogvla.tests.support.waiting import until

pytest.importorskip("rclpy", reason=needs("ros"))

from cogvla.real_robot.ros.messages import image_fields
from cogvla.real_robot.ros.node import IMAGE, STRING, Delivery
from cogvla.tests.support.lifecycle_process import (
    ACTIVATE,
    BOOLEAN,
    CLEANUP,
    CONFIGURE,
    DEACTIVATE,
    DOUBLE,
    TEXT,
    LifecycleProcess,
    changed,
    domain_of,
    lifecycle_node,
)
from cogvla.tests.support.robot_processes import Operator, Process

DOMAIN = domain_of(101)
PERIOD = 0.05


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    port = free_port()
    process = Process("circle_server.py", str(port))
    uri = f"ws://127.0.0.1:{port}"
    until(lambda: get(uri, "/healthz")[0] == 200)
    yield uri
    process.kill()


@pytest.fixture(scope="module")
def operator() -> Iterator[Operator]:
    robot, made = Process("sim_robot", domain=DOMAIN), Operator(DOMAIN)
    yield made
    robot.kill()
    made.close()


def test_the_lifecycle_and_the_operators_orders(server: str, operator: Operator, tmp_path: Path) -> None:
    with lifecycle_node(operator, tmp_path, server=server, dry_run=False, instruction="draw", diagnostics_s=1) as node:
        check_orders(node, operator)


def check_orders(node: LifecycleProcess, operator: Operator) -> None:
    refused = (False, "not active: activate the lifecycle node first")
    assert operator.activate() == refused
    assert node.state() == "unconfigured"
    assert operator.estop() == (True, "engaged")  # heard without a bridge, and kept
    assert node.change(CONFIGURE)
    assert node.state() == "inactive"
    operator.state("stopped", "emergency stop")
    assert operator.activate() == refused
    assert not node.change(ACTIVATE), "the emergency stop is engaged"
    assert operator.reset() == (False, "the emergency stop is engaged")
    operator.estop(False)
    assert not node.change(ACTIVATE), "not reset yet"
    assert node.change(CLEANUP)
    assert node.change(CONFIGURE)
    assert not node.change(ACTIVATE), "neither cleanup nor configure resets it"
    assert operator.reset()[0]
    assert operator.activate() == refused
    assert not operator.commands
    assert node.change(ACTIVATE)
    operator.state("running")

    ok, reason = node.set("dry_run", type=BOOLEAN, bool_value=True)
    assert (ok, reason) == (False, "dry_run is read when the node is configured: deactivate and clean up first")
    assert not node.set("diagnostics_s", type=DOUBLE, double_value=2.0)[0]

    write = operator.node.advertise("/instruction", STRING, Delivery.EVENTS)  # volatile

    def written() -> bool:
        write({"data": ""})
        return operator.diagnostics["state"] == "holding"

    operator.until(written)
    operator.instruct("draw again")  # latched
    operator.state("running")
    assert node.change(DEACTIVATE)
    operator.state("idle")
    assert operator.activate() == refused
    assert node.process.end(by=signal.SIGTERM) == 0


def test_an_emergency_stop_at_any_moment_is_the_last_word(server: str, operator: Operator, tmp_path: Path) -> None:
    chance = random.Random(0)
    with lifecycle_node(operator, tmp_path, server=server, dry_run=False, instruction="draw") as node:
        node.run()
        for _ in range(int(os.environ.get("EMERGENCY_STOPS", "30"))):
            operator.state("running")
            time.sleep(chance.uniform(0, 3 * PERIOD))
            assert operator.estop() == (True, "engaged")
            confirmed = time.time()
            seen = operator.count("tick")
            operator.until(
                lambda seen=seen: operator.diagnostics["state"] == "stopped" and operator.count("tick") > seen + 3
            )
            assert not [sent for sent, _ in list(operator.commands) if sent > confirmed]
            operator.estop(False)
            operator.reset()
            assert operator.activate()[0]
        assert np.isfinite([action for _, action in operator.commands]).all()
        assert node.process.end(by=signal.SIGINT) == 0


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"api_key": 12345}, "api_key is no parameter, because every node could read it"),
        ({"use_sim_time": "yes"}, "parameter use_sim_time must be true or false, got 'yes'"),
        ({"dry_run": "no", "server": 5}, "parameter dry_run must be true or false, got 'no'"),
    ],
)
def test_a_file_of_parameters_that_is_wrong_is_refused(
    operator: Operator, parameters: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with lifecycle_node(operator, tmp_path, **parameters) as node:
        assert not node.change(CONFIGURE)
        node.said(words)
        assert node.state() == "unconfigured"
        assert node.process.end() == 0
    assert not any("12345" in line for line in node.process.lines)


WRONG = {
    "'nonsense' is no address": {"server": "nonsense"},
    "'http://127.0.0.1:1' is no address; give ws://HOST:PORT": {"server": "http://127.0.0.1:1"},
    "certificate /no.pem cannot be used": {"server": "wss://127.0.0.1:1", "certificate": "/no.pem"},
    "topics.joints names 7 joints": {"topics": "six_joints"},
    "topics '/no.yaml' cannot be read": {"topics": "/no.yaml"},
}


def test_configure_says_what_is_wrong_until_it_is_right(server: str, operator: Operator, tmp_path: Path) -> None:
    with lifecycle_node(operator, tmp_path) as node:
        for words, parameters in WRONG.items():
            for name, text in parameters.items():
                assert node.set(name, type=TEXT, string_value=text) == (True, "")
            assert not node.change(CONFIGURE)
            node.said(f"not configured: {words}")
            assert node.state() == "unconfigured"
        refused = node.set("dry_run", type=TEXT, string_value="no")
        assert refused == (False, "parameter dry_run must be true or false, got 'no'")
        for name, text in {"server": server, "certificate": "", "topics": "tabletop"}.items():
            node.set(name, type=TEXT, string_value=text)
        assert node.change(CONFIGURE)
        assert node.process.end() == 0


def test_a_bridge_that_cannot_start_is_said_in_one_line(server: str, operator: Operator, tmp_path: Path) -> None:
    gap = changed(tmp_path, "robot", "tabletop", {"loop": {"clock_gap_s": 0.01}})
    with lifecycle_node(operator, tmp_path, server=server, robot=gap) as node:
        assert not node.change(CONFIGURE)
        node.said("not configured: loop: clock_gap_s must be longer than a control period")
        if find_spec("control_msgs") is None:
            goals = {"gripper": "/grip", "gripper_type": "GripperCommand", "gripper_positions": [0.0, 1.0]}
            topics = changed(tmp_path, "topics", "tabletop", goals)
            for name, text in {"robot": "tabletop", "topics": topics}.items():
                assert node.set(name, type=TEXT, string_value=text) == (True, "")
            assert not node.change(CONFIGURE)
            node.said("not configured: control_msgs/action/GripperCommand needs the ROS 2 package control_msgs")
        assert node.process.end() == 0


def test_a_policy_of_another_robot_is_refused_and_an_absent_server_is_waited_for(
    operator: Operator, tmp_path: Path
) -> None:
    with serving(SumPolicy()) as (uri, _), lifecycle_node(operator, tmp_path, server=uri) as node:
        assert not node.change(CONFIGURE)
        node.said("does not fit the robot")
        absent = f"ws://127.0.0.1:{free_port()}"
        assert node.set("server", type=TEXT, string_value=absent) == (True, "")
        assert node.change(CONFIGURE)
        node.said("no policy server yet, the arm will hold until there is one")
        assert node.process.end() == 0


def test_large_images_arrive(operator: Operator) -> None:
    """Two cameras of 1280x720: the default shared memory of Fast DDS holds not even one image."""
    got: list[int] = []
    image = np.zeros((720, 1280, 3), np.uint8)
    for camera in ("left", "right"):
        operator.node.subscribe(
            f"/large/{camera}", IMAGE, Delivery.SENSOR, lambda message: got.append(len(message.data))
        )
    cameras = [operator.node.advertise(f"/large/{camera}", IMAGE, Delivery.SENSOR) for camera in ("left", "right")]

    def sent() -> bool:
        for send in cameras:
            send(image_fields(image, 1.0, "camera"))
        time.sleep(PERIOD)
        return len(got) >= 40

    operator.until(sent)
    assert set(got) == {image.size}
