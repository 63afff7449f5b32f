"""Robots of lerobot behind the bridge: features, faults, the command `drive_robot`, and what it records."""

from __future__ import annotations

import os
import re
import termios
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lerobot.cameras.opencv import OpenCVCamera, OpenCVCameraConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from omegaconf import DictConfig

from cogvla.envs.recording.demonstration import IMAGE_PREFIX, Demonstration, encode_png, pack_encoded
from cogvla.policy.interface import ActionChunk, Observation
from cogvla.real_robot.bridge.bridge import Bridge, BridgeSettings, Tick
from cogvla.real_robot.control.control_loop import State
from cogvla.real_robot.control.loop_types import Command, Kind
from cogvla.real_robot.control.measurements import latency_table
from cogvla.real_robot.lerobot.robot import LeRobotFrontEnd, LeRobotSettings, capture_times, connected, make_robot
from cogvla.real_robot.recording.recorder import Recorder
from cogvla.real_robot.serving.local_policy import LocalPolicy
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.scripts.command import compose
from cogvla.scripts.robot.drive_robot import main
from cogvla.scripts.robot.robot_bridge import watch
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.planearm import JOINTS, LIMITS, PLANE, SETTINGS, PlaneArm, PlaneArmConfig, configured
from cogvla.tests.support.policy_servers import serving
from cogvla.tests.support.waiting import until, wait_ticks

INSTRUCTION = "sweep to the left"


UNPLUGGED = termios.error(5, "Input/output error")
"""What lerobot's motors raise whose port is unplugged: it is neither an OSError nor a RuntimeError."""


