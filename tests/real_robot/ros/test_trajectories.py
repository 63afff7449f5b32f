"""A joint trajectory controller that gets all points of a chunk, from the lifecycle node in a process of its own."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvla.policy.interface import ActionChunk, Camera, Embodiment, Observation
from cogvla.tests.support.extras import needs
from cogvla.tests.support.policy_servers import serving
from cogvla.tests.support.waiting import until

pytest.importorskip("rclpy", reason=needs("ros"))

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.tests.support.lifecycle_process import (
    DEACTIVATE,
    TOLERANT,
    LifecycleProcess,
    changed,
    domain_of,
    lifecycle_node,
)
from cogvla.tests.support.robot_processes import Operator
from cogvla.tests.support.topic_robot import TopicRobot, speeds

DOMAIN = domain_of(176)
CAMERAS = {"agentview": "/front", "wrist": "/wrist"}
EMBODIMENT = replace(
    build(Embodiment, load("embodiment", "six_joints"), "embodiment"),
    cameras=(Camera("agentview", 24, 32), Camera("wrist", 24, 32)),
    chunk=48,
)
PERIOD = 1 / EMBODIMENT.control_hz
STEP = 0.01
"""In rad per tick, 0.3 rad/s; a busy machine delivers some messages late, and the controller makes up for it."""
BACK = STEP * EMBODIMENT.chunk / (1.5 * PERIOD)
"""Speed in rad/s of an arm that is sent back to where it was before the chunk."""


class SweepPolicy:
    """Moves all joints to and fro, for ever, in chunks of 1.6 s."""

    embodiment = EMBODIMENT
    _direction = 1.0

    def describe(self) -> dict[str, Any]:
        return {"preset": "sweep", "parameters": 0}

    def reset(self) -> None:
        """Nothing to forget."""

    def warm_up(self, batch: int, instructions: Any = ()) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> ActionChunk:
        state_S = observation.state[0]
        if abs(state_S[0]) > 0.6:
            self._direction = -np.sign(state_S[0])
        ahead_K1 = STEP * np.arange(1, EMBODIMENT.chunk + 1)[:, None]
        return ActionChunk(np.tile(state_S, (1, EMBODIMENT.chunk, 1)) + np.float32(self._direction * ahead_K1))


def moving(robot: TopicRobot) -> None:
    """Wait until the controller moves, with a trajectory of at least 0.7 s that has just begun."""
    number = robot.controller.received
    until(lambda: robot.controller.received >= number + 2 and len(robot.commands[-1][1].points) > 20)
    until(lambda: speeds(robot.desired[-3:]).max() > 0)


def rests_after(robot: TopicRobot, when: float, within: float = 2.5) -> float:
    """Seconds after a monotonic time until the controller rests, of the next few seconds."""
    until(lambda: robot.desired[-1][0] > when + within)
    later = [(at, value) for at, value in robot.desired if at >= when - 0.05]
    fast = speeds(later)
    return max((at - when for (at, _), speed in zip(later[1:], fast, strict=True) if speed > 1e-6), default=0.0)


def test_a_chunk_is_followed_and_whatever_ends_it_stops_the_arm(tmp_path: Path) -> None:
    cameras = [{"name": name, "height": 24, "width": 32} for name in CAMERAS]
    files = {
        "embodiment": changed(tmp_path, "embodiment", "six_joints", {"cameras": cameras, "chunk": 48}),
        "robot": changed(tmp_path, "robot", "six_joints", {"loop": {**TOLERANT, "frozen_after_s": None}}),
        "topics": changed(tmp_path, "topics", "six_joints", {"cameras": CAMERAS, "points": "chunk"}),
    }
    topics = build(RosTopics, load("topics", files["topics"]), "topics")
    with (
        closing(Operator(DOMAIN, topics.joints)) as operator,
        serving(SweepPolicy()) as (uri, _),
        TopicRobot(topics, EMBODIMENT, DOMAIN) as robot,
        lifecycle_node(operator, tmp_path, server=uri, dry_run=False, instruction="sweep", **files) as node,
    ):
        node.run()
        moving(robot)
        ticks, sent = operator.count("tick"), len(robot.commands)
        moving(robot)
        operator.until(lambda: operator.count("tick") > ticks + 30)
        assert len(robot.commands) - sent < 0.7 * (operator.count("tick") - ticks), (
            "one trajectory is for several ticks"
        )

        ends: dict[str, Callable[[], Any]] = {
            "e-stop": operator.estop,
            "deactivate": lambda: operator.activate(False),
            "reset": operator.reset,
            "lifecycle": lambda: node.change(DEACTIVATE),
        }
        for name, end in ends.items():
            moving(robot)
            asked = time.time()
            assert end()
            answered, at = time.time(), time.monotonic()
            assert rests_after(robot, at, 0.8) < 0.4, f"{name}: the rest of the chunk lasts longer"
            assert robot.since(answered) == [], name
            if len(robot.since(asked)) > 0:
                assert len(robot.since(asked)[-1].points) == 1, name
            if name == "e-stop":
                operator.estop(False)
                operator.reset()
            if name != "lifecycle":
                assert operator.activate()[0]
        suspended_and_killed(node, robot)
        assert speeds(robot.desired).max() < BACK / 2


def suspended_and_killed(node: LifecycleProcess, robot: TopicRobot) -> None:
    """The controller goes on to the end of its trajectory, and the node from there."""
    assert node.change(3)
    for seconds in (0.2, 1.5):
        moving(robot)
        node.process.signal(signal.SIGSTOP)
        time.sleep(0.05)
        at, number = time.monotonic(), len(robot.commands)
        time.sleep(seconds)
        assert len(robot.commands) == number
        if seconds > 1:
            assert 0.0 < rests_after(robot, at) < (EMBODIMENT.chunk + 10) * PERIOD
        node.process.signal(signal.SIGCONT)
    moving(robot)
    node.process.kill()
    at, number = time.monotonic(), len(robot.commands)
    assert rests_after(robot, at) < (EMBODIMENT.chunk + 10) * PERIOD
    assert len(robot.commands) == number
