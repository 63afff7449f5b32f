"""`robot_bridge monitor=FOLDER` to `sim_robot` and the shipped policy as processes: a camera freezes, the arm holds.

The monitor is fitted and calibrated here, by the commands of a user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.policy_servers import free_port, get
from cogvla.tests.support.small_foresight import calibrate, fit, recorded
from cogvla.tests.support.waiting import until

pytest.importorskip("rclpy", reason=needs("ros"))

from cogvla.tests.support.robot_processes import Operator, Process

DOMAIN = 45 + os.getpid() % 30
TOLERANT = [f"robot.loop.{name}" for name in ("image_age_s=1", "state_age_s=1", "sync_tolerance_s=0.2", "deadline_s=5")]
"""So that a busy machine is no fault."""


@pytest.fixture(scope="module")
def monitor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = recorded(tmp_path_factory.mktemp("monitor"))
    fit(root, root / "foresight")
    calibrate(root / "foresight")
    return root / "foresight"


@pytest.fixture
def operator(monitor: Path) -> Iterator[Operator]:
    port = free_port()
    server = Process("policy_server", f"checkpoint={SHIPPED}", f"port={port}", "threads=1", "device=cpu")
    robot = Process("sim_robot", domain=DOMAIN)
    settings = [f"server=ws://127.0.0.1:{port}", f"monitor={monitor}", "dry_run=false", "diagnostics_s=0.05", *TOLERANT]
    bridge = Process("robot_bridge", *settings, "robot.loop.hold_limit_s=120", domain=DOMAIN)
    operator = Operator(DOMAIN)
    try:
        until(lambda: get(f"ws://127.0.0.1:{port}", "/healthz")[0] == 200)
        yield operator
        assert bridge.end() == 0
        assert any("holding: monitor: " in line for line in bridge.lines), "the operator at the terminal reads why"
    finally:
        operator.close()
        for process in (bridge, robot, server):
            process.kill()


def begin(operator: Operator, number: int) -> None:
    """Set up a scene, and let the policy drive."""
    seen = operator.scene(number)["instruction"]
    newest = operator.positions[-1][0]
    operator.until(lambda: operator.positions[-1][0] > newest + 0.3)
    operator.instruct(seen)
    assert operator.activate()[0]
    operator.state("running")


def test_a_frozen_camera_is_an_alarm_until_a_reset(operator: Operator) -> None:
    begin(operator, 1)
    assert operator.diagnostics["alarm"] is None
    operator.fault("frozen", "wrist")
    operator.state("holding", "monitor: wrist: the picture stands still although the arm moves")
    held, tick = operator.commands[-1][0], operator.count("tick")
    operator.fault("none")
    operator.until(lambda: operator.count("tick") > tick + 20)
    assert operator.diagnostics["state"] == "holding", "it stays, although the camera is well again"
    assert operator.count("counts.alarms") == 1
    after = [action for sent, action in list(operator.commands) if sent > held + 0.1]
    assert after, "a hold sends commands"
    assert not np.any([action[:6] for action in after]), "which are no displacement"

    assert operator.reset()[0]
    operator.until(lambda: operator.diagnostics["alarm"] is None)
    begin(operator, 2)
    operator.fault("frozen", "agentview")
    operator.state("holding", "monitor: agentview: ")
    assert operator.count("counts.alarms") == 2
