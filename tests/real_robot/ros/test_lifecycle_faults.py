"""What happens to the lifecycle node and to its process: it fails, is suspended or killed, and its clock jumps."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvla.tests.support.extras import needs
from cogvla.tests.support.policy_servers import serving
from cogvla.tests.support.waiting import until

pytest.importorskip("rclpy", reason=needs("ros"))

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.tests.support.circle_server import TABLETOP, CirclePolicy
from cogvla.tests.support.lifecycle_process import (
    ACTIVATE,
    CLEANUP,
    CONFIGURE,
    domain_of,
    lifecycle_node,
)
from cogvla.tests.support.robot_processes import Operator
from cogvla.tests.support.topic_robot import TopicRobot

DOMAIN = domain_of(126)
HZ = TABLETOP.control_hz


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(CirclePolicy()) as (uri, _):
        yield uri


@pytest.fixture(scope="module")
def operator() -> Iterator[Operator]:
    made = Operator(DOMAIN)
    yield made
    made.close()


@pytest.fixture
def robot() -> Iterator[TopicRobot]:
    with TopicRobot(build(RosTopics, load("topics", "tabletop"), "topics"), TABLETOP, DOMAIN) as made:
        made.state[:3] = 0.58, 0.0, 0.25
        yield made


def moves(robot: TopicRobot, number: int = 10) -> None:
    """Wait for so many more commands that move the arm."""
    moved = [message for _, message in list(robot.commands) if np.any(message.data[:6])]
    until(lambda: sum(bool(np.any(m.data[:6])) for _, m in list(robot.commands)) >= len(moved) + number)


def test_a_bridge_that_breaks_leaves_the_node_inactive_and_says_why(
    server: str, operator: Operator, robot: TopicRobot, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"server": server, "dry_run": False, "instruction": "draw"}
    with lifecycle_node(operator, tmp_path, "failing_lifecycle_node.py", **settings) as node:
        for _ in range(2):
            assert node.change(CONFIGURE)
            assert node.change(ACTIVATE)
            until(lambda: node.state() == "inactive")
            node.said("the bridge has failed: RuntimeError: no way to the arm; clean up and configure to start again")
            operator.state("stopped", "the bridge has failed: RuntimeError: no way to the arm")
            number = len(robot.commands)
            assert operator.activate() == (False, "not active: activate the lifecycle node first")
            assert not node.change(ACTIVATE)
            node.said("not activated: stopped: the bridge has failed")
            assert operator.reset()[0] is False
            seen = operator.count("ages_s.state")
            operator.until(lambda seen=seen: operator.count("ages_s.state") != seen)
            assert len(robot.commands) == number, "nothing more is sent"
            assert node.change(CLEANUP)
        assert node.process.end() == 0


def test_a_node_that_was_suspended_sends_nothing_old(
    server: str, operator: Operator, robot: TopicRobot, tmp_path: Path
) -> None:
    with lifecycle_node(operator, tmp_path, server=server, dry_run=False, instruction="draw") as node:
        node.run()
        for seconds in (0.2, 1.0, 3.0):  # shorter and longer than `clock_gap_s`
            moves(robot)
            node.process.signal(signal.SIGSTOP)
            time.sleep(0.1)
            suspended = time.time()
            time.sleep(seconds)
            assert robot.since(suspended) == []
            jumps = operator.count("counts.clock_jumps")
            resumed = time.time()
            node.process.signal(signal.SIGCONT)
            moves(robot)
            if seconds > 0.5:
                operator.until(lambda jumps=jumps: operator.count("counts.clock_jumps") > jumps)
                first = robot.since(suspended)[0]
                assert not np.any(first.data[:6]), "what was planned before is forgotten"
            sent = [when for when, _ in list(robot.commands) if when > suspended]
            assert min(sent) >= resumed
            for begin in sent:  # never more than the control rate, and the tick that was due while it was suspended
                assert len([when for when in sent if begin <= when < begin + 0.5]) <= 0.5 * HZ + 2
        operator.state("running")


def test_a_node_that_was_killed_comes_back_without_a_word_to_the_arm(
    server: str, operator: Operator, robot: TopicRobot, tmp_path: Path
) -> None:
    """An emergency stop does not outlive the process; nothing moves until somebody configures and activates it."""
    with lifecycle_node(operator, tmp_path, server=server, dry_run=False, instruction="draw") as node:
        node.run()
        moves(robot)
        assert operator.estop() == (True, "engaged")
        node.process.kill()
        killed = time.time()
        node.start()
        assert node.state() == "unconfigured"
        assert operator.activate() == (False, "not active: activate the lifecycle node first")
        assert node.change(CONFIGURE)
        assert node.state() == "inactive"
        operator.state("idle")
        tick = operator.count("tick")
        operator.until(lambda: operator.count("tick") > tick + 4)
        assert robot.since(killed) == []
        assert node.change(ACTIVATE)
        moves(robot)


@pytest.mark.parametrize("clock_hz", [100.0, 10.0])
def test_the_arm_moves_in_the_time_of_a_simulation_whose_clock_jumps(
    server: str, operator: Operator, robot: TopicRobot, tmp_path: Path, clock_hz: float
) -> None:
    shift = 1000.0 - time.monotonic()
    robot.now = lambda: time.monotonic() + shift
    robot.clock_period = 1 / clock_hz
    with lifecycle_node(
        operator, tmp_path, server=server, dry_run=False, instruction="draw", use_sim_time=True
    ) as node:
        node.run()
        moves(robot, 30)
        refused, sent = future(operator), robot.sent
        moves(robot, 30)
        assert future(operator) - refused < 0.25 * (robot.sent - sent), "stamps between two messages of /clock are good"
        for jump in (-500.0, 300.0):
            shift += jump
            moves(robot, 30)
            operator.state("running")
            assert operator.diagnostics["fault"] is None
        assert node.process.end() == 0


def future(operator: Operator) -> int:
    return sum(value for key, value in operator.diagnostics.items() if key.startswith("refusals") and "future" in key)
