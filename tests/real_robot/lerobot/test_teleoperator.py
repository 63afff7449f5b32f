"""A teleoperator of lerobot takes over from the policy: what fits, who drives, faults, and what is recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from omegaconf import DictConfig, OmegaConf

from cogvla.policy.data.interventions import acted
from cogvla.policy.interface import ActionChunk, Observation
from cogvla.real_robot.bridge.bridge import Bridge, BridgeSettings, Tick
from cogvla.real_robot.control.control_loop import Kind, State
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.lerobot.robot import LeRobotFrontEnd, make_robot
from cogvla.real_robot.lerobot.teleoperator import Teleoperation, TeleopSettings, check_units, make_teleoperator
from cogvla.real_robot.recording.recorder import Recorder
from cogvla.real_robot.serving.local_policy import LocalPolicy
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.scripts.command import compose
from cogvla.scripts.robot.drive_robot import main
from cogvla.tests.support.planearm import JOINTS, LIMITS, PLANE, SETTINGS, PlaneArm, PlaneArmConfig, configured
from cogvla.tests.support.planeleader import LEADER, PlaneLeader, PlaneLeaderConfig
from cogvla.tests.support.policy_servers import serving
from cogvla.tests.support.waiting import until, wait_ticks

INSTRUCTION = "stay where you are"
TOLERANT = replace(LIMITS, loop=replace(LIMITS.loop, teleop_age_s=5.0))
OF_POLICY, OF_OPERATOR = 50.0, 20.0
"""The gripper tells who drives."""


def ended_with(items: list[Kind], end: list[Kind]) -> bool:
    return items[-len(end) :] == end


class Stay:
    """The arm at 0, the gripper half open, for ever."""

    embodiment = PLANE

    def describe(self) -> dict[str, Any]:
        return {"preset": "stay", "parameters": 0}

    def reset(self) -> None:
        """Nothing to forget."""

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> ActionChunk:
        actions_BKA = np.zeros((1, PLANE.chunk, 3), np.float32)
        actions_BKA[..., 2] = OF_POLICY
        return ActionChunk(actions_BKA, {"inference_ms": 0.1})


def moved(leader: PlaneLeader, degrees: float) -> None:
    leader.action = dict(zip(JOINTS, (degrees, -degrees, OF_OPERATOR), strict=True))


class Session:
    """A plane arm under a policy, with a leader; `said` are the lines, `ticks` what the loop did."""

    def __init__(self, leader: PlaneLeader, robot: RobotConfig = TOLERANT, recorder: Recorder | None = None) -> None:
        self.leader, self.arm = leader, PlaneArm(PlaneArmConfig(id="test"))
        self.arm.connect(calibrate=False)
        self.said: list[str] = []
        self.ticks: list[Tick] = []
        self._recorder = recorder
        front_end = LeRobotFrontEnd(self.arm, SETTINGS, PLANE, robot.limits)
        settings = BridgeSettings(dry_run=False, activate=True)
        self.bridge = Bridge(robot, PLANE, LocalPolicy(Stay(), PLANE), front_end, settings, self._watch)
        self.operator = Teleoperation(leader, JOINTS, self.bridge, self.said.append)

    def _watch(self, tick: Tick) -> None:
        self.ticks.append(tick)
        if self._recorder is not None:
            self._recorder.show(tick)

    def until_driven_by(self, kind: Kind) -> None:
        until(lambda: self.ticks and self.ticks[-1].command.kind is kind)


@contextmanager
def session(leader: PlaneLeader | None = None, **options: Any) -> Iterator[Session]:
    leader = leader or PlaneLeader(PlaneLeaderConfig(id="test"))
    moved(leader, 0.0)
    made = Session(leader, **options)
    with ExitStack() as stack:
        stack.enter_context(made.bridge)
        made.bridge.instruct(INSTRUCTION)
        stack.enter_context(made.operator)
        stack.callback(leader.answers.set)
        yield made
    assert not leader.is_connected


# --- what fits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "action", "expected"),
    [
        ({}, (), JOINTS),
        ({"keys": " ".join(reversed(JOINTS))}, (), JOINTS),  # the order is that of the robot, by name
        ({"nested": True}, (), JOINTS),
        ({"keys": "a b c d"}, ("c", "a", "b"), ("c", "a", "b")),
    ],
)
def test_keys_come_in_the_order_of_the_robot(
    config: dict[str, Any], action: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    settings = replace(LEADER, config=config, action=action)
    assert settings.keys(make_teleoperator(settings), JOINTS, PLANE) == expected


@pytest.mark.parametrize(
    ("changes", "robot_keys", "message"),
    [
        (
            {"type": "no_such"},
            JOINTS,
            "knows no teleoperator 'no_such', only .*plane_leader.*: teleop.modules must name",
        ),
        ({"modules": ("no.such_module",)}, JOINTS, "teleop.modules names no.such_module, which needs no: install it"),
        ({"config": {"colour": "red"}}, JOINTS, "teleop.config is not for plane_leader: .*colour"),
        (
            {"config": {"keys": "shoulder.pos elbow.pos"}},
            JOINTS,
            "plane_leader gives no gripper.pos; the robot's action",
        ),
        (
            {"config": {"keys": " ".join((*JOINTS, "x.pos"))}},
            JOINTS,
            "plane_leader also gives x.pos; the robot's action",
        ),
        ({"config": {"unnamed": True}}, JOINTS, "plane_leader does not say what its actions are: .*'arm'"),
        (
            {"action": ("shoulder.pos", "x.pos", "gripper.pos")},
            JOINTS,
            "plane_leader gives no x.pos; the robot's action",
        ),
        ({"action": JOINTS[:2]}, JOINTS, "teleop.action names 2 keys, the action of 'plane_arm' has 3 entries"),
        (
            {},
            (),
            "the action of 'plane_arm' has no names: teleop.action must name .*shoulder.pos, elbow.pos, gripper.pos",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    changes: dict[str, Any], robot_keys: tuple[str, ...], message: str
) -> None:
    settings: TeleopSettings = replace(LEADER, **changes)
    with pytest.raises(ValueError, match=message):
        settings.keys(make_teleoperator(settings), robot_keys, PLANE)


def test_a_key_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teleop.action names a key twice: a, b, a"):
        TeleopSettings(action=("a", "b", "a"))


@pytest.mark.parametrize("degrees", [True, False])
def test_arms_that_count_in_other_units_do_not_fit(degrees: bool) -> None:
    """The follower's motors as those of an SO-101, in degrees."""
    follower = make_robot(SETTINGS)
    leader = PlaneLeader(PlaneLeaderConfig(degrees=degrees))
    check_units(leader, follower)  # it has no motors to compare
    follower.bus = PlaneLeader(PlaneLeaderConfig()).bus
    if degrees:
        check_units(leader, follower)
        return
    with pytest.raises(
        ValueError, match="plane_leader gives shoulder as RANGE_M100_100, plane_arm takes DEGREES: make"
    ):
        check_units(leader, follower)


