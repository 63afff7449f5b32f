"""The simulated arm as a robot of lerobot: what it observes and executes, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lerobot.robots import RobotConfig, make_robot_from_config

from cogvla.envs.suite import get_suite
from cogvla.tests.support.lerobot_plugin import require_plugin
from cogvla.tests.support.waiting import until

require_plugin()

from lerobot_policy_cogvla.robot_cogvla import ACTION, STATE, TabletopArm

NAME = "cogvla_tabletop"
REST = {**dict.fromkeys(ACTION, 0.0), "gripper.pos": -1.0}


def made(**changes: Any) -> TabletopArm:
    """The robot as lerobot's commands make it."""
    config = RobotConfig.get_choice_class(NAME)(id="test", image_size=32, **changes)
    robot = make_robot_from_config(config)
    assert isinstance(robot, TabletopArm)
    return robot


@pytest.fixture
def arm() -> Iterator[TabletopArm]:
    robot = made(task_index=2, initial_state=7, idle_s=1e6)
    robot.connect()
    yield robot
    robot.disconnect()


def test_the_scene_is_that_of_the_suite(arm: TabletopArm) -> None:
    env = get_suite("tabletop_object").make(image_size=32)
    expected, _ = env.reset(options={"task": 2, "initial_state": 7})
    env.close()
    seen = arm.get_observation()
    assert seen.keys() == arm.observation_features.keys()
    np.testing.assert_allclose([seen[key] for key in STATE], expected["state"], atol=2e-3)
    for camera in arm.cameras:
        assert arm.observation_features[camera] == seen[camera].shape == (32, 32, 3)
        assert np.abs(seen[camera].astype(int) - expected[camera]).mean() < 2


def test_actions_move_the_arm(arm: TabletopArm) -> None:
    before = arm.get_observation()["tcp_z.pos"]

    def lower() -> bool:
        assert arm.send_action(REST | {"tcp_z.vel": -0.5}).keys() == arm.action_features.keys()
        return bool(arm.get_observation()["tcp_z.pos"] < before - 0.02)

    until(lower)


def test_a_new_scene_when_nobody_commands(capfd: pytest.CaptureFixture[str]) -> None:
    robot = made(initial_state=3, idle_s=0.05)
    robot.connect()
    try:
        robot.send_action(REST)
        said = ""

        def again() -> bool:
            nonlocal said
            said += capfd.readouterr().out
            return "initial state 4, " in said

        until(again)
    finally:
        robot.disconnect()
    lines = [line for line in said.splitlines() if line.startswith(f"{NAME}: ")]
    assert lines[0] == f"{NAME}: initial state 3, {get_suite('tabletop_object').tasks[0].instruction!r}: begins"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"elbow.pos": 1.0}, "this arm takes no poses"),
        ({"gripper.pos": float("nan")}, "finite numbers"),
    ],
)
def test_other_actions(arm: TabletopArm, change: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        arm.send_action(REST | change)
    with pytest.raises(ValueError, match="this arm takes no poses"):
        arm.send_action({key: value for key, value in arm.get_observation().items() if key.endswith(".pos")})
    assert arm.is_connected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"suite": "tabletop_objects"}, "unknown suite 'tabletop_objects'"),
        ({"task_index": 10}, "tasks 0 to 9"),
        ({"initial_state": -1}, "initial states from 0"),
        ({"idle_s": 0.0}, "idle_s must be positive"),
    ],
)
def test_wrong_configurations(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        made(**config).connect()
    assert len(str(error.value).splitlines()) == 1


def test_it_must_be_connected_once() -> None:
    robot = made()
    with pytest.raises(ConnectionError, match="is not connected"):
        robot.get_observation()
    robot.connect()
    with pytest.raises(ConnectionError, match="connected already"):
        robot.connect()
    robot.disconnect()
    with pytest.raises(ConnectionError, match="is not connected"):
        robot.send_action(REST)
