"""Record a robot's episodes as a LeRobotDataset v3 for training.

    Bridge.on_tick --> Recorder: one frame per tick (newest images and state, the command that was sent with them)
                          |  thread: PNG files
                          v
    OUTPUT.recording/episodes/.running.0 ...     pictures of the running episode, a hidden file for each camera
                          v
    OUTPUT.recording/episodes/000000.npz ...     complete when the episode has ended; a crash loses the running one
                          v  assemble
    OUTPUT/                                      the data set, with all of them

An episode begins with the first command after the robot was activated. It ends when the bridge stops sending or gets
another instruction. Commands that hold the arm in between are part of the episode.

Features: observation.images.CAMERA, observation.state [S], action [A], in the robot's own units; with a teleoperator
also intervention: whether the action is the operator's.

Shape legend: T steps, A action dimension, S state dimension.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cogvla.envs.recording.dataset_folder import DatasetFolder
from cogvla.envs.recording.demonstration import IMAGE_PREFIX, Demonstration, PngFile, encode_png, pack_encoded
from cogvla.envs.recording.demonstrator import INTERVENTION
from cogvla.files import is_left_by_macos
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import Tick
from cogvla.real_robot.bridge.writing_thread import WritingThread
from cogvla.real_robot.control.control_loop import Kind

RECORD_FILE = "recording.json"
STATE_FEATURE, ACTION_FEATURE = "observation.state", "action"
QUEUED = 600
"""Largest number of ticks that wait for encoding; about 1 GB with two cameras of 640x480."""
SHORTEST = 2
"""Smallest number of frames of an episode."""


class RecordingFolder:
    """Folder of finished episodes, which `assemble` turns into a data set; the layout is that of `DatasetFolder`.

    Args:
        output: folder of the data set.
        embodiment: robot; its control rate must be a whole number, because LeRobotDatasets need one.
        robot: name of the robot in the data set.
        video: store images as videos.
        resume: keep the episodes of an interrupted recording.
        source: origin of the episodes, as plain values.
        names: feature -> names of its numbers; `lerobot-replay` needs those of `action`.
        teleoperated: the episodes say in each frame who acted.

    Raises:
        ValueError: the folder holds a data set, or an unfinished one of another robot or source.
    """

    def __init__(
        self,
        output: Path,
        embodiment: Embodiment,
        robot: str,
        video: bool = False,
        resume: bool = True,
        source: dict[str, Any] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        teleoperated: bool = False,
    ) -> None:
        if embodiment.control_hz != round(embodiment.control_hz):
            raise ValueError(f"a LeRobotDataset has a whole number of frames per second, not {embodiment.control_hz:g}")
        if output.exists() and not all(map(is_left_by_macos, output.iterdir())):
            raise ValueError(f"{output} is there already; record into another folder")
        self._folder = DatasetFolder(output, "recording", "recorded", RECORD_FILE)
        self._fps, self._robot, self._video, self._names = round(embodiment.control_hz), robot, video, names
        self._request = {"robot": robot, "embodiment": asdict(embodiment), "video": video, "source": source}
        self._request["teleoperated"] = teleoperated or None  # None: as in recordings from before there was the key
        self._folder.prepare(self._request, resume and bool(self.numbers()))  # an empty folder fits any recording

    def numbers(self) -> list[int]:
        """Return the numbers of the complete episodes, in order."""
        paths = self._folder.episodes.glob("[0-9]*.npz")
        return sorted(int(path.stem) for path in paths if Demonstration.is_complete(path))

    def save(
        self,
        number: int,
        instruction: str,
        states: list[np.ndarray],
        actions: list[np.ndarray],
        images: Mapping[str, Sequence[bytes]],
        interventions: list[bool] | None = None,
    ) -> None:
        """Save an episode: T states [S], T actions [A], T PNG files of each camera, and whether the operator acted.

        Raises:
            ValueError: their numbers differ.
        """
        counts = {len(states), len(actions), *map(len, images.values())} | (
            {len(interventions)} if interventions else set()
        )
        if len(counts) > 1:
            raise ValueError(f"an episode has {min(counts)} to {max(counts)} states, actions, pictures, interventions")
        arrays = {STATE_FEATURE: np.stack(states).astype(np.float32)}
        arrays[ACTION_FEATURE] = np.stack(actions).astype(np.float32)
        if interventions is not None:
            arrays[INTERVENTION] = np.array(interventions)
        named = {IMAGE_PREFIX + camera: files for camera, files in images.items()}
        pack_encoded(instruction, self._fps, arrays, named).save(self._path(number))

    def running(self, camera: int) -> PngFile:
        """Return a hidden file for the pictures that a camera, given as a number, takes in the running episode."""
        return PngFile(self._folder.episodes / f".running.{camera}")

    def remove(self, number: int) -> None:
        """Delete an episode."""
        self._path(number).unlink()

    def assemble(self) -> int:
        """Build the data set of all episodes and return their number; without episodes build none."""
        numbers = self.numbers()
        if not numbers:
            return 0
        from cogvla.envs.recording.dataset_writer import DatasetWriter  # lerobot takes seconds to import

        name = f"cogvla/{self._folder.output.name}"
        first = Demonstration.load(self._path(numbers[0]))
        writer = DatasetWriter(self._folder.dataset, name, first, self._robot, self._video, self._names)
        try:
            for number in numbers:
                writer.add(Demonstration.load(self._path(number)))
        finally:
            writer.close()
        self._folder.publish(self._request | {"episodes": len(numbers)})
        return len(numbers)

    def _path(self, number: int) -> Path:
        return self._folder.episodes / f"{number:06d}.npz"


class Recorder(WritingThread[Tick | str]):
    """Recorder of a bridge: pass `show` as `on_tick`, and use it as a context manager around the bridge.

    Leaving the context builds the data set. After an error it does not, and the next run continues with the episodes.

    Args:
        output: folder of the data set.
        embodiment: embodiment of the bridge.
        robot: name of the robot in the data set.
        video: store images as videos.
        resume: keep the episodes of an interrupted recording.
        names: see `RecordingFolder`.
        teleoperated: see `RecordingFolder`.

    Attributes:
        episodes: number of episodes so far, including those of earlier runs.
    """

    def __init__(
        self,
        output: Path,
        embodiment: Embodiment,
        robot: str,
        video: bool = False,
        resume: bool = True,
        names: Mapping[str, Sequence[str]] | None = None,
        teleoperated: bool = False,
    ) -> None:
        super().__init__("recorder", QUEUED)
        self._folder = RecordingFolder(output, embodiment, robot, video, resume, names=names, teleoperated=teleoperated)
        self._teleoperated = teleoperated
        self._cameras = set(embodiment.camera_names)
        self._numbers = self._folder.numbers()
        self._instruction = ""
        self._states: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._interventions: list[bool] = []
        self._dropped = False  # the running episode: what is left of it is not recorded
        self._images: dict[str, PngFile] = {}
        self._idle = True  # the last tick of `show` had no command

    @property
    def episodes(self) -> int:
        return len(self._numbers)

    def show(self, tick: Tick) -> None:
        """Queue a tick for recording; raise the error that ended it, such as a full disk or a full queue.

        Of ticks without a command, only the first one says something: it ends the episode.
        """
        if self._failure is not None:
            raise self._failure
        was_idle, self._idle = self._idle, tick.command.action_A is None
        if was_idle and self._idle:
            return
        try:
            self._waiting.put_nowait(tick)
        except queue.Full:
            raise ValueError(
                "recording cannot keep up with the cameras: give smaller images or a lower control rate"
            ) from None

    def end_episode(self, keep: bool = True) -> None:
        """End the running episode and keep or drop it; to drop without a running one deletes the last episode.

        The rest of a dropped episode is dropped, too, until the bridge stops sending or gets another instruction.
        """
        self._waiting.put("end" if keep else "drop")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None:
            self._folder.assemble()

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _write(self, items: Iterator[Tick | str]) -> None:
        try:
            for item in items:
                if isinstance(item, Tick):
                    self._take(item)
                elif item == "end":
                    self._end()
                else:
                    self._drop()
            self._end()
        finally:
            self._clear()

    def _take(self, tick: Tick) -> None:
        """Add a tick to the episode; end it where nothing is commanded, or where a state or picture is missing.

        Samples are missing at the start and after a jump of the clock: without them, or with those of some cameras, the
        frames would not belong together any more.
        """
        complete = tick.command.action_A is not None and tick.state_S is not None and set(tick.images) >= self._cameras
        if not complete or tick.instruction != self._instruction:
            self._end()
        if not complete or not tick.instruction or self._dropped:
            return
        assert tick.state_S is not None
        assert tick.command.action_A is not None
        self._instruction = tick.instruction
        self._states.append(tick.state_S)
        self._actions.append(tick.command.action_A)
        self._interventions.append(tick.command.kind is Kind.TELEOP)
        for camera, image_HW3 in tick.images.items():
            if camera not in self._images:
                self._images[camera] = self._folder.running(len(self._images))
            self._images[camera].append(encode_png(image_HW3))

    def _end(self) -> None:
        if len(self._states) >= SHORTEST:
            number = max(self._numbers, default=-1) + 1
            interventions = self._interventions if self._teleoperated else None
            self._folder.save(number, self._instruction, self._states, self._actions, self._images, interventions)
            self._numbers.append(number)
        self._clear()

    def _drop(self) -> None:
        if self._states or self._dropped:
            instruction = self._instruction
            self._clear()
            self._instruction, self._dropped = instruction, True
        elif self._numbers:
            self._folder.remove(self._numbers.pop())

    def _clear(self) -> None:
        for pictures in self._images.values():
            pictures.delete()
        self._instruction, self._states, self._actions, self._images = "", [], [], {}
        self._interventions, self._dropped = [], False