# --- who drives -----------------------------------------------------------------------------------------------------


def test_a_key_takes_over_and_hands_back() -> None:
    with session() as s:
        s.until_driven_by(Kind.ACTION)
        until(lambda: "teleoperator plane_leader is ready" in s.said)
        moved(s.leader, 10.0)
        assert s.operator.toggle() == (True, "the operator drives")
        until(lambda: s.arm.position["shoulder.pos"] == 10.0)
        assert s.arm.position == dict(zip(JOINTS, (10.0, -10.0, OF_OPERATOR), strict=True))
        assert s.operator.toggle() == (True, "the policy drives")
        s.until_driven_by(Kind.ACTION)
        until(lambda: s.arm.position["shoulder.pos"] == 0.0)
    by_operator = [tick.command.action_A for tick in s.ticks if tick.command.kind is Kind.TELEOP]
    assert all(action_A is not None and action_A[2] == OF_OPERATOR for action_A in by_operator)
    steps = np.diff([tick.command.action_A[0] for tick in s.ticks if tick.command.action_A is not None])
    assert np.abs(steps).max() <= 100 / PLANE.control_hz + 1e-6, "faster than the limit"
    assert s.said == ["teleoperator plane_leader is ready"]


def test_an_event_of_the_device_takes_over_and_hands_back() -> None:
    with session() as s:
        s.until_driven_by(Kind.ACTION)
        moved(s.leader, 10.0)
        s.leader.intervenes = True
        s.until_driven_by(Kind.TELEOP)
        s.leader.intervenes = False
        s.until_driven_by(Kind.ACTION)
        s.leader.intervenes = True
        s.until_driven_by(Kind.TELEOP)
        s.bridge.estop(True)
        wait_ticks(s.bridge)
        assert not s.bridge.teleoperated
    ready, took, back, again = s.said
    assert (ready, took) == ("teleoperator plane_leader is ready", "plane_leader: the operator drives")
    assert (back, again) == ("plane_leader: the policy drives", took)


# --- faults of the device ---------------------------------------------------------------------------------------------


def unplug(leader: PlaneLeader) -> None:
    leader.unplugged = True


def give(action: dict[str, Any]) -> Callable[[PlaneLeader], None]:
    def change(leader: PlaneLeader) -> None:
        leader.action = leader.action | action

    return change


