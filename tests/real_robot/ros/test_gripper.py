"""A gripper that takes goals of `GripperCommand`: when there is one, and over ROS 2 between processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.interface import ActionChunk, Embodiment, Observation
from cogvla.real_robot.ros.commands import Commands
from cogvla.real_robot.ros.gripper import GripperGoals
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.tests.support import gripper_command
from cogvla.tests.support.extras import needs
from cogvla.tests.support.policy_servers import serving
from cogvla.tests.support.waiting import until

ACTION = "/gripper_controller/gripper_cmd"


class Server:
    there = True

    def __init__(self) -> None:
        self.positions: list[float] = []

    def give(self, fields: Mapping[str, Any]) -> bool:
        if self.there:
            self.positions.append(fields["command"]["position"])
            assert fields["command"]["max_effort"] == 12
        return self.there


def test_a_goal_is_given_when_the_gripper_has_to_be_elsewhere() -> None:
    server = Server()
    goals = GripperGoals(server.give, ACTION, (0.04, 0.0), 12)
    for position in (0.04, 0.04, 0.0395, 0.035, 0.0349, 0.0005, 0.0, 0.0, 0.0004, 0.0009):
        goals.send(position)
    assert server.positions == [0.04, 0.035, 0.0005, 0.0, 0.0009]
    goals.forget()
    goals.send(0.0009)
    assert server.positions[-2:] == [0.0009, 0.0009]


@pytest.mark.parametrize("ends", [[0.085, 0.01], [0.0, 0.8], [-0.3, 0.1]])
def test_the_ends_are_reached_exactly(ends: list[float]) -> None:
    gripper = {"gripper": ACTION, "gripper_type": "GripperCommand", "gripper_positions": ends}
    topics = build(RosTopics, load("topics", "six_joints") | gripper, "topics")
    embodiment = build(Embodiment, load("embodiment", "six_joints"), "embodiment")
    commands = Commands(topics, embodiment)
    action_A = np.zeros(7, np.float32)
    for value, end in zip((embodiment.gripper_open, embodiment.gripper_close), ends, strict=True):
        action_A[6] = value
        assert commands.gripper(action_A) == end


def test_a_server_that_is_missing_is_an_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    server, now = Server(), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    goals = GripperGoals(server.give, ACTION, (0.04, 0.0), 12)
    server.there = False
    goals.send(0.02)
    server.there = True
    goals.send(0.02)
    assert server.positions == [0.02]
    server.there, now[0] = False, 103.0
    goals.send(0.02)  # nothing to give
    with pytest.raises(ConnectionError, match=f"no action server {ACTION}: start its controller"):
        goals.send(0.03)


# --- over ROS 2 ---


@pytest.fixture(scope="module")
def control_msgs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The processes of a test know control_msgs."""
    pytest.importorskip("rclpy", reason=needs("ros"))
    if reason := gripper_command.missing():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in gripper_command.build(tmp_path_factory.mktemp("control_msgs")).items():
            patch.setenv(name, value)
        yield


class OpenAndClose:
    """Holds the arm where it is, and opens or closes the gripper after every six chunks."""

    def __init__(self, embodiment: Embodiment) -> None:
        self.embodiment, self.number = embodiment, 0

    def describe(self) -> dict[str, Any]:
        return {"preset": "open and close", "parameters": 0}

    def reset(self) -> None:
        """Nothing to forget."""

    def warm_up(self, batch: int, instructions: Any = ()) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> ActionChunk:
        self.number += 1
        actions = np.tile(observation.state[0].astype(np.float32), (1, self.embodiment.chunk, 1))
        actions[..., 6] = self.number // 6 % 2
        return ActionChunk(actions)


@contextmanager
def running(folder: Path, positions: list[float]) -> Iterator[tuple[Any, Any, Any]]:
    """An operator, the lifecycle node and the gripper, whose open and closed positions are given."""
    from cogvla.tests.support.lifecycle_process import TOLERANT, changed, domain_of, lifecycle_node
    from cogvla.tests.support.robot_processes import Operator, Process
    from cogvla.tests.support.topic_robot import TopicRobot

    domain, cameras = domain_of(201), {"agentview": "/front", "wrist": "/wrist"}
    sizes = [{"name": name, "height": 24, "width": 32} for name in cameras]
    gripper = {"gripper": ACTION, "gripper_type": "GripperCommand", "gripper_positions": positions}
    loop = {**TOLERANT, "frozen_after_s": None}
    files = {
        "embodiment": changed(folder, "embodiment", "six_joints", {"cameras": sizes}),
        "robot": changed(folder, "robot", "six_joints", {"loop": loop, "limits": {"gripper_step": None}}),
        "topics": changed(folder, "topics", "six_joints", {"cameras": cameras, "gripper_effort": 12.0, **gripper}),
    }
    embodiment = build(Embodiment, load("embodiment", files["embodiment"]), "embodiment")
    topics = build(RosTopics, load("topics", files["topics"]), "topics")
    server = Process("gripper_server.py", ACTION, domain=domain)
    try:
        until(lambda: "ready" in server.lines)
        with (
            closing(Operator(domain, topics.joints)) as operator,
            serving(OpenAndClose(embodiment)) as (uri, _),
            TopicRobot(topics, embodiment, domain),
            lifecycle_node(operator, folder, server=uri, dry_run=False, instruction="open", **files) as node,
        ):
            node.run()
            yield operator, node, server
    finally:
        server.kill()


def test_goals_between_processes(control_msgs: None, tmp_path: Path) -> None:
    with running(tmp_path, [0.04, 0.0]) as (operator, node, server):
        until(lambda: {"goal 0.0400 12.0", "goal 0.0000 12.0"} <= set(server.lines))
        assert operator.estop() == (True, "engaged")
        number, ticks = len(server.lines), operator.count("tick")
        operator.until(lambda: operator.count("tick") > ticks + 10)
        assert len(server.lines) == number, "after the emergency stop nothing is given"
        operator.estop(False)
        operator.reset()
        assert operator.activate()[0]
        until(lambda: len(server.lines) > number + 1)
        assert len(server.lines) < operator.count("tick") / 2, "a goal is not given in every tick"
        server.kill()
        node.said(f"the gripper has no action server {ACTION}: start its controller")
        operator.state("stopped")


def test_a_goal_that_is_refused_stops_the_arm(control_msgs: None, tmp_path: Path) -> None:
    with running(tmp_path, [4.0, 0.0]) as (operator, node, _):  # above what the gripper of this test can
        node.said("the gripper's controller refuses to move it to ")
        operator.state("stopped")
