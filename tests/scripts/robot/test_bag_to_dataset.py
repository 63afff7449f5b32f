"""ROS 2 bags to a LeRobotDataset: which sample belongs to which tick, what ends an episode, what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from omegaconf import DictConfig, OmegaConf

from cogvla.tests.support.extras import needs

pytest.importorskip("rosbags", reason=needs("bags"))

from rosbags.rosbag2 import StoragePlugin, Writer

from cogvla.policy.interface import Camera, Embodiment
from cogvla.real_robot.control.settings import LoopSettings, RobotConfig, SafetyLimits
from cogvla.real_robot.recording.bag_reader import PAUSE_TICKS, BagReader, ticks_of
from cogvla.real_robot.recording.recorder import RecordingFolder
from cogvla.real_robot.ros.messages import (
    array_fields,
    compressed_image_fields,
    image_fields,
    joint_state_fields,
    trajectory_fields,
)
from cogvla.real_robot.ros.node import ARRAY, COMPRESSED_IMAGE, IMAGE, JOINT_STATE, STRING, TRAJECTORY
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.scripts.command import compose
from cogvla.scripts.robot.bag_to_dataset import main
from cogvla.tests.support.bag_messages import STORE, to_cdr

HZ = 10.0
ARM = Embodiment(
    name="bag_arm",
    cameras=(Camera("front", 8, 12), Camera("wrist", 8, 8)),
    state_dim=3,
    action_dim=3,
    chunk=4,
    control_hz=HZ,
    gripper_index=2,
)
TOPICS = RosTopics(
    cameras={"front": "/front/image_raw", "wrist": "/wrist/image_raw/compressed"},
    joint_states="/joint_states",
    joints=("a", "b", "finger"),
    instruction="/instruction",
    command="/commands",
)
DELTA = RobotConfig(
    "bag_arm", SafetyLimits(kind="delta", state_index=(0, 1)), LoopSettings(image_age_s=0.5, state_age_s=0.3)
)
ABSOLUTE = replace(DELTA, limits=SafetyLimits(kind="absolute", state_index=(0, 1)))
BEGIN = 1_700_000_000.0


class Bag:
    """Writes messages at times in seconds after `BEGIN`, as `ros2 bag record` does: MCAP, in the order of arrival."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[tuple[float, str, str, Mapping[str, Any]]] = []

    def add(self, recorded: float, topic: str, kind: str, fields: Mapping[str, Any]) -> None:
        self.messages.append((recorded, topic, kind, fields))

    def sensors(
        self, seconds: float, shift: float = 0.0, wrist_until: float = np.inf, size: int = 8, jump_at: float = -np.inf
    ) -> None:
        """Joints at 50 Hz that say the time, cameras at 20 Hz whose brightness counts images; 10 ms on their way.

        Their clock is `shift` seconds away, from `jump_at` on.
        """

        def clock(when: float) -> float:
            return BEGIN + when + (shift if when >= jump_at else 0.0)

        for i in range(round(seconds * 50)):
            when = i / 50
            joints = joint_state_fields({"b": 10 + when, "finger": 0.5, "a": when}, clock(when))
            self.add(when + 0.01, "/joint_states", JOINT_STATE, joints)
        for i in range(round(seconds * 20)):
            when = i / 20
            image = image_fields(np.full((size, 12, 3), i % 256, np.uint8), clock(when), "front")
            self.add(when + 0.01, TOPICS.cameras["front"], IMAGE, image)
            if when < wrist_until:
                packed = compressed_image_fields(np.full((8, 8, 3), i % 256, np.uint8), clock(when), "wrist")
                self.add(when + 0.01, TOPICS.cameras["wrist"], COMPRESSED_IMAGE, packed)

    def commands(self, begin: float, count: int, hz: float = HZ) -> None:
        """At the control rate or another one; command i is (0.01 i, 0.5, 1)."""
        for i in range(count):
            self.add(begin + i / hz, "/commands", ARRAY, array_fields(np.array([0.01 * i, 0.5, 1.0])))

    def instruct(self, when: float, text: str) -> None:
        self.add(when, "/instruction", STRING, {"data": text})

    def write(self) -> Path:
        with Writer(self.path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            connections: dict[str, Any] = {}
            for recorded, topic, kind, fields in sorted(self.messages, key=lambda m: m[0]):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
                writer.write(connections[topic], round((BEGIN + recorded) * 1e9), to_cdr(kind, fields))
        return self.path


@pytest.fixture
def bag(tmp_path: Path) -> Bag:
    return Bag(tmp_path / "bag")


def reader(bag: Bag, robot: RobotConfig = DELTA, topics: RosTopics = TOPICS, arm: Embodiment = ARM) -> BagReader:
    return BagReader(bag.write(), arm, robot, topics)


def test_every_tick_has_the_newest_samples_and_its_own_command(bag: Bag) -> None:
    bag.sensors(4.0)
    bag.instruct(0.0, "push")
    bag.commands(1.005, 20)
    with reader(bag) as found:
        [episode] = found.episodes()
        pictures = found.pictures(episode)
    assert len(episode) == 20
    assert episode.instruction == "push"
    ticks = 1.005 + np.arange(20) / HZ
    np.testing.assert_allclose([a[0] for a in episode.actions], 0.01 * np.arange(20), atol=1e-9)
    state_T = np.array([s[0] for s in episode.states])
    np.testing.assert_allclose(state_T, np.floor(ticks * 50 + 1e-6) / 50, atol=1e-6)  # joint a says when it was
    np.testing.assert_allclose([s[1] for s in episode.states], 10 + state_T)
    assert episode.images["front"] == [int(tick * 20 + 1e-6) for tick in ticks]
    assert set(pictures) == {"front", "wrist"}
    assert len(pictures["wrist"]) == 20


JITTER = st.lists(st.floats(-0.1, 0.1), min_size=80, max_size=80)
RATE = st.floats(0.98, 1.02)


@given(JITTER, RATE, RATE, st.floats(1.0, 2.0), st.integers(0, 15))
@example([0.1, -0.1] * 40, 1.02, 0.98, 1.45, 0)
@example([0.1, -0.1] * 40, 0.98, 1.02, 1.5, 3)
def test_ticks_follow_the_commands_of_every_phase_and_rate(
    jitter: list[float], first: float, second: float, phase: float, pause: int
) -> None:
    """The stream begins again at another phase, at once or after a pause; times are in periods."""
    after = 39 * first + phase + pause
    times = np.array([first * i for i in range(40)] + [after + second * i for i in range(40)]) + jitter
    ticks = list(ticks_of(times.tolist(), 1.0))
    used = [number for _, number in ticks]
    assert [number for number in used if number is not None] == list(range(80)), "each command once"
    assert None not in used[:40]
    assert None not in used[-40:], "no tick is held while commands come"
    assert abs(len(used) - 80 - (times[40] - times[39] - 1)) < 1, "a pause has as many ticks as fit"
    assert [when for when, number in ticks if number is not None] == times.tolist()
    assert (np.diff([when for when, _ in ticks]) > 0.5 - 1e-6).all()


@given(JITTER, RATE, st.integers(1, 77), st.integers(1, 3))
def test_a_lost_command_is_a_held_tick(jitter: list[float], rate: float, lost: int, count: int) -> None:
    times = rate * np.arange(80) + jitter
    left = [number for number in range(80) if not lost <= number < min(lost + count, 79)]
    used = [number for _, number in ticks_of(times[left].tolist(), 1.0)]
    assert used == [left.index(number) if number in left else None for number in range(80)]


@given(JITTER, st.integers(1, 30))
def test_of_a_faster_stream_every_tick_has_one_command(jitter: list[float], faster: int) -> None:
    times = sorted((np.arange(10 * faster) / faster + np.resize(jitter, 10 * faster) / faster).tolist())
    ticks = list(ticks_of(times, 1.0))
    assert len(ticks) in (10, 11)
    assert None not in [number for _, number in ticks]


def test_a_second_episode_at_another_phase_loses_nothing(bag: Bag) -> None:
    bag.sensors(9.0)
    bag.instruct(0.0, "push")
    bag.commands(0.9, 1)  # a stray one
    bag.commands(1.045, 20, hz=1.01 * HZ)
    jitter = np.random.default_rng(0).uniform(-0.005, 0.005, 20)
    for i in range(20):
        bag.add(6.0 + (i + 0.49) / HZ + jitter[i], "/commands", ARRAY, array_fields(np.array([0.01 * i, 0.5, 1.0])))
    with reader(bag) as found:
        first, second = found.episodes()
    np.testing.assert_allclose([a[0] for a in first.actions], [0, *0.01 * np.arange(20), *[0] * PAUSE_TICKS])
    np.testing.assert_allclose([a[0] for a in second.actions], 0.01 * np.arange(20))
    assert found.unused == 0


@pytest.mark.parametrize(("robot", "held"), [(DELTA, (0.0, 0.0, 1.0)), (ABSOLUTE, (0.09, 0.5, 1.0))])
def test_in_a_short_pause_the_arm_is_held_and_a_long_one_ends_the_episode(
    bag: Bag, robot: RobotConfig, held: tuple[float, ...]
) -> None:
    bag.sensors(8.0)
    bag.instruct(0.0, "push")
    bag.commands(1.0, 10)
    bag.commands(2.5, 10)  # 5 ticks without a command, then 20
    bag.commands(5.5, 5)
    with reader(bag, robot) as found:
        first, second = found.episodes()
    np.testing.assert_allclose(first.actions[10:15], np.tile(held, (5, 1)), atol=1e-9)
    assert len(first) == 25 + PAUSE_TICKS
    assert len(second) == 5
    assert found.skipped["no command"] == 20 - PAUSE_TICKS


def test_a_new_instruction_is_a_new_episode_and_an_empty_one_is_none(bag: Bag) -> None:
    bag.sensors(5.0)
    bag.instruct(0.5, "push")
    bag.instruct(1.95, "pull")
    bag.instruct(2.95, "")
    bag.commands(1.0, 30)
    with reader(bag) as found:
        episodes = found.episodes()
        assert [(e.instruction, len(e)) for e in episodes] == [("push", 10), ("pull", 10)]
        assert found.skipped == {"no instruction": 10}
        [whole] = found.episodes("something else")
        assert (whole.instruction, len(whole)) == ("something else", 30)


def test_a_camera_that_falls_silent_ends_the_episode_and_is_named(bag: Bag) -> None:
    bag.sensors(5.0, wrist_until=2.0)
    bag.instruct(0.0, "push")
    bag.commands(1.0, 30)
    with reader(bag) as found:
        [episode] = found.episodes()
    assert len(episode) == 15  # to 1.95 s, and half a second of grace
    assert found.skipped == {"no image of wrist for 0.5 s": 15}


def test_trajectories_and_a_gripper_of_its_own(bag: Bag) -> None:
    bag.sensors(4.0)
    bag.instruct(0.0, "push")
    bag.add(0.9, "/gripper", ARRAY, array_fields(np.array([-1.0])))
    bag.add(1.52, "/gripper", ARRAY, array_fields(np.array([0.75])))
    for i in range(10):
        fields = trajectory_fields(np.array([[10.0 + i, float(i)]]), ["b", "a"], [0.1])
        bag.add(1.0 + i / HZ, "/trajectory", TRAJECTORY, fields)
    topics = replace(
        TOPICS, command="/trajectory", command_type="trajectory", command_joints=("a", "b"), gripper="/gripper"
    )
    with reader(bag, ABSOLUTE, topics) as found:
        [episode] = found.episodes()
    np.testing.assert_allclose([a[:2] for a in episode.actions], [(i, 10 + i) for i in range(10)])
    assert [a[2] for a in episode.actions] == [-1.0] * 5 + [0.75] * 5
    assert topics.names(ARM) == {"observation.state": ("a", "b", "finger"), "action": ("a", "b", "gripper")}


@pytest.mark.parametrize(("robot", "arm"), [(DELTA, (0.0, 0.0)), (ABSOLUTE, (0.09, 0.5))])
def test_a_gripper_of_its_own_is_commanded_while_the_arm_is_held(
    bag: Bag, robot: RobotConfig, arm: tuple[float, ...]
) -> None:
    bag.sensors(4.0)
    bag.instruct(0.0, "push")
    bag.add(0.9, "/gripper", ARRAY, array_fields(np.array([-1.0])))
    bag.add(2.12, "/gripper", ARRAY, array_fields(np.array([0.75])))
    for when in [*np.arange(1.0, 1.95, 1 / HZ), *np.arange(2.5, 2.95, 1 / HZ)]:  # still from 1.9 s to 2.5 s
        number = min(round((when - 1) * HZ), 9)
        bag.add(float(when), "/commands", ARRAY, array_fields(np.array([0.01 * number, 0.5])))
    with reader(bag, robot, replace(TOPICS, gripper="/gripper")) as found:
        [episode] = found.episodes()
    np.testing.assert_allclose([a[:2] for a in episode.actions[10:15]], np.tile(arm, (5, 1)), atol=1e-9)
    assert [a[2] for a in episode.actions] == [-1.0] * 11 + [0.75] * 9


def test_a_trajectory_of_a_chunk_gives_a_command_for_every_tick_until_the_next_one(bag: Bag) -> None:
    bag.sensors(4.0)
    bag.instruct(0.0, "push")
    bag.add(0.9, "/gripper", ARRAY, array_fields(np.array([0.04])))
    for start in (0, 6):  # the second one comes before the first has ended
        points = np.array([[10.0 + i, float(i)] for i in range(start, start + 9)])
        fields = trajectory_fields(points, ["b", "a"], [1.5 / HZ + i / HZ for i in range(9)])
        bag.add(1.0 + start / HZ, "/trajectory", TRAJECTORY, fields)
    topics = replace(
        TOPICS,
        command="/trajectory",
        command_type="trajectory",
        command_joints=("a", "b"),
        gripper="/gripper",
        gripper_positions=(0.04, 0.0),
        points="chunk",
    )
    with reader(bag, ABSOLUTE, topics) as found:
        [episode] = found.episodes()
    np.testing.assert_allclose(episode.actions, [(i, 10 + i, ARM.gripper_open) for i in range(15)])


@pytest.mark.parametrize("changes", [{"command_type": "array"}, {"joint_states": "/other"}, {"gripper": "/trajectory"}])
def test_topics_with_other_messages_are_refused(bag: Bag, changes: dict[str, Any]) -> None:
    bag.sensors(1.0)
    bag.instruct(0.0, "push")
    fields = trajectory_fields(np.array([[1.0, 2.0, 3.0]]), ["a", "b", "c"], [0.1])
    for topic in ("/trajectory", "/other"):
        bag.add(0.5, topic, TRAJECTORY, fields)
    bag.add(0.5, "/commands", ARRAY, array_fields(np.zeros(3)))
    command = "/commands" if "gripper" in changes else "/trajectory"
    topics = replace(TOPICS, command=command, **{"command_type": "array"} | changes)
    said = "has messages of trajectory_msgs/msg/JointTrajectory, expected"
    with pytest.raises(ValueError, match=said), reader(bag, ABSOLUTE, topics):
        pass


@pytest.mark.parametrize("grips", [(-1.0, 0.5), (-1.0,)])
def test_two_grippers_of_one_topic(bag: Bag, grips: tuple[float, ...]) -> None:
    arm = replace(ARM, gripper_index=(0, 2))
    bag.sensors(4.0)
    bag.instruct(0.0, "push")
    bag.add(0.9, "/gripper", ARRAY, array_fields(np.array(grips)))
    for i in range(10):
        bag.add(1.0 + i / HZ, "/trajectory", TRAJECTORY, trajectory_fields(np.array([[float(i)]]), ["b"], [0.1]))
    topics = replace(
        TOPICS, command="/trajectory", command_type="trajectory", command_joints=("b",), gripper="/gripper"
    )
    robot = replace(ABSOLUTE, limits=SafetyLimits(kind="absolute", state_index=(1,)))
    assert topics.names(arm)["action"] == ("gripper 1", "b", "gripper 2")
    with reader(bag, robot, topics, arm) as found:
        if len(grips) == 2:
            [episode] = found.episodes()
            np.testing.assert_allclose(episode.actions, [(-1.0, i, 0.5) for i in range(10)])
        else:
            with pytest.raises(ValueError, match=r"/gripper in .*: the command has 1 numbers, there are 2 grippers"):
                list(found.episodes())


def test_what_a_bag_must_have_is_said(bag: Bag, tmp_path: Path) -> None:
    bag.sensors(2.0, wrist_until=-1.0)
    bag.commands(0.5, 5)
    with pytest.raises(ValueError, match=r"no camera wrist \(/wrist/image_raw/compressed\); it has /commands, /front"):
        reader(bag).__enter__()
    with pytest.raises(ValueError, match="there is no bag at"):
        BagReader(tmp_path / "nothing", ARM, DELTA, TOPICS).__enter__()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read as a bag"):
        BagReader(tmp_path / "empty", ARM, DELTA, TOPICS).__enter__()


def test_goals_of_a_gripper_are_in_no_bag(bag: Bag) -> None:
    bag.sensors(2.0)
    goals = replace(TOPICS, gripper="/grip", gripper_type="GripperCommand", gripper_positions=(1.0, 0.0))
    with pytest.raises(ValueError, match="GripperCommand: a bag has no goals of actions"):
        reader(bag, topics=goals).__enter__()


def test_nobody_says_what_was_asked_for(bag: Bag) -> None:
    bag.sensors(2.0)
    bag.commands(0.5, 5)
    with reader(bag) as found, pytest.raises(ValueError, match="no /instruction: give instruction="):
        found.episodes()


@given(share=st.floats(0.0, 1.0), byte=st.sampled_from([0x00, 0xFF]))
@settings(max_examples=40, deadline=None)
def test_a_damaged_file_is_read_or_refused(share: float, byte: int) -> None:
    with TemporaryDirectory() as folder:
        bag = Bag(Path(folder) / "bag")
        bag.sensors(2.0)
        bag.instruct(0.0, "push")
        bag.commands(1.005, 5)
        [file] = bag.write().glob("*.mcap")
        whole = bytearray(file.read_bytes())
        at = round(share * (len(whole) - 8))
        whole[at : at + 8] = bytes([byte] * 8)
        file.write_bytes(whole)
        with suppress(ValueError), BagReader(bag.path, ARM, DELTA, TOPICS) as found:
            for episode in found.episodes():
                found.pictures(episode)


@pytest.mark.parametrize("shift", [-BEGIN, -2.0, 2.0])
def test_stamps_of_another_clock_need_another_setting(bag: Bag, shift: float) -> None:
    bag.sensors(3.0, shift=shift)
    bag.instruct(0.0, "push")
    bag.commands(0.5, 10)
    with (
        reader(bag) as found,
        pytest.raises(ValueError, match=r"stamps of /joint_states .* give topics.stamps=arrival"),
    ):
        found.episodes()
    with BagReader(bag.path, ARM, DELTA, replace(TOPICS, stamps="arrival")) as found:
        [episode] = found.episodes()
    assert len(episode) == 10


def test_what_a_jump_of_a_clock_leaves_out_is_said(bag: Bag) -> None:
    bag.sensors(3.0, shift=2.0, jump_at=1.0)
    bag.instruct(0.0, "push")
    bag.commands(0.5, 20)
    with reader(bag) as found:
        [episode] = found.episodes()
        [reason] = found.skipped
    assert 5 <= len(episode) < 20
    assert re.fullmatch(r"no joint state for .* s; some stamps of /joint_states are 2.0 s from the time of .*", reason)


def test_an_instruction_is_not_that_of_what_came_long_before_it(bag: Bag) -> None:
    """Without a latched one at the beginning, nobody knows what was asked for."""
    bag.sensors(6.0)
    bag.instruct(3.95, "pull")
    bag.commands(3.0, 20)
    with reader(bag) as found:
        assert [(e.instruction, len(e)) for e in found.episodes()] == [("pull", 10)]
        assert found.skipped == {"no instruction": 10}


def test_images_of_another_size_are_refused(bag: Bag) -> None:
    bag.sensors(2.0, size=16)
    bag.instruct(0.0, "push")
    bag.commands(0.5, 5)
    with reader(bag) as found:
        [episode] = found.episodes()
        with pytest.raises(ValueError, match=r"'front' is 16x12 in .*, embodiment 'bag_arm' says 8x12"):
            found.pictures(episode)


def command(bag: Bag, output: Path) -> DictConfig:
    """Write a bag of two episodes; return the configuration of the command that converts it."""
    bag.sensors(4.0)
    bag.instruct(0.0, "push")
    bag.instruct(1.95, "pull")
    bag.commands(1.0, 20)
    bag.write()
    config = compose("bag_to_dataset", [f"bags=[{bag.path}]", f"output={output}"])
    OmegaConf.set_struct(config, False)
    values: tuple[tuple[str, Any], ...] = (("embodiment", ARM), ("robot", DELTA), ("topics", TOPICS))
    for group, value in values:
        config[group] = OmegaConf.create(asdict(value))
    return config


def test_episodes_that_were_cut_by_other_settings_are_not_mixed(
    bag: Bag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = command(bag, tmp_path / "made")
    with monkeypatch.context() as stopped:
        stopped.setattr(RecordingFolder, "assemble", lambda self: 0)
        with pytest.raises(ValueError, match="there is no episode"):
            main(config)
    config.robot.loop.image_age_s = 0.2
    with pytest.raises(ValueError, match=r"another source; finish that one, .*delete that folder"):
        main(config)
    config.resume = False
    main(config)
    assert len(LeRobotDataset("cogvla/made", root=tmp_path / "made")) == 20


def test_a_bag_is_known_by_its_content(bag: Bag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = command(bag, tmp_path / "made")
    with monkeypatch.context() as stopped:
        stopped.setattr(RecordingFolder, "assemble", lambda self: 0)
        with pytest.raises(ValueError, match="there is no episode"):
            main(config)
    kept = bag.path.rename(tmp_path / "kept")
    bag.messages = [
        (when, topic, kind, array_fields(np.array([9.0, 9.0, 9.0])) if topic == "/commands" else fields)
        for when, topic, kind, fields in bag.messages
    ]
    bag.write()  # the same times, topics and sizes
    with pytest.raises(ValueError, match=r"another source; finish that one, .*delete that folder"):
        main(config)
    config.bags = [str(kept)]
    main(config)
    assert len(LeRobotDataset("cogvla/made", root=tmp_path / "made")) == 20


def test_all_bags_are_checked_before_the_first_is_converted(
    bag: Bag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = command(bag, tmp_path / "made")
    silent = Bag(tmp_path / "silent")
    silent.sensors(4.0)
    silent.commands(1.0, 20)
    silent.write()
    monkeypatch.setattr(BagReader, "episodes", lambda *_: pytest.fail("it converts"))
    for wrong, said in ((silent.path, "no /instruction: give instruction="), (tmp_path / "no", "there is no bag at")):
        config.bags = [str(bag.path), str(wrong)]
        with pytest.raises(ValueError, match=said):
            main(config)
    assert not (tmp_path / "made.recording").exists()


def test_commands_that_no_tick_has_are_counted(bag: Bag, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag.commands(1.03, 20)  # a second node commands the arm, too
    main(command(bag, tmp_path / "made"))
    said = "left out 20 commands: another one came for the same tick of control_hz=10\n2 episodes in"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("hz", "noted"), [(10.2, False), (12.0, True), (8.0, True)])
def test_another_rate_of_the_commands_is_said(
    bag: Bag, tmp_path: Path, hz: float, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rated = Bag(tmp_path / "rated")
    rated.sensors(6.0)
    rated.instruct(0.5, "push")
    rated.commands(1.0, 30, hz)
    rated.write()
    config = command(bag, tmp_path / "made")
    config.bags = [str(rated.path)]
    main(config)
    said = f"commands come at {hz:g} Hz, and embodiment.control_hz is 10: "
    assert (said in capsys.readouterr().out) is noted


def test_one_bag_is_a_list_of_one(bag: Bag, tmp_path: Path) -> None:
    config = command(bag, tmp_path / "made")
    config.bags = str(bag.path)
    with pytest.raises(ValueError, match=r"give bags='\[FOLDER, ...\]', got '/"):
        main(config)


def test_the_command_makes_a_dataset_and_goes_on_where_it_was(
    bag: Bag, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = command(bag, tmp_path / "made")
    main(config)
    assert "2 episodes in" in capsys.readouterr().out
    data = LeRobotDataset("cogvla/made", root=tmp_path / "made")
    assert data.meta.total_episodes == 2
    assert len(data) == 20
    assert data.fps == 10
    frame = data[3]
    assert frame["task"] == "push"
    assert data.features["observation.state"]["names"] == ["a", "b", "finger"]
    np.testing.assert_allclose(frame["action"], [0.03, 0.5, 1.0], atol=1e-6)
    assert round(float(frame["observation.images.front"].max()) * 255) == 26  # 20 images a second, at 1.3 s
    assert frame["observation.images.wrist"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="is there already"):
        main(config)
    shutil.rmtree(bag.path)
    config.output = str(tmp_path / "other")
    with pytest.raises(ValueError, match="there is no bag at"):
        main(config)
