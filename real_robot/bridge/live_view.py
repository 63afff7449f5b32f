"""Live view of cameras and commands: in a window of rerun, or as an mp4 video on a machine without a screen."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from PIL import Image

from cogvla.envs.rollout.video import VideoWriter, annotate
from cogvla.real_robot.bridge.bridge import Tick
from cogvla.real_robot.bridge.writing_thread import WritingThread

VIEWS = ("auto", "rerun", "video", "none")
_HEIGHT = 256
WAITING = 200
"""Largest number of frames of a video that wait for encoding."""


class LiveView(Protocol):
    """Interface of a live view."""

    def show(self, tick: Tick) -> None:
        """Show a tick. It is quick, so that it can be a bridge's `on_tick`."""
        ...

    def note(self, text: str) -> None:
        """Set the text shown with the following ticks, such as the outcome of an episode."""
        ...


def choose_view(view: str) -> str:
    """Return the view to use: for "auto" rerun if this machine has it and a screen, else video.

    Raises:
        ValueError: `view` is none of `VIEWS`, or rerun is not installed.
    """
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
    installed = find_spec("rerun") is not None
    if view == "rerun" and not installed:
        raise ValueError("view=rerun: rerun is not installed; `uv pip install rerun-sdk`, or choose view=video")
    if view != "auto":
        return view
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return "rerun" if screen and installed else "video"


class VideoView(WritingThread[tuple[Tick, str]]):
    """Video of all cameras side by side, with instruction, state and note above them, one frame per tick.

    Frames that a slow encoder has no room for are left out; the number of the tick above each shows where.

    Args:
        path: path of the mp4; the file is complete when the context is left.
        fps: frames per second, the control rate.
    """

    def __init__(self, path: Path, fps: float) -> None:
        super().__init__("video", WAITING)
        self.path = path
        self._writer = VideoWriter(path, fps)
        self._note = ""

    def show(self, tick: Tick) -> None:
        """See `LiveView`."""
        if tick.instruction and tick.images:
            with suppress(queue.Full):
                self._waiting.put_nowait((tick, self._note))

    def note(self, text: str) -> None:
        """See `LiveView`."""
        self._note = text

    def _write(self, items: Iterator[tuple[Tick, str]]) -> None:
        with self._writer as video:
            for tick, note in items:
                command = tick.command
                progress = f"tick {command.tick}  {command.kind.value}  {command.reason}"
                video.add(annotate(_side_by_side(tick.images), tick.instruction, progress[:60], note))


class RerunView:
    """Window of rerun with streams of cameras, commands and states.

    Args:
        name: name of the recording in rerun.
    """

    def __init__(self, name: str) -> None:
        import rerun

        self._rerun = rerun
        rerun.init(name, spawn=True)

    def show(self, tick: Tick) -> None:
        """See `LiveView`."""
        rr = self._rerun
        rr.set_time("control", duration=tick.now)
        for camera, image_HW3 in tick.images.items():
            rr.log(f"cameras/{camera}", rr.Image(image_HW3).compress(jpeg_quality=80))
        if tick.command.action_A is not None:
            rr.log("command", rr.Scalars(tick.command.action_A))
        if tick.state_S is not None:
            rr.log("state", rr.Scalars(tick.state_S))

    def note(self, text: str) -> None:
        """See `LiveView`."""
        self._rerun.log("episodes", self._rerun.TextLog(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rerun.disconnect()


def _side_by_side(images: dict[str, np.ndarray]) -> np.ndarray:
    scaled = [
        np.asarray(Image.fromarray(image).resize((round(_HEIGHT * image.shape[1] / image.shape[0]), _HEIGHT)))
        for image in images.values()
    ]
    return np.concatenate(scaled, axis=1)
