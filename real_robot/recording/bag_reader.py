"""Read training episodes from a ROS 2 bag (MCAP or SQLite), resampled to the control rate.

    camera   ---o-----o-----o-----o---          each sensor gives its newest sample at the tick,
    joints   -o-o-o-o-o-o-o-o-o-o-o-o-
    command  ----x----x--------x----x-          ticks follow the commands; where one is missing, the tick is held
    tick     ----|----|----|---|----|-

The reader needs little memory: it first reads the times of all images, and later decodes the images of one episode at a
time.

Shape legend: A action dimension, D action without grippers that have their own topic, G grippers, S state dimension.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection
from rosbags.typesys import Stores, get_typestore

from cogvla.envs.recording.demonstration import encode_png
from cogvla.files import file_hash, visible
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.ros.commands import Commands
from cogvla.real_robot.ros.messages import compressed_image_of, image_of, state_of
from cogvla.real_robot.ros.node import ARRAY, COMPRESSED_IMAGE, IMAGE, JOINT_STATE, STRING, seconds_of
from cogvla.real_robot.ros.topics import COMMANDS, RosTopics

DISTROS = {
    "humble": Stores.ROS2_HUMBLE,
    "iron": Stores.ROS2_IRON,
    "jazzy": Stores.ROS2_JAZZY,
    "kilted": Stores.ROS2_KILTED,
}
STORAGE = (".mcap", ".db3", ".zstd")
"""Endings of the files with messages; `ros2 bag reindex` writes the others anew."""
LATCHED_S = 2.0
"""Seconds from the beginning of a bag in which the recorder finds a latched instruction that was given before."""
PAUSE_TICKS = 10
"""Number of ticks without a command that end an episode; in shorter pauses the arm was held."""


@dataclass
class Samples:
    """Samples of one topic, in the order of their times.

    Attributes:
        times: times in seconds.
        values: states [S], commands, texts, or (for images) indices of messages.
    """

    times: list[float] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def sort(self) -> None:
        """Sort by time, because messages may be recorded in another order than that of their stamps."""
        order = sorted(range(len(self.times)), key=self.times.__getitem__)
        self.times = [self.times[i] for i in order]
        self.values = [self.values[i] for i in order]

    def newest(self, when: float, age_s: float = float("inf")) -> Any | None:
        """Return the newest value at time `when`, or None if it is older than `age_s` seconds."""
        index = bisect_right(self.times, when) - 1
        return self.values[index] if index >= 0 and when - self.times[index] <= age_s else None


def ticks_of(times: Sequence[float], period: float) -> Iterator[tuple[float, int | None]]:
    """Yield the ticks of a stream of commands: their times, and the indices of their commands, None without one.

    A command belongs to a tick if it comes within half a period of when the tick is due. The tick has the time of its
    command, and the next one is due a period after the middle of this time and the due one: so ticks follow another
    rate and another phase, and little of the jitter. After a tick without a command, the next command begins anew.

    Args:
        times: times of the commands in seconds, in order.
        period: seconds from tick to tick.
    """
    half, due, number, running = period / 2, times[0] if times else 0.0, 0, False
    while number < len(times):
        if times[number] >= due + half:
            yield due, None
            due, running = due + period, False
            continue
        if not running:
            due, running = times[number], True
        elif times[number] < due - half:  # too soon after the last one
            number += 1
            continue
        end = bisect_left(times, due + half, number)
        # of a faster stream the nearest one; but two that are half a period apart have a tick each
        while number + 1 < end and times[number + 1] - times[number] < half:
            if abs(times[number + 1] - due) > abs(times[number] - due):
                break
            number += 1
        yield times[number], number
        due, number = (due + times[number]) / 2 + period, number + 1


@dataclass(frozen=True, eq=False)
class BagEpisode:
    """One episode of a bag, without its images.

    Attributes:
        instruction: instruction of the episode.
        states: states [S], one per tick.
        actions: actions [A], one per tick.
        images: camera -> index of the message in its topic, one per tick.
    """

    instruction: str
    states: list[np.ndarray]
    actions: list[np.ndarray]
    images: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True, eq=False)
class _Bag:
    """Samples of all topics of a bag, without the images."""

    texts: Samples
    states: Samples
    commands: Samples
    gripper: Samples | None
    cameras: dict[str, Samples]


@dataclass(frozen=True, eq=False)
class _Frame:
    """One tick of an episode; `images` are indices of messages, `is_held` tells a tick without a command."""

    instruction: str
    state_S: np.ndarray
    action_A: np.ndarray
    images: dict[str, int]
    is_held: bool


class BagReader:
    """Reader of one bag. Use it as a context manager.

    Args:
        path: folder of the bag, or an MCAP file.
        embodiment: robot, with the image sizes in the bag.
        robot: kind of the commands (for pauses), and the ages from which samples are stale.
        topics: mapping of topics to cameras, joints and commands.
        distro: ROS 2 distribution, for message types that the bag does not define.

    Attributes:
        skipped: number of ticks that belong to no episode, by reason.
        unused: number of commands that no tick has, because another one came for the same tick.
        command_hz: rate of the commands in Hz, by the median of their distances; None: not yet read, or one command.

    Raises:
        ValueError: topics, robot and embodiment do not match; or, when the context is entered, the bag is missing,
            cannot be read, or lacks a topic.
    """

    def __init__(
        self, path: Path, embodiment: Embodiment, robot: RobotConfig, topics: RosTopics, distro: str = "humble"
    ) -> None:
        robot.limits.check(embodiment)
        topics.check(embodiment, robot.limits)
        if distro not in DISTROS:
            raise ValueError(f"distro must be one of {', '.join(DISTROS)}, got {distro!r}")
        self._path, self._embodiment, self._robot, self._topics = path, embodiment, robot, topics
        self._distro = distro
        self._commands = Commands(topics, embodiment)
        self._open = ExitStack()
        self._away_s: dict[str, float] = {}  # topic -> how far its last sample of another clock was away
        self.skipped: Counter[str] = Counter()
        self.unused = 0
        self.command_hz: float | None = None

    def __enter__(self) -> Self:
        if not self._path.exists():
            raise ValueError(f"there is no bag at {self._path}")
        try:
            reader = AnyReader([self._path], default_typestore=get_typestore(DISTROS[self._distro]))
            self._reader = self._open.enter_context(reader)
        except Exception as error:  # of a damaged file it is anything
            raise ValueError(f"{self._path} cannot be read as a bag: {error or type(error).__name__}") from error
        self._connections = {c.topic: c for c in self._reader.connections}
        try:
            self._check()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def check_instruction(self, instruction: str | None) -> None:
        """Check that somebody says what was asked for: the command, or else the bag.

        Raises:
            ValueError: nobody does.
        """
        if instruction is None and self._topics.instruction not in self._connections:
            raise ValueError(f"{self._path} has no {self._topics.instruction}: give instruction=... for the whole bag")

    def content(self) -> list[str]:
        """Return the hash of each file with messages: another bag at the same path has others."""
        files = visible(self._path, "*") if self._path.is_dir() else [self._path]
        return [file_hash(file) for file in files if file.suffix in STORAGE]

    def episodes(self, instruction: str | None = None) -> list[BagEpisode]:
        """Return the episodes of the bag, in order.

        Args:
            instruction: instruction of the whole bag; None reads the instruction topic, where every new text starts a
                new episode.

        Raises:
            ValueError: there is no instruction or no command, or the samples of a topic cannot be used.
        """
        bag = _Bag(
            self._instructions(instruction),
            self._samples(self._topics.joint_states),
            self._samples(self._topics.command),
            None if self._topics.gripper is None else self._samples(self._topics.gripper),
            {camera: self._image_times(camera) for camera in self._topics.cameras},
        )
        if not bag.commands.times:
            raise ValueError(f"{self._path} holds no command on {self._topics.command}: there is nothing to learn from")
        found: list[BagEpisode] = []
        running: BagEpisode | None = None
        held = 0  # ticks without a command
        self.unused += len(bag.commands.times)
        if len(bag.commands.times) > 1:
            self.command_hz = 1.0 / max(float(np.median(np.diff(bag.commands.times))), 1e-9)
        for when, number in ticks_of(bag.commands.times, 1.0 / self._embodiment.control_hz):
            self.unused -= number is not None
            last_A = running.actions[-1] if running is not None and held < PAUSE_TICKS else None
            frame = self._frame(bag, when, None if number is None else bag.commands.values[number], last_A)
            if isinstance(frame, str):
                self.skipped[frame] += 1
                running, held = None, 0
                continue
            held = held + 1 if frame.is_held else 0
            if running is None or frame.instruction != running.instruction:
                running = BagEpisode(frame.instruction, [], [], {camera: [] for camera in frame.images})
                found.append(running)
            running.states.append(frame.state_S)
            running.actions.append(frame.action_A)
            for camera, image in frame.images.items():
                running.images[camera].append(image)
        return found

    def pictures(self, episode: BagEpisode) -> dict[str, list[bytes]]:
        """Return the images of an episode as PNG files: camera -> files. ValueError if their size is wrong."""
        return {camera: self._pictures(camera, numbers) for camera, numbers in episode.images.items()}

    # --- internals ----------------------------------------------------------------------------------------------------

    def _frame(self, bag: _Bag, when: float, command: np.ndarray | None, last_A: np.ndarray | None) -> _Frame | str:
        """Return the frame of a tick, or the reason why there is none.

        Args:
            bag: samples of the bag.
            when: time of the tick in seconds.
            command: command of the tick, [A] or without the grippers [D], or None.
            last_A: action [A] to hold if there is no command; None to hold nothing.
        """
        loop = self._robot.loop
        text = bag.texts.newest(when)
        if not text:
            return "no instruction"
        grip_G = None if bag.gripper is None else bag.gripper.newest(when + 0.5 / self._embodiment.control_hz)
        command_A = self._action(command, grip_G)
        action_A = self._hold(last_A, grip_G) if command_A is None and last_A is not None else command_A
        if action_A is None:
            return "no command"
        state_S = bag.states.newest(when, loop.state_age_s)
        if state_S is None:
            return f"no joint state for {loop.state_age_s:g} s{self._other_clock(self._topics.joint_states)}"
        images = {camera: times.newest(when, loop.image_age_s) for camera, times in bag.cameras.items()}
        there = {camera: number for camera, number in images.items() if number is not None}
        if len(there) < len(images):
            missing = [camera for camera in images if camera not in there]
            clocks = "".join(self._other_clock(self._topics.cameras[camera]) for camera in missing)
            return f"no image of {', '.join(missing)} for {loop.image_age_s:g} s{clocks}"
        return _Frame(text, state_S, action_A, there, is_held=command_A is None)

    def _check(self) -> None:
        topics = self._topics
        if topics.gripper_type == "GripperCommand":
            raise ValueError(
                "topics.gripper_type=GripperCommand: a bag has no goals of actions; let the gripper be commanded by a "
                "topic while you record, and name it with gripper_type=array"
            )
        needed = {f"camera {camera}": topic for camera, topic in topics.cameras.items()}
        needed |= {"joint states": topics.joint_states, "commands": topics.command}
        needed |= {} if topics.gripper is None else {"gripper": topics.gripper}
        missing = [f"{what} ({topic})" for what, topic in needed.items() if topic not in self._connections]
        if missing:
            raise ValueError(
                f"{self._path} has no {', '.join(missing)}; it has {', '.join(sorted(self._connections)) or 'nothing'}"
            )
        kinds: dict[str | None, tuple[str, ...]] = {
            topics.joint_states: (JOINT_STATE,),
            topics.command: (COMMANDS[topics.command_type],),
            topics.gripper: (ARRAY,),
            topics.instruction: (STRING,),
            **dict.fromkeys(topics.cameras.values(), (IMAGE, COMPRESSED_IMAGE)),
        }
        for topic, connection in self._connections.items():
            if connection.msgtype not in kinds.get(topic, (connection.msgtype,)):
                raise ValueError(
                    f"{topic} in {self._path} has messages of {connection.msgtype}, expected "
                    f"{' or '.join(kinds[topic])}: correct configs/topics"
                )

    def _messages(self, topic: str, numbers: Sequence[int] | None = None) -> Iterator[tuple[int, float, Any]]:
        """Yield index, time of recording in seconds and message, of all messages of a topic or of some.

        Raises:
            ValueError: the file is damaged. What has no checksum, as the values of a message, cannot be checked.
        """
        connection: Connection = self._connections[topic]
        wanted = None if numbers is None else set(numbers)
        try:
            for number, (_, nanoseconds, raw) in enumerate(self._reader.messages([connection])):
                if wanted is None or number in wanted:
                    yield number, nanoseconds * 1e-9, self._reader.deserialize(raw, connection.msgtype)
                if wanted is not None and number >= max(wanted, default=-1):
                    return
        except Exception as error:  # a length that is damaged ends in anything
            raise ValueError(
                f"{topic} in {self._path} cannot be read on, the file is damaged ({type(error).__name__}: {error}): "
                "leave this bag out, or cut it before the damage with `ros2 bag convert`"
            ) from error

    def _samples(self, topic: str) -> Samples:
        """Read the joint states [S], the commands of the arm [D] or those of the grippers [G] of a topic.

        A trajectory of several points gives a command for each tick until the next trajectory.
        """
        read = {
            self._topics.joint_states: lambda message: state_of(message, self._topics.joints)[None],
            self._topics.gripper: lambda message: self._commands.grippers_of(message)[None],
            self._topics.command: self._commands.arm_of,
        }[topic]
        samples, period = Samples(), 1.0 / self._embodiment.control_hz
        rest = 0  # points of the trajectory before, without its first one
        for _, recorded, message in self._messages(topic):
            try:
                values = read(message)
            except ValueError as error:
                raise ValueError(f"{topic} in {self._path}: {error}") from None
            if not np.isfinite(values).all():
                raise ValueError(f"{topic} in {self._path} holds NaN or infinite values")
            first: float | None = recorded
            if topic == self._topics.joint_states:
                first = self._time(topic, message, recorded, self._robot.loop.state_age_s)
            if first is None:
                continue
            while rest and samples.times[-1] > first - period / 2:
                samples.times.pop()
                samples.values.pop()
                rest -= 1
            rest = len(values) - 1
            samples.times += [first + period * number for number in range(len(values))]
            samples.values += list(values)
        samples.sort()
        self._check_clock(topic, samples)
        return samples

    def _instructions(self, instruction: str | None) -> Samples:
        self.check_instruction(instruction)
        if instruction is not None:
            return Samples([float("-inf")], [instruction.strip()])
        texts = Samples()
        for _, recorded, message in self._messages(self._topics.instruction):
            texts.times.append(recorded)
            texts.values.append(message.data.strip())
        if texts.times and texts.times[0] - self._reader.start_time * 1e-9 <= LATCHED_S:
            texts.times[0] = float("-inf")  # a latched one was valid before the recorder found it
        return texts

    def _image_times(self, camera: str) -> Samples:
        topic, samples = self._topics.cameras[camera], Samples()
        for number, recorded, message in self._messages(topic):
            when = self._time(topic, message, recorded, self._robot.loop.image_age_s)
            if when is not None:
                samples.times.append(when)
                samples.values.append(number)
        samples.sort()
        self._check_clock(topic, samples)
        return samples

    def _time(self, topic: str, message: Any, recorded: float, age_s: float) -> float | None:
        """Return when a sample was taken; None if it is as far from the time of recording as the bridge refuses.

        Commands have the time of recording, so a sensor with another clock would show what came long before or after.
        """
        if self._topics.stamps == "arrival":
            return recorded
        stamp = seconds_of(message.header.stamp)
        away_s = abs(stamp - recorded)
        if away_s <= age_s:
            return stamp
        self._away_s[topic] = away_s
        return None

    def _check_clock(self, topic: str, samples: Samples) -> None:
        if not samples.times and topic in self._away_s:
            raise ValueError(
                f"stamps of {topic} are {self._away_s[topic]:.1f} s from the time of recording: its clock is another "
                "one; give topics.stamps=arrival, also if its driver does not fill them in"
            )

    def _other_clock(self, topic: str) -> str:
        """Return what to add to the reason for a missing sample: its stamp may have been that of another clock."""
        away_s = self._away_s.get(topic)
        return "" if away_s is None else f"; some stamps of {topic} are {away_s:.1f} s from the time of recording"

    def _action(self, command: np.ndarray | None, grip_G: np.ndarray | None) -> np.ndarray | None:
        """Return the action [A] of a tick, or None; a gripper with its own topic keeps its last command [G]."""
        if command is None or self._topics.gripper is None:
            return command
        return None if grip_G is None else self._commands.action(command, grip_G)

    def _hold(self, action_A: np.ndarray, grip_G: np.ndarray | None) -> np.ndarray:
        """Return the action [A] that keeps the arm still: the same target, or no displacement.

        A gripper with its own topic goes on, to its last command [G].
        """
        held_A = action_A.copy() if self._robot.limits.kind == "absolute" else np.zeros_like(action_A)
        grippers = list(self._embodiment.grippers)
        held_A[grippers] = action_A[grippers] if grip_G is None else grip_G
        return held_A

    def _pictures(self, camera: str, numbers: Sequence[int]) -> list[bytes]:
        topic = self._topics.cameras[camera]
        [size] = [(c.height, c.width) for c in self._embodiment.cameras if c.name == camera]
        read = compressed_image_of if self._connections[topic].msgtype == COMPRESSED_IMAGE else image_of
        files = {}
        for number, _, message in self._messages(topic, numbers):
            image_HW3 = read(message)
            if image_HW3.shape[:2] != size:
                raise ValueError(
                    f"camera {camera!r} is {image_HW3.shape[0]}x{image_HW3.shape[1]} in {self._path}, embodiment "
                    f"{self._embodiment.name!r} says {size[0]}x{size[1]}: give an embodiment with the bag's size"
                )
            files[number] = encode_png(image_HW3)
        return [files[number] for number in numbers]
