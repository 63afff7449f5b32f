"""The simulated robot: its timing with a clock of our own, and the whole chain in processes of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvla.envs.suite import get_suite
from cogvla.envs.tabletop.env import CAMERAS
from cogvla.real_robot.simulated.sensor_faults import SensorFaults
from cogvla.real_robot.simulated.simulated_arm import STATE_NAMES, SceneStart, SceneStatus, SimulatedArm
from cogvla.scripts.command import compose
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.point_suite import toy_suite
from cogvla.tests.support.policy_servers import free_port, get
from cogvla.tests.support.waiting import until

DOMAIN = 40 + os.getpid() % 30

# --- the arm in real time -------------------------------------------------------------------------------------------


class Recorder:
    """A `SimulatedArm` whose time passes only when it sleeps, and what it has said, at which time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.joints: list[tuple[float, Mapping[str, float]]] = []
        self.images: list[tuple[float, Mapping[str, np.ndarray]]] = []
        self.statuses: list[SceneStatus] = []
        suite = get_suite("tabletop_object")
        self.arm = SimulatedArm(
            suite,
            32,
            6,
            lambda joints: self.joints.append((self.now, joints)),
            lambda images, _: self.images.append((self.now, images)),
            self.statuses.append,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def step(self, *actions: float) -> np.ndarray:
        """One step, with a command if there is one; the gripper's position after it."""
        if actions:
            self.arm.command(np.array(actions))
        self.now = max(self.now, self.arm._due + 0.03)  # nobody sleeps for us while we wait for a command
        self.arm.step()
        return np.array([self.joints[-1][1][name] for name in STATE_NAMES[:3]])


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    made = Recorder()
    made.arm.step()
    yield made
    made.arm.close()


def test_joints_come_every_10_ms_and_images_every_50(recorder: Recorder) -> None:
    recorder.joints.clear()
    recorder.images.clear()
    for _ in range(3):
        recorder.step()
    times = np.diff([when for when, _ in recorder.joints])
    assert len(recorder.joints) == 15
    assert np.median(times) == pytest.approx(0.01)
    assert len(recorder.images) == 3
    assert set(recorder.images[0][1]) == {"agentview", "wrist"}
    assert set(STATE_NAMES) < set(recorder.joints[0][1])
    assert {f"joint{i}" for i in range(1, 8)} < set(recorder.joints[0][1])


def test_the_arm_moves_as_commanded_and_stays_where_it_is_without_a_command(recorder: Recorder) -> None:
    recorder.arm.set_scene(SceneStart(1, 0, 0))
    recorder.arm.step()
    start = recorder.step()
    for _ in range(4):
        moved = recorder.step(0.2, 0, 0, 0, 0, 0, -1)
    for _ in range(8):
        rest = recorder.step()
    assert moved[0] > start[0] + 0.02
    np.testing.assert_allclose(rest - start, [0.04, 0, 0], atol=0.004)
    still = recorder.step()
    np.testing.assert_allclose(still, rest, atol=5e-4)


def test_commands_that_come_together_are_all_executed(recorder: Recorder) -> None:
    recorder.arm.set_scene(SceneStart(2, 0, 0))
    recorder.arm.step()
    start = recorder.step()
    for _ in range(3):
        recorder.arm.command(np.array([0.2, 0, 0, 0, 0, 0, -1]))
    began = recorder.now
    for _ in range(3):
        recorder.arm.step()
    assert recorder.now - began < 0.12, "the arm hurries while commands wait"
    for _ in range(8):
        rest = recorder.step()
    np.testing.assert_allclose(rest - start, [0.03, 0, 0], atol=0.004)


def test_steps_are_counted_from_the_first_command(recorder: Recorder) -> None:
    recorder.statuses.clear()
    recorder.arm.set_scene(SceneStart(3, 4, 1))
    for _ in range(4):
        recorder.step()
    assert recorder.statuses == [SceneStatus(3, "put the purple cylinder in the tray")]
    recorder.step(0, 0, 0, 0, 0, 0, -1)
    for _ in range(8):
        recorder.step()
    assert recorder.statuses[1:] == [SceneStatus(3, "put the purple cylinder in the tray", steps=6, over=True)]


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan)])
def test_bad_commands_are_refused(recorder: Recorder, action: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a command is 7 finite numbers"):
        recorder.arm.command(action)


def test_scenes_and_suites_that_do_not_exist_are_refused(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="there are tasks 0 to 9"):
        recorder.arm.set_scene(SceneStart(9, 10, 0))
    ignored: list[Any] = [lambda *_: None] * 3
    with pytest.raises(ValueError, match="has no arm that runs in real time"):
        SimulatedArm(toy_suite(), 32, 5, *ignored)


# --- faults ---------------------------------------------------------------------------------------------------------


def images_of(fault: SensorFaults, count: int = 3) -> list[tuple[int, int, float]]:
    """First pixel, height and stamp of what is sent of images 0, 1, 2, ..., taken at times 10, 11, 12, ..."""
    sent: list[tuple[int, int, float]] = []

    def send(image_HW3: np.ndarray, stamp: float) -> None:
        sent.append((int(image_HW3[0, 0, 0]), len(image_HW3), stamp))

    for i in range(count):
        fault.image("wrist", np.full((4, 4, 3), i, np.uint8), 10.0 + i, send)
    return sent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"fault": "none"}', [(0, 4, 10.0), (1, 4, 11.0), (2, 4, 12.0)]),
        ('{"fault": "silent"}', []),
        ('{"fault": "silent", "sensor": "agentview"}', [(0, 4, 10.0), (1, 4, 11.0), (2, 4, 12.0)]),
        ('{"fault": "frozen", "sensor": "wrist"}', [(0, 4, 10.0), (0, 4, 11.0), (0, 4, 12.0)]),
        ('{"fault": "small"}', [(0, 2, 10.0), (1, 2, 11.0), (2, 2, 12.0)]),
        ('{"fault": "clock", "seconds": -3}', [(0, 4, 13.0), (1, 4, 14.0), (2, 4, 15.0)]),
        ('{"fault": "out_of_order", "seconds": 1.5}', [(0, 4, 8.5), (1, 4, 11.0), (2, 4, 10.5)]),
    ],
)
def test_faults_do_what_they_say(text: str, expected: list[Any]) -> None:
    assert images_of(SensorFaults.from_json(text, CAMERAS)) == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"fault": "fire"}',
        '{"colour": "red"}',
        "fire",
        '{"fault": "silent", "sensor": "wirst"}',
        '{"fault": "late"}',
        '{"fault": "late", "seconds": "1"}',
        '{"fault": "silent", "seconds": 1}',
        '{"fault": "frozen", "sensor": "state"}',
    ],
)
def test_faults_that_would_not_occur_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        SensorFaults.from_json(text, CAMERAS)