class Device:
    """A camera of lerobot with 50 images per second; `stalls_at` is the time of its last one."""

    stalls_at = float("inf")

    @property
    def latest_timestamp(self) -> float:
        return min(time.perf_counter() // 0.02 * 0.02, self.stalls_at)


class Noted:
    """What a bridge with this clock is told."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead
        self.images: list[tuple[str, float]] = []
        self.states: list[float] = []
        self.refused: list[tuple[str, ...]] = []

    def now(self) -> float:
        return time.perf_counter() + self.ahead

    def observe_image(self, camera: str, image_HW3: np.ndarray, stamp: float) -> None:
        self.images.append((camera, stamp))

    def observe_state(self, state_S: np.ndarray, stamp: float) -> None:
        self.states.append(stamp)

    def refuse(self, *refusal: str) -> None:
        self.refused.append(refusal)


def observed(robot: PlaneArm, ahead: float = 0.0) -> tuple[Any, Callable[[], None]]:
    """What the front end tells a bridge, and a call that lets it read the robot once."""
    bridge: Any = Noted(ahead)
    front_end = LeRobotFrontEnd(robot, SETTINGS, PLANE, LIMITS.limits)
    front_end._now = bridge.now
    return bridge, partial(front_end._observe, bridge)


def more_than(items: Sized, number: int) -> bool:
    return len(items) > number


class Sweep:
    """Targets 1 degree beyond where each joint is, for ever; the gripper half open."""

    embodiment = PLANE

    def describe(self) -> dict[str, Any]:
        return {"preset": "sweep", "parameters": 0}

    def reset(self) -> None:
        """Nothing to forget."""

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> ActionChunk:
        assert list(observation.instruction) == [INSTRUCTION]
        steps_K1 = np.arange(1, PLANE.chunk + 1)[:, None]
        actions_BKA = np.full((1, PLANE.chunk, 3), 50.0, np.float32)
        actions_BKA[0, :, :2] = observation.state[0, :2] + 0.1 * steps_K1
        return ActionChunk(actions_BKA, {"inference_ms": 0.1})


@pytest.fixture
def robot() -> Iterator[PlaneArm]:
    with connected(PlaneArm(PlaneArmConfig(id="test"))) as arm:
        assert isinstance(arm, PlaneArm)
        yield arm


@contextmanager
def bridged(robot: PlaneArm, dry_run: bool = False, on_tick: Callable[[Tick], None] | None = None) -> Iterator[Bridge]:
    front_end = LeRobotFrontEnd(robot, SETTINGS, PLANE, LIMITS.limits)
    settings = BridgeSettings(dry_run=dry_run)
    with Bridge(LIMITS, PLANE, LocalPolicy(Sweep(), PLANE), front_end, settings, on_tick) as bridge:
        bridge.instruct(INSTRUCTION)
        yield bridge


def test_a_robot_of_lerobot_is_made_from_a_file_and_checked_before_it_is_connected() -> None:
    made = make_robot(replace(SETTINGS, config={"id": "test"}))
    assert isinstance(made, PlaneArm)
    SETTINGS.check_robot(made, PLANE)
    assert not made.is_connected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "no_such_arm"}, "knows no robot 'no_such_arm', only .*plane_arm"),
        ({"config": {"colour": "red"}}, "lerobot.config is not for plane_arm: .*colour"),
        ({"config": {"no_camera": True}}, "plane_arm observes no hand; it observes .*top"),
        ({"config": {"high": True}}, r"camera 'top' of plane_arm gives \(16, 12, 3\), .* has 8x12 for 'front'"),
        ({"cameras": {"front": "top", "wrist": JOINTS[0]}}, "camera 'shoulder.pos' of plane_arm gives .*float"),
        ({"state": ("top", *JOINTS[1:])}, "lerobot.state names top, of which plane_arm gives images"),
        ({"cameras": {"front": "top"}}, r"lerobot.cameras has \['front'\]"),
        ({"state": (JOINTS[1], JOINTS[0], JOINTS[2])}, "state_index of shoulder.pos is 0, .* elbow.pos: give 1"),
        ({"state": JOINTS[:2]}, "lerobot.state names 2 features, the state of 'plane_arm' has 3"),
        ({"action": ("shoulder.pos", "elbow.pos", "wrist.pos")}, "name all keys of the robot's action: .*gripper.pos"),
    ],
)
def test_a_robot_that_does_not_fit_is_refused_with_what_to_change(changes: dict[str, Any], message: str) -> None:
    settings: LeRobotSettings = replace(SETTINGS, **changes)
    with pytest.raises(ValueError, match=message):
        LeRobotFrontEnd(make_robot(settings), settings, PLANE, LIMITS.limits)


@pytest.mark.parametrize(
    "changes",
    [{"cameras": {"front": "top", "wrist": "top"}}, {"state": JOINTS[:1] * 3}, {"action": (*JOINTS, JOINTS[0])}],
)
def test_a_key_of_a_robot_named_twice_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"lerobot.{next(iter(changes))} names a key twice"):
        replace(SETTINGS, **changes)


def test_a_robot_without_calibration_is_left_alone() -> None:
    robot = PlaneArm(PlaneArmConfig(calibrated=False))
    with pytest.raises(ValueError, match="not calibrated: run `lerobot-calibrate`"), connected(robot):
        pass
    assert not robot.is_connected


def test_the_arm_follows_the_policy_and_stops_at_the_estop(robot: PlaneArm) -> None:
    commanded: list[np.ndarray] = []

    def watch(tick: Tick) -> None:
        if tick.command.action_A is not None:
            commanded.append(tick.command.action_A)

    with bridged(robot, on_tick=watch) as bridge:
        wait_ticks(bridge)
        assert robot.sent == [], "a bridge that is not active sends nothing"
        bridge.activate()
        until(lambda: robot.position["shoulder.pos"] > 1.0 and len(robot.sent) > 10)
        bridge.estop(True)
        seen = len(robot.sent)
        wait_ticks(bridge)
        assert len(robot.sent) <= seen + 1, "at most the message that was being written"
        assert bridge.fault == "emergency stop"
    assert set(robot.sent[0][1]) == set(JOINTS)
    assert robot.sent[-1][1]["gripper.pos"] == 50.0
    positions = [action[JOINTS[0]] for _, action in robot.sent]
    assert (np.diff(positions) >= 0).all()
    # Of each tick, because a busy machine does not send every command.
    steps = np.diff([action_A[0] for action_A in commanded])
    assert steps.max() <= 100 / PLANE.control_hz + 1e-6, "faster than the limit"


def test_an_arm_without_an_instruction_says_so(
    robot: PlaneArm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bridged(robot) as bridge:
        bridge.instruct("")
        bridge.activate()
        until(lambda: bridge.diagnostics()["holds"] == "no instruction")
        ends = iter([False, True])
        monkeypatch.setattr(bridge, "wait", lambda _: next(ends))
        watch(bridge, threading.Event())
    assert "holding: no instruction" in capsys.readouterr().out


def test_a_dry_run_moves_nothing(robot: PlaneArm) -> None:
    with bridged(robot, dry_run=True) as bridge:
        bridge.activate()
        until(lambda: bridge.measurements.counts["dry_run"] > 3)
    assert robot.sent == []


@pytest.mark.parametrize(
    ("fault", "value", "said"),
    [
        ("silent", "hand", "wrist: the robot gave no 'hand'"),
        ("silent", "elbow.pos", "state: no elbow.pos"),
        ("unreadable", ConnectionError("no status packet"), "state: ConnectionError: no status packet"),
        ("unreadable", UNPLUGGED, "state: error: (5, 'Input/output error')"),
    ],
)
def test_what_cannot_be_read_is_said_and_becomes_stale(robot: PlaneArm, fault: str, value: Any, said: str) -> None:
    with bridged(robot) as bridge:
        bridge.activate()
        until(lambda: bridge.state is State.RUNNING)
        setattr(robot, fault, value)
        until(lambda: said in bridge.diagnostics()["last_refusal"].values())
        until(lambda: bridge.state is State.HOLDING)
        setattr(robot, fault, None)
        until(lambda: bridge.state is State.RUNNING)


@pytest.mark.parametrize("ahead", [0.0, 1e6, -1e6])
def test_an_image_is_as_old_as_its_camera_says(robot: PlaneArm, ahead: float) -> None:
    device = SimpleNamespace(latest_timestamp=time.perf_counter() - 0.4)
    robot.cameras = {"top": device, "hand": SimpleNamespace(latest_timestamp=None), "other": None}
    bridge, observe = observed(robot, ahead)
    before = bridge.now()
    observe()
    (front, taken), (wrist, read) = bridge.images
    assert (front, wrist) == ("front", "wrist")
    assert device.latest_timestamp + ahead - 0.1 < taken <= device.latest_timestamp + ahead + 1e-6
    assert before <= read == bridge.states[0] <= bridge.now(), "it is not known when: the time of the reading"

    observe()
    assert [camera for camera, _ in bridge.images[2:]] == ["wrist"], "the same image again"
    assert bridge.refused == []
    device.latest_timestamp += 0.1
    observe()
    assert [camera for camera, _ in bridge.images[3:]] == ["front", "wrist"]
    device.latest_timestamp += 1e9  # another clock
    observe()
    assert bridge.images[-2][1] == bridge.states[-1]
    assert len(bridge.states) == 4


def test_robots_with_two_arms_and_without_cameras() -> None:
    left, right, third = (SimpleNamespace(latest_timestamp=taken) for taken in (1.0, 2.0, None))
    arms = {
        "left_arm": SimpleNamespace(cameras={"wrist": left}),
        "right_arm": SimpleNamespace(cameras={"wrist": right}),
    }
    robot: Any = SimpleNamespace(cameras={"wrist": right, "top": third}, **arms)
    assert capture_times(robot) == {"wrist": 2.0, "left_wrist": 1.0, "right_wrist": 2.0}
    nothing: Any = SimpleNamespace()
    assert capture_times(nothing) == {}


def test_lerobots_own_camera_says_when_it_took_an_image() -> None:
    camera = OpenCVCamera(OpenCVCameraConfig(0))
    assert camera.latest_timestamp is None


def test_a_read_that_fails_is_the_reason_of_every_sensor(robot: PlaneArm) -> None:
    robot.unreadable = TimeoutError("top: latest frame is too old")
    bridge, observe = observed(robot)
    observe()
    reason = "TimeoutError: top: latest frame is too old"
    assert bridge.refused == [(sensor, "unreadable", reason) for sensor in ("front", "wrist", "state")]


def test_a_camera_that_stalls_holds_the_arm_although_it_is_read(robot: PlaneArm) -> None:
    robot.cameras = {"top": Device(), "hand": Device()}
    reasons: set[str] = set()

    def watch(tick: Tick) -> None:
        if tick.command.kind is Kind.HOLD:
            reasons.add(str(tick.command.reason))

    with bridged(robot, on_tick=watch) as bridge:
        bridge.activate()
        until(lambda: bridge.state is State.RUNNING)
        robot.cameras["top"].stalls_at = time.perf_counter()
        until(lambda: any("front: 2." in reason for reason in reasons))
        assert not any("duplicate" in kind for kind in bridge.diagnostics()["refusals"])
        robot.cameras["top"].stalls_at = float("inf")
        until(lambda: bridge.state is State.RUNNING)
        robot.unreadable = ConnectionError("no status packet")
        said = "s old, at most 2 s are allowed; ConnectionError: no status packet"
        until(lambda: any(said in reason for reason in reasons))


@pytest.mark.parametrize("error", [ConnectionError("the port is gone"), UNPLUGGED])
def test_a_robot_that_takes_no_commands_ends_the_bridge(robot: PlaneArm, error: Exception) -> None:
    robot.unwritable = error
    with bridged(robot) as bridge:
        bridge.activate()
        with pytest.raises(ConnectionError, match=f"plane_arm takes no command: .*{re.escape(str(error))}"):
            bridge.wait(30)


def test_a_robot_that_cannot_be_disconnected_hides_no_error(caplog: pytest.LogCaptureFixture) -> None:
    arm = PlaneArm(PlaneArmConfig(id="test"))
    arm.stuck = UNPLUGGED
    with pytest.raises(ConnectionError, match="takes no command"), connected(arm):
        raise ConnectionError("it takes no command")
    assert "was not disconnected, so its motors may go on to hold: error: (5, 'Input/output error')" in caplog.text


def test_a_command_that_waited_for_too_long_is_dropped(robot: PlaneArm) -> None:
    """The robot is busy for several periods: what it was told meanwhile has lost its meaning."""
    with bridged(robot) as bridge:
        bridge.activate()
        until(lambda: len(robot.sent) > 3)
        front_end = bridge._front_end
        assert isinstance(front_end, LeRobotFrontEnd)
        sent = len(robot.sent)
        front_end._act(bridge, np.zeros(3), bridge.now() - 2 / PLANE.control_hz)
        assert all(action["gripper.pos"] == 50.0 for _, action in robot.sent[sent:]), "the old command was sent"


def test_commands_that_a_busy_robot_does_not_take_are_counted(robot: PlaneArm, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr(robot, "send_action", lambda action: free.wait(60) and action)
    with bridged(robot) as bridge:
        bridge.activate()
        until(lambda: bridge.measurements.counts["unsent"] >= 3)
        free.set()
        assert "unsent" in latency_table(bridge.measurements, PLANE.control_hz)


def test_what_the_robot_did_becomes_a_dataset(robot: PlaneArm, tmp_path: Path) -> None:
    output = tmp_path / "recorded"
    commanded: set[tuple[float, ...]] = set()
    with Recorder(output, PLANE, "plane_arm") as recorder:

        def watch(tick: Tick) -> None:
            if tick.command.action_A is not None:
                commanded.add(tuple(tick.command.action_A.astype(np.float32)))
            recorder.show(tick)

        with bridged(robot, on_tick=watch) as bridge:
            for episode in range(3):
                until(lambda: bridge.activate() and len(robot.sent) > 0)
                until(partial(more_than, robot.sent, len(robot.sent) + 8))
                bridge.activate(False)
                wait_ticks(bridge)  # the recorder is told that nothing is commanded any more
                if episode == 1:
                    recorder.end_episode(keep=False)
    assert recorder.episodes == 2
    assert not output.with_name("recorded.recording").exists()
    data = LeRobotDataset("cogvla/recorded", root=output)
    assert data.meta.total_episodes == 2
    assert data.fps == 20
    assert list(data.meta.tasks.index) == [INSTRUCTION]
    frames = [data[i] for i in range(len(data))]
    actions = np.stack([frame["action"] for frame in frames])
    sent_actions = {tuple(np.array(list(action.values()), np.float32)) for _, action in robot.sent}
    assert {tuple(action) for action in actions} | sent_actions <= commanded, "other actions than were commanded"
    for frame in frames:  # image and state were read together
        assert frame["observation.images.front"].shape == (3, 8, 12)
        level = round(float(frame["observation.images.front"].max()) * 255)
        assert level == int(100 + float(frame["observation.state"][0]))


def test_an_episode_ends_where_samples_are_missing(tmp_path: Path) -> None:
    """After a jump of the clock, states and pictures come back one after the other."""
    recorder = Recorder(tmp_path / "recorded", PLANE, "plane_arm")
    images = dict.fromkeys(PLANE.camera_names, np.zeros((8, 12, 3), np.uint8))
    state = np.zeros(PLANE.state_dim)
    commands = [Command(Kind.ACTION, n, np.full(PLANE.action_dim, n)) for n in range(9)]
    whole = [Tick(each, images, state, INSTRUCTION, each.tick / 20) for each in commands]
    gap = [replace(whole[4], state_S=None, images={}), replace(whole[5], images=dict(list(images.items())[1:]))]
    recorder._write(iter([*whole[:4], *gap, *whole[6:]]))
    assert recorder.episodes == 2
    assert recorder._folder.assemble() == 2
    data = LeRobotDataset("cogvla/recorded", root=tmp_path / "recorded")
    assert [data[i]["action"][0].item() for i in range(len(data))] == [0, 1, 2, 3, 6, 7, 8]


def test_the_rest_of_a_dropped_episode_is_dropped_too(tmp_path: Path) -> None:
    """The operator drops what goes wrong while the arm moves, and stops it a moment later."""
    recorder = Recorder(tmp_path / "recorded", PLANE, "plane_arm")
    images = {camera.name: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in PLANE.cameras}
    ticks = [
        Tick(Command(Kind.ACTION, n, np.full(PLANE.action_dim, n)), images, np.zeros(PLANE.state_dim), INSTRUCTION, n)
        for n in range(14)
    ]
    stopped = replace(ticks[0], command=Command(Kind.NONE, 0, None))
    recorder._write(iter([*ticks[:3], stopped, *ticks[3:6], "drop", ticks[6], "drop", *ticks[7:9], stopped]))
    assert recorder.episodes == 1, "the episode before stays"
    asked = [replace(tick, instruction="sweep to the right") for tick in ticks[12:]]
    recorder._write(iter([*ticks[9:11], "drop", ticks[11], *asked]))
    assert recorder._folder.assemble() == 2
    data = LeRobotDataset("cogvla/recorded", root=tmp_path / "recorded")
    assert [data[i]["action"][0].item() for i in range(len(data))] == [0, 1, 2, 12, 13]


def test_a_recording_that_was_killed_goes_on(robot: PlaneArm, tmp_path: Path) -> None:
    output = tmp_path / "recorded"

    class KilledError(Exception):
        """Stands for the end of the process."""

    def record(error: Exception | None) -> Recorder:
        with Recorder(output, PLANE, "plane_arm") as recorder, bridged(robot, on_tick=recorder.show) as bridge:
            bridge.activate()
            sent = len(robot.sent)
            until(lambda: len(robot.sent) > sent + 5)
            bridge.activate(False)
            until(lambda: recorder.episodes > 0)
            if error is not None:
                raise error
        return recorder

    with suppress(KilledError):
        record(KilledError())
    assert not output.exists()
    with pytest.raises(ValueError, match="unfinished recording with another robot"):
        Recorder(output, PLANE, "another_arm")
    assert record(None).episodes == 2
    assert LeRobotDataset("cogvla/recorded", root=output).meta.total_episodes == 2
    with pytest.raises(ValueError, match="is there already; record into another folder"):
        Recorder(output, PLANE, "plane_arm")


def test_a_machine_that_cannot_record_as_fast_says_so(tmp_path: Path, robot: PlaneArm) -> None:
    recorder = Recorder(tmp_path / "recorded", PLANE, "plane_arm")  # its thread does not run: nothing is encoded
    recorder._waiting.maxsize = 3
    with bridged(robot, on_tick=recorder.show) as bridge:
        bridge.activate()
        with pytest.raises(ValueError, match="cannot keep up"):
            bridge.wait(30)


def moving(count: int) -> list[Tick]:
    """Ticks with commands and pictures of noise, of about 300 bytes."""
    noise = np.random.default_rng(0)
    return [
        Tick(
            Command(Kind.ACTION, n, np.full(PLANE.action_dim, n)),
            {c.name: noise.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in PLANE.cameras},
            np.zeros(PLANE.state_dim),
            INSTRUCTION,
            n / 20,
        )
        for n in range(count)
    ]


def test_pictures_of_the_running_episode_are_on_disk(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "recorded", PLANE, "plane_arm")
    episodes = tmp_path / "recorded.recording" / "episodes"
    ticks = moving(90)
    seen: list[list[str]] = []

    def watched() -> Iterator[Tick | str]:
        yield from ticks[:50]
        seen.append(sorted(path.name for path in episodes.iterdir()))
        yield "drop"
        seen.append(sorted(path.name for path in episodes.iterdir()))
        yield replace(ticks[0], command=Command(Kind.NONE, 0, None))
        yield from ticks[50:]

    recorder._write(watched())
    assert seen == [[f".running.{camera}" for camera in range(len(PLANE.cameras))], []]
    assert [path.name for path in episodes.iterdir()] == ["000000.npz"]
    saved = Demonstration.load(episodes / "000000.npz")
    for name in PLANE.camera_names:
        files = [encode_png(tick.images[name]) for tick in ticks[50:]]
        assert saved.images[IMAGE_PREFIX + name] == files
        statistics = pack_encoded("", 20, saved.arrays, {name: files}).image_statistics[name]
        assert {key: value.tolist() for key, value in statistics.items()} == {
            key: value.tolist() for key, value in saved.image_statistics[IMAGE_PREFIX + name].items()
        }


def test_pictures_need_no_memory_however_long_the_episode_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    camera = replace(PLANE.cameras[0], height=200, width=200)
    recorder = Recorder(tmp_path / "recorded", replace(PLANE, cameras=(camera,)), "plane_arm")
    picture = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)  # 0.12 MB
    png = encode_png(picture)
    monkeypatch.setattr("cogvla.real_robot.recording.recorder.encode_png", lambda _: png)  # takes most of the time
    tick = replace(moving(1)[0], images={camera.name: picture})
    tracemalloc.start()
    try:
        recorder._write(tick for _ in range(400))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    [saved] = (tmp_path / "recorded.recording" / "episodes").iterdir()
    assert saved.stat().st_size > 48e6
    assert most < 36e6  # numpy writes 16 MB at a time


def test_a_full_disk_ends_the_recording_and_what_is_finished_stays(tmp_path: Path) -> None:
    output = tmp_path / "recorded"
    ticks = moving(200)
    stopped = replace(ticks[0], command=Command(Kind.NONE, 0, None))
    recorder = Recorder(output, PLANE, "plane_arm")

    def until_full() -> None:
        for tick in [*ticks[:5], stopped, *ticks]:
            recorder.show(tick)
        until(lambda: recorder._failure is not None)
        recorder.show(stopped)

    with files_limited_to(20_000), pytest.raises(OSError, match="File too large"), recorder:
        until_full()
    assert [path.name for path in (output.with_name("recorded.recording") / "episodes").iterdir()] == ["000000.npz"]
    with Recorder(output, PLANE, "plane_arm") as again:
        assert again.episodes == 1
    assert LeRobotDataset("cogvla/recorded", root=output).meta.total_frames == 5


def test_ticks_of_an_idle_robot_are_not_queued(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "recorded", PLANE, "plane_arm")  # its thread does not run yet
    recorder._waiting.maxsize = 12
    ticks = moving(9)
    idle = [replace(tick, command=Command(Kind.NONE, tick.command.tick, None)) for tick in moving(30)]
    for tick in [*idle, *ticks[:4], *idle, *ticks[4:], *idle]:
        recorder.show(tick)
    assert recorder._waiting.qsize() == 11, "each episode, and that it has ended"
    with recorder:
        pass
    assert recorder.episodes == 2


def command(uri: str, *overrides: str) -> DictConfig:
    """`drive_robot` for the plane arm."""
    config = compose("drive_robot", [f"server={uri}", f"instruction={INSTRUCTION}", *overrides])
    return configured(config)


def test_drive_robot_with_keys_over_the_wire(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "recorded"
    read, write = os.pipe()
    sent: list[dict[str, float]] = []
    idle: list[Tick] = []
    send_action, show = PlaneArm.send_action, Recorder.show

    def send(arm: PlaneArm, action: dict[str, float]) -> dict[str, float]:
        sent.append(action)
        return send_action(arm, action)

    def watch(recorder: Recorder, tick: Tick) -> None:
        show(recorder, tick)
        if tick.command.action_A is None:
            idle.append(tick)

    monkeypatch.setattr(PlaneArm, "send_action", send)
    monkeypatch.setattr(Recorder, "show", watch)

    def operate() -> None:
        for key in (b"a", b" ", b"r", b"a", b"s"):
            watched, least = (sent, 15) if key == b"a" else (idle, 1)
            before = len(watched)
            os.write(write, key)
            until(partial(more_than, watched, before + least))
        os.write(write, b"q")

    with serving(Sweep(), keys=RequestKeys()) as (uri, _), ThreadPoolExecutor(1) as pool:
        operator = pool.submit(operate)
        main(command(uri, "dry_run=false", f"record={output}"), keyboard=read)
        operator.result()
    said = capsys.readouterr().out
    assert "plane_arm by sweep" in said
    assert "engaged" in said
    assert "observation to command" in said
    assert "2 episodes in" in said
    recorded = LeRobotDataset("cogvla/recorded", root=output).meta
    assert recorded.total_episodes == 2
    assert [recorded.features[name]["names"] for name in ("observation.state", "action")] == [list(JOINTS)] * 2


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("the robot was connected")

    monkeypatch.setattr(PlaneArm, "connect", connect)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limits": {"velocity": [100.0]}}, "velocity has 1 entries; 'plane_arm' has 2 arm dimensions"),
        ({"loop": {"clock_gap_s": 0.01}}, "clock_gap_s must be longer than a control period"),
    ],
)
def test_limits_that_do_not_fit_are_refused_before_the_robot_is_connected(
    unconnected: None, changes: dict[str, Any], message: str
) -> None:
    with serving(Sweep(), keys=RequestKeys()) as (uri, _):
        config = command(uri)
        config.robot.merge_with(changes)
        with pytest.raises(ValueError, match=message):
            main(config)


def test_a_folder_that_is_there_is_refused_before_the_robot_is_connected(tmp_path: Path, unconnected: None) -> None:
    (tmp_path / "data.txt").touch()
    with serving(Sweep(), keys=RequestKeys()) as (uri, _), pytest.raises(ValueError, match="is there already"):
        main(command(uri, "dry_run=false", f"record={tmp_path}"))


def test_drive_robot_refuses_what_cannot_be() -> None:
    with serving(Sweep(), keys=RequestKeys()) as (uri, _):
        with pytest.raises(ValueError, match="give dry_run=false with record"):
            main(command(uri, "record=somewhere"))
        with pytest.raises(ValueError, match="transport must be one of rclpy, lerobot"):
            main(command(uri, "transport=carrier_pigeon"))
        with pytest.raises(
            ValueError, match="statistics=pick threads=2: the policy is in its server: give this to pol"
        ):
            main(command(uri, "statistics=pick", "threads=2"))
        with pytest.raises(
            ValueError, match="jpeg_quality=90: this is for a policy server, but checkpoint=X runs in this"
        ):
            main(command(uri, "checkpoint=X", "jpeg_quality=90"))
        with pytest.raises(ValueError, match=f"a certificate is given, but {uri} is no address of a server with TLS"):
            main(command(uri, "certificate=ca.pem"))
        config = command(uri)
        config.embodiment.control_hz = 10.0
        with pytest.raises(ValueError, match=r"control_hz: robot 10\.0, policy 20\.0"):
            main(config)
