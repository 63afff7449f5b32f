"""Everything that goes wrong with a real robot, to `sim_robot`, `robot_bridge` and a policy server as processes.

The policy draws circles: it moves the arm for ever. What happens in these tests is described in docs/real_robot.md.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from cogvla.real_robot.serving.wire import pack, unpack
from cogvla.tests.support.extras import needs
from cogvla.tests.support.policy_servers import StallingProxy, free_port, get
from cogvla.tests.support.waiting import until

pytest.importorskip("rclpy", reason=needs("ros"))
pytest.importorskip("rosbags", reason=needs("bags"))

from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from cogvla.real_robot.ros.node import ARRAY, IMAGE, JOINT_STATE, Delivery
from cogvla.tests.support.robot_processes import Operator, Process

DOMAIN = 10 + os.getpid() % 30
PERIOD = 0.05
TOLERANT = [
    "robot.loop.ask=ahead",
    "robot.loop.image_age_s=0.4",
    "robot.loop.state_age_s=0.4",
    "robot.loop.sync_tolerance_s=0.2",
    "robot.loop.frozen_after_s=0.3",
    "robot.loop.deadline_s=2",
    "robot.loop.hold_limit_s=120",
]
"""So that a busy machine is no fault; what is broken on purpose is broken by more."""


class Robot:
    """All processes, and the way between bridge and server."""

    def __init__(self) -> None:
        self.port = free_port()
        self.server = self.start_server()
        self.sim = Process("sim_robot", domain=DOMAIN)
        self.proxy = StallingProxy(f"ws://127.0.0.1:{self.port}")
        self.bridge = self.start_bridge()
        self.operator = Operator(DOMAIN)
        until(lambda: get(f"ws://127.0.0.1:{self.port}", "/healthz")[0] == 200)

    def start_server(self) -> Process:
        return Process("circle_server.py", str(self.port))

    def start_bridge(self, *arguments: str) -> Process:
        return Process(
            "robot_bridge",
            f"server={self.proxy.uri}",
            "dry_run=false",
            "diagnostics_s=0.05",
            "instruction='put the red cube in the tray'",
            *TOLERANT,
            *arguments,
            domain=DOMAIN,
        )

    def run(self) -> Operator:
        """Everything is well, and the arm moves; the operator hears both."""
        began = time.time()
        self.operator.fault("none")
        self.proxy.delay_s = 0.0
        self.proxy.lead_to(f"ws://127.0.0.1:{self.port}")
        self.proxy.resume()
        self.operator.estop(False)
        self.operator.reset()
        self.operator.activate()
        ticks(self.operator)  # what was heard before may be old
        self.operator.state("running")
        self.operator.until(lambda: since(self.operator, began) and len(self.operator.positions) > 5)
        return self.operator

    def close(self) -> None:
        for process in (self.bridge, self.sim, self.server):
            process.kill()
        self.proxy.close()
        self.operator.close()


@pytest.fixture(scope="module")
def whole() -> Iterator[Robot]:
    robot = Robot()
    yield robot
    robot.close()


@pytest.fixture
def robot(whole: Robot) -> Iterator[Robot]:
    yield whole
    held = [action for _, action in whole.operator.commands]
    assert np.isfinite(held).all()
    assert (np.abs(held) <= 1 + 1e-9).all(), "a command is past the limits"


def since(operator: Operator, when: float) -> list[np.ndarray]:
    """Commands that were sent after a time."""
    return [action for sent, action in list(operator.commands) if sent > when]


def ticks(operator: Operator, number: int = 4) -> None:
    """Wait for so many control ticks."""
    last = operator.count("tick") + number
    operator.until(lambda: operator.count("tick") > last)


def still(operator: Operator) -> bool:
    """The gripper has not moved in the last 0.3 s of joint states."""
    heard = list(operator.positions)
    seen = [position for stamp, position in heard if stamp > heard[-1][0] - 0.3]
    return len(seen) > 5 and float(np.ptp([p[:3] for p in seen], axis=0).max()) < 1e-3


def test_an_emergency_stop_in_motion_is_the_last_word(robot: Robot) -> None:
    operator = robot.run()
    operator.until(lambda: not still(operator))
    assert operator.estop() == (True, "engaged")
    stopped = time.time()
    operator.state("stopped", "emergency stop")
    operator.until(lambda: still(operator))
    ticks(operator)
    assert since(operator, stopped) == []
    assert operator.reset() == (False, "the emergency stop is engaged")
    assert operator.activate()[0] is False
    operator.estop(False)
    assert operator.activate() == (False, "stopped: emergency stop; reset first")
    robot.run()


@pytest.mark.parametrize("sensor", ["wrist", "state"])
def test_a_sensor_that_falls_silent_holds_the_arm(robot: Robot, sensor: str) -> None:
    operator = robot.run()
    operator.fault("silent", sensor)
    operator.state("holding", f"{sensor}: ")
    held = time.time()
    if sensor != "state":
        operator.until(lambda: still(operator))
    operator.until(lambda: len(since(operator, held + PERIOD)) >= 3)
    assert not np.any([action[:6] for action in since(operator, held + PERIOD)]), "a hold is no displacement"
    operator.fault("none")
    operator.state("running")


def test_a_frozen_camera_is_seen_although_its_stamps_are_new(robot: Robot) -> None:
    operator = robot.run()
    operator.fault("frozen", "agentview")
    operator.state("holding", "is the camera frozen?")
    operator.fault("none")
    operator.state("running")


def test_a_camera_of_another_size_is_refused(robot: Robot) -> None:
    operator = robot.run()
    operator.fault("small", "wrist")
    operator.state("holding", "expected uint8 (128, 128, 3), got uint8 (64, 64, 3)")
    assert operator.count("refusals.wrist: wrong_image") > 0
    operator.fault("none")
    operator.state("running")


def test_joint_states_out_of_order_are_left_out(robot: Robot) -> None:
    operator = robot.run()
    operator.fault("out_of_order", "state", seconds=0.03)
    before = operator.count("refusals.state: out_of_order")
    operator.until(lambda: operator.count("refusals.state: out_of_order") > before + 5)
    operator.state("running")


@pytest.mark.parametrize(("seconds", "kind"), [(3.0, "stale"), (-3.0, "future")])
def test_a_jump_of_the_sensors_clock_holds_the_arm(robot: Robot, seconds: float, kind: str) -> None:
    operator = robot.run()
    operator.fault("clock", seconds=seconds)
    operator.state("holding")
    operator.until(lambda: operator.count(f"refusals.state: {kind}") > 0)
    operator.fault("none")
    operator.state("running")


def test_a_bridge_that_was_suspended_forgets_its_plan(robot: Robot) -> None:
    operator = robot.run()
    jumps = operator.count("counts.clock_jumps")
    robot.bridge.signal(signal.SIGSTOP)
    time.sleep(1.0)
    robot.bridge.signal(signal.SIGCONT)
    operator.until(lambda: operator.count("counts.clock_jumps") > jumps)
    operator.state("running")


def test_a_slow_server_makes_the_arm_pause_and_no_more(robot: Robot) -> None:
    operator = robot.run()
    late = operator.count("counts.late_actions") + operator.count("counts.late_chunks")
    robot.proxy.delay_s = 0.3  # 6 of a chunk's 8 ticks
    operator.until(lambda: operator.count("counts.starvations") > 1)
    operator.until(lambda: operator.count("counts.late_actions") + operator.count("counts.late_chunks") > late + 10)
    assert operator.diagnostics["fault"] is None
    robot.proxy.delay_s = 0.0
    operator.state("running")


def test_a_network_that_stalls_holds_the_arm(robot: Robot) -> None:
    operator = robot.run()
    misses = operator.count("counts.deadline_misses")
    robot.proxy.stall()
    operator.until(lambda: operator.count("counts.deadline_misses") > misses)
    operator.state("holding")
    operator.until(lambda: still(operator))
    robot.proxy.resume()
    operator.state("running")


def test_a_server_that_dies_is_waited_for(robot: Robot) -> None:
    operator = robot.run()
    robot.server.kill()
    operator.state("holding", "cannot be reached")
    robot.server = robot.start_server()
    operator.state("running")


def test_nan_from_the_server_is_refused(robot: Robot) -> None:
    operator = robot.run()
    with connect(f"ws://127.0.0.1:{robot.port}", proxy=None) as real:
        metadata = real.recv()

    def rogue(connection: ServerConnection) -> None:
        connection.send(metadata)
        for request in connection:
            assert isinstance(request, bytes)
            answer = {"actions": np.full((8, 7), np.nan, np.float32), "server_timing": {}, "policy_timing": {}}
            connection.send(pack({**answer, "observation_id": unpack(request)["observation_id"]}))

    with socket.create_server(("127.0.0.1", 0)) as listener, serve(rogue, sock=listener, close_timeout=0.2) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        robot.proxy.lead_to(f"ws://127.0.0.1:{listener.getsockname()[1]}")
        robot.proxy.cut()
        operator.state("holding", "no finite float actions")
        robot.proxy.lead_to(f"ws://127.0.0.1:{robot.port}")
        robot.proxy.cut()
        server.shutdown()
    operator.state("running")


def test_a_bag_at_twice_the_speed_moves_nothing(robot: Robot, tmp_path: Path) -> None:
    """Its stamps are old. A dry run that takes the time of arrival instead is how to rehearse with a bag."""
    operator = robot.run()
    bag = tmp_path / "bag"
    record(operator, bag, states=80)
    operator.fault("silent")
    operator.state("holding")
    refused = operator.count("refusals.state: stale")
    began = time.time()
    replay(operator, bag, speed=2.0)
    operator.until(lambda: operator.count("refusals.state: stale") > refused + 20)
    ticks(operator)
    assert not np.any([action[:6] for action in since(operator, began)])

    rehearsal = robot.start_bridge("node=/rehearsal", "topics.stamps=arrival", "dry_run=true", "activate=true")
    shown: list[bytes] = []
    operator.node.subscribe_raw("/rehearsal/dry_run", ARRAY, Delivery.COMMAND, lambda cdr, _: shown.append(cdr))
    last = time.monotonic() + 90
    while len(shown) < 10:
        replay(operator, bag, speed=2.0)
        assert time.monotonic() < last, rehearsal.lines
    assert rehearsal.end() == 0
    assert any("dry run: nothing is sent" in line for line in rehearsal.lines)
    assert not np.any([action[:6] for action in since(operator, began)]), "the other bridge has never stopped holding"


def test_an_arm_whose_bridge_is_killed_keeps_its_pose(robot: Robot) -> None:
    operator = robot.run()
    robot.bridge.kill()
    killed = time.time()
    operator.until(lambda: operator.positions[-1][0] > killed + 0.5 and still(operator))
    assert since(operator, killed) == []
    operator.diagnostics = {}
    robot.bridge = robot.start_bridge()
    operator.state("idle")
    ticks(operator)
    assert since(operator, killed) == [], "a bridge that comes back is not active"
    robot.run()


def test_the_bridge_ends_with_a_table(robot: Robot) -> None:
    robot.run()
    assert robot.bridge.end() == 0
    text = "\n".join(robot.bridge.lines)
    assert "observation to command" in text
    assert "tick jitter (20 Hz)" in text


TOPICS = {"/agentview/image_raw": IMAGE, "/wrist/image_raw": IMAGE, "/joint_states": JOINT_STATE}


def record(operator: Operator, path: Path, states: int) -> None:
    """The sensors as an MCAP bag, as `ros2 bag record` writes it, until it has so many joint states."""
    counts = dict.fromkeys(TOPICS, 0)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        lock = threading.Lock()
        recording = threading.Event()
        recording.set()
        for topic, kind in TOPICS.items():
            connection = writer.add_connection(topic, kind, typestore=get_typestore(Stores.ROS2_KILTED))

            def write(cdr: bytes, sent: float, connection: Any = connection) -> None:
                with lock:
                    if recording.is_set():
                        writer.write(connection, round(sent * 1e9), cdr)
                        counts[connection.topic] += 1

            operator.node.subscribe_raw(topic, kind, Delivery.SENSOR, write)
        until(lambda: counts["/joint_states"] >= states and min(counts.values()) >= 10)
        with lock:
            recording.clear()


def replay(operator: Operator, path: Path, speed: float) -> None:
    """As `ros2 bag play --rate`: the bytes as they were recorded."""
    publish = {topic: operator.node.advertise_raw(topic, kind, Delivery.SENSOR) for topic, kind in TOPICS.items()}
    with Reader(path) as reader:
        began, first = time.monotonic(), reader.start_time
        for connection, stamp, cdr in reader.messages():
            time.sleep(max(0.0, (stamp - first) * 1e-9 / speed - (time.monotonic() - began)))
            publish[connection.topic](bytes(cdr))