# --- the whole chain ------------------------------------------------------------------------------------------------


def test_the_shipped_policy_does_its_task_over_the_wire() -> None:
    """sim_robot -> ROS 2 -> robot_bridge -> websocket -> policy_server -> trajectories of displacements -> arm."""
    pytest.importorskip("rclpy", reason=needs("ros"))
    from cogvla.tests.support.robot_processes import Operator, Process

    port = free_port()
    server = Process("policy_server", f"checkpoint={SHIPPED}", f"port={port}", "threads=1", "device=cpu")
    robot = Process("sim_robot", domain=DOMAIN)
    tolerant = ["robot.loop.image_age_s=0.5", "robot.loop.state_age_s=0.5", "robot.loop.sync_tolerance_s=0.1"]
    uri = f"server=ws://127.0.0.1:{port}"
    bridge = Process("robot_bridge", uri, "dry_run=false", "diagnostics_s=0.1", *tolerant, domain=DOMAIN)
    operator = Operator(DOMAIN)
    try:
        until(lambda: get(f"ws://127.0.0.1:{port}", "/healthz")[0] == 200)
        outcomes = [episode(operator, number, task) for number, task in enumerate((0, 1, 2), 1)]
        assert sum(status["success"] for status in outcomes) >= 2, outcomes
        assert operator.count("inference_ms.count") > 10
        assert operator.count("loop_ms.p50") > 0
        assert operator.diagnostics["fault"] is None
        assert bridge.end() == 0
        assert any(line.startswith("observation to command") for line in bridge.lines)
    finally:
        operator.close()
        for process in (bridge, robot, server):
            process.kill()


def episode(operator: Any, number: int, task: int) -> dict[str, Any]:
    """One scene from its start to its end; its last status."""
    operator.activate(False)
    operator.instruct("")
    status = operator.scene(number, task)
    seen = status["instruction"]
    newest = operator.positions[-1][0]
    operator.until(lambda: operator.positions[-1][0] > newest + 0.3)
    operator.instruct(seen)
    assert operator.activate()[0]
    operator.until(lambda: operator.scenes[-1]["number"] == number and operator.scenes[-1]["over"])
    return operator.scenes[-1]


def test_the_demo_reports_as_an_evaluation_does(tmp_path: Path) -> None:
    pytest.importorskip("rclpy", reason=needs("ros"))
    from cogvla.envs.rollout.video import contact_sheet
    from cogvla.scripts.robot.robot_demo import run

    changes = ["tasks=[0]", "view=video", f"output={tmp_path}", f"domain={DOMAIN + 31}", f"checkpoint={SHIPPED}"]
    config = compose("robot_demo", changes)
    report = run(config, "robot_demo tasks=[0]")
    assert report.total.errors == 0
    assert report.total.success.trials == 1
    assert report.control is not None
    assert report.control.jitter is not None
    assert report.control.counts["action"] > 10
    assert report.total.loop is not None
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["control"]["counts"] == dict(report.control.counts)
    html = (tmp_path / "report.html").read_text()
    assert "tick jitter" in html
    assert "Counters of the control loop" in html
    assert len(contact_sheet(tmp_path / "demo.mp4")) > 1000