def lose_a_key(leader: PlaneLeader) -> None:
    leader.action = {"shoulder.pos": 0.0}


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (unplug, "gives no action, so the arm holds while it drives: DeviceNotConnectedError: it is unplugged"),
        (lose_a_key, "gives no action, so the arm holds while it drives: ValueError: no elbow.pos, gripper.pos in its"),
        (
            give({"elbow.pos": float("nan")}),
            "gives no usable action, so the arm .*: ValueError: teleop: NaN .* at \\[1\\]",
        ),
        (give({"elbow.pos": np.zeros(2)}), "gives no action, .*: ValueError: elbow.pos must be one number, got array"),
        (give({"elbow.pos": None}), "gives no action, .*: ValueError: elbow.pos must be one number, got None"),
        (give({"elbow.pos": "left"}), "gives no action, .*: ValueError: elbow.pos must be one number, got 'left'"),
    ],
)
def test_a_device_that_goes_wrong_is_said_once_and_the_arm_holds(
    fault: Callable[[PlaneLeader], None], line: str
) -> None:
    with session() as s:
        s.until_driven_by(Kind.ACTION)
        until(lambda: s.said)
        s.operator.toggle()
        s.until_driven_by(Kind.TELEOP)
        fault(s.leader)
        s.until_driven_by(Kind.HOLD)
        assert s.bridge.state is State.HOLDING
        connections = s.leader.connections
        if fault is not unplug:
            until(lambda: s.leader.connections > connections + 1)  # it is connected anew, again and again
        s.leader.unplugged = False
        moved(s.leader, 5.0)
        until(lambda: s.arm.position["shoulder.pos"] == 5.0)
        until(lambda: s.said[-1].endswith("is ready"))
    ready, wrong, well = s.said
    assert ready == well
    assert re.match(f"teleoperator plane_leader {line}", wrong), wrong


def test_a_device_that_cannot_be_disconnected_is_made_anew() -> None:
    with session() as s:
        s.until_driven_by(Kind.ACTION)
        until(lambda: s.said)
        s.leader.unplugged = s.leader.stuck = True
        until(lambda: len(s.said) == 3)
        s.operator.toggle()
        s.until_driven_by(Kind.TELEOP)
        s.leader.stuck = False
        s.leader.disconnect()
    ready, wrong, again = s.said
    assert ready == again == "teleoperator plane_leader is ready"
    assert "gives no action" in wrong


def test_a_device_that_does_not_answer_delays_nothing() -> None:
    robot = replace(LIMITS, loop=replace(LIMITS.loop, teleop_age_s=0.5))
    with session(robot=robot) as s:
        s.until_driven_by(Kind.ACTION)
        until(lambda: s.said)
        s.operator.toggle()
        s.until_driven_by(Kind.TELEOP)
        s.leader.answers.clear()
        s.until_driven_by(Kind.HOLD)
        assert "s old, at most 0.5 s are allowed" in s.ticks[-1].command.reason
        wait_ticks(s.bridge)
        s.operator.toggle()
        s.until_driven_by(Kind.ACTION)


@pytest.mark.parametrize(
    ("config", "unplugged", "line"),
    [
        ({}, True, "cannot be connected, so the arm holds while it drives: ConnectionError: no such port"),
        (
            {"calibrated": False},
            False,
            "cannot be connected, .* ValueError: it is not calibrated; run `lerobot-calibrate`",
        ),
    ],
)
def test_one_that_comes_late_or_never_is_said_and_the_policy_drives(
    config: dict[str, Any], unplugged: bool, line: str
) -> None:
    leader = PlaneLeader(PlaneLeaderConfig(id="test", **config))
    leader.unplugged = unplugged
    with session(leader) as s:
        until(lambda: s.said)
        s.until_driven_by(Kind.ACTION)
        s.operator.toggle()
        s.until_driven_by(Kind.HOLD)
        leader.unplugged, leader.config.calibrated = False, True
        s.until_driven_by(Kind.TELEOP)
    wrong, ready = s.said
    assert re.match(f"teleoperator plane_leader {line}", wrong), wrong
    assert ready == "teleoperator plane_leader is ready"


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_what_is_recorded_says_who_acted_and_nothing_is_lost_with_the_device(tmp_path: Path) -> None:
    output = tmp_path / "recorded"
    robot = replace(TOLERANT, loop=replace(TOLERANT.loop, hold_limit_s=0.5))
    with (
        Recorder(output, PLANE, "plane_arm", teleoperated=True) as recorder,
        session(robot=robot, recorder=recorder) as s,
    ):
        s.until_driven_by(Kind.ACTION)
        until(lambda: s.said)
        moved(s.leader, 10.0)
        s.operator.toggle()
        until(lambda: s.arm.position["shoulder.pos"] == 10.0)
        s.operator.toggle()
        until(lambda: s.arm.position["shoulder.pos"] == 0.0)
        s.operator.toggle()
        s.until_driven_by(Kind.TELEOP)
        s.leader.unplugged = True
        until(lambda: s.bridge.state is State.STOPPED)
        until(lambda: recorder.episodes == 1)
        assert "held for more than 0.5 s: teleop: " in str(s.bridge.fault)
    data = LeRobotDataset("cogvla/recorded", root=output)
    assert data.meta.features["intervention"]["dtype"] == "bool"
    sent = [tick for tick in s.ticks if tick.command.action_A is not None]
    assert len(data) == len(sent)
    frames = [data[i] for i in range(len(data))]
    who = acted(torch.stack([torch.as_tensor(frame["intervention"]) for frame in frames]), "intervention")
    assert who.tolist() == [tick.command.kind is Kind.TELEOP for tick in sent]
    assert {True, False} == set(who.tolist())
    for frame, tick in zip(frames, sent, strict=True):
        np.testing.assert_array_equal(frame["action"], np.asarray(tick.command.action_A, np.float32))


@pytest.mark.parametrize("first", [True, False])
def test_a_recording_is_continued_only_with_or_only_without_a_teleoperator(tmp_path: Path, first: bool) -> None:
    class KilledError(Exception):
        """Stands for the end of the process."""

    def record() -> None:
        with Recorder(output, PLANE, "plane_arm", teleoperated=first) as recorder:
            with session(recorder=recorder) as s:
                until(lambda: len(s.arm.sent) > 5)
                s.bridge.activate(False)
                until(lambda: recorder.episodes > 0)
            raise KilledError

    output = tmp_path / "recorded"
    with pytest.raises(KilledError):
        record()
    with pytest.raises(ValueError, match="unfinished recording with another teleoperated"):
        Recorder(output, PLANE, "plane_arm", teleoperated=not first)
    with Recorder(output, PLANE, "plane_arm", teleoperated=first):
        pass
    assert ("intervention" in LeRobotDataset("cogvla/recorded", root=output).meta.features) == first


# --- the command ------------------------------------------------------------------------------------------------------


def command(uri: str, *overrides: str, teleop: TeleopSettings = LEADER) -> DictConfig:
    config = configured(compose("drive_robot", [f"server={uri}", f"instruction={INSTRUCTION}", *overrides]))
    config.robot = OmegaConf.create(asdict(TOLERANT))
    config.teleop = OmegaConf.create(asdict(teleop))
    return config


def test_drive_robot_takes_over_with_a_key_and_records_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "recorded"
    read, write = os.pipe()
    kinds: list[Kind] = []
    show = Recorder.show

    def watch(recorder: Recorder, tick: Tick) -> None:
        show(recorder, tick)
        kinds.append(tick.command.kind)

    monkeypatch.setattr(Recorder, "show", watch)

    def operate() -> None:
        try:
            for key, kind in ((b"a", Kind.ACTION), (b"t", Kind.TELEOP), (b"t", Kind.ACTION), (b"s", Kind.NONE)):
                os.write(write, key)
                until(partial(ended_with, kinds, [kind] * 4))
        finally:
            os.write(write, b"q")

    with serving(Stay(), keys=RequestKeys()) as (uri, _), ThreadPoolExecutor(1) as pool:
        operator = pool.submit(operate)
        main(command(uri, "dry_run=false", f"record={output}"), keyboard=read)
        operator.result()
    said = capsys.readouterr().out
    for line in ("teleoperator plane_leader is ready", "the operator drives", "the policy drives", "1 episodes in"):
        assert line in said
    data = LeRobotDataset("cogvla/recorded", root=output)
    who = [bool(data[i]["intervention"]) for i in range(len(data))]
    assert data.meta.total_episodes == 1
    assert not who[0]
    assert not who[-1]
    changes = int(np.abs(np.diff(np.array(who, int))).sum())
    assert changes == 2, "one take-over and one hand-back"


def test_drive_robot_without_a_teleoperator_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.write(write, b"tq")
    with serving(Stay(), keys=RequestKeys()) as (uri, _):
        main(command(uri, teleop=TeleopSettings()), keyboard=read)
    assert "there is no teleoperator: start with teleop=..." in capsys.readouterr().out


def test_drive_robot_refuses_a_teleoperator_that_does_not_fit_before_anything_is_connected() -> None:
    config = command("ws://127.0.0.1:1", teleop=replace(LEADER, config={"keys": "x.pos"}))
    with pytest.raises(ValueError, match=r"plane_leader gives no shoulder.pos, elbow.pos, gripper.pos"):
        main(config)
