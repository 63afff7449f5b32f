"""What the robot sees and does, while it does it: in rerun's window, or as a video where there is no screen."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


class View(Protocol):
    """Shows ticks; `show` is quick, so that it can be a bridge's `on_tick`."""

    def show(self, tick: Tick) -> None: ...

    def note(self, text: str) -> None:
        """What is written beside the following ticks, such as the outcome of an episode."""
        ...


def choose_view(view: str) -> str:
    """What `auto` is on this machine; ValueError for something unknown."""
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
    if view != "auto":
        return view
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return "rerun" if screen and find_spec("rerun") is not None else "video"


class VideoView(WritingThread[tuple[Tick, str]]):
    """All cameras side by side, with instruction, state and note above them, at the rate of the ticks.

    Args:
        path: of the mp4, which is there when the view is closed.
        fps: control rate.
    """

    def __init__(self, path: Path, fps: float) -> None:
        super().__init__("video")
        self.path = path
        self._writer = VideoWriter(path, fps)
        self._note = ""

    def show(self, tick: Tick) -> None:
        """See `View`."""
        if tick.instruction and tick.images:
            self._waiting.put((tick, self._note))

    def note(self, text: str) -> None:
        """See `View`."""
        self._note = text

    def _write(self, items: Iterator[tuple[Tick, str]]) -> None:
        with self._writer as video:
            for tick, note in items:
                command = tick.command
                progress = f"tick {command.tick}  {command.kind.value}  {command.reason}"
                video.add(annotate(_side_by_side(tick.images), tick.instruction, progress[:60], note))


class RerunView:
    """Cameras, commands and states as streams of rerun, in its own window."""

    def __init__(self, name: str) -> None:
        import rerun

        self._rerun = rerun
        rerun.init(name, spawn=True)

    def show(self, tick: Tick) -> None:
        """See `View`."""
        rr = self._rerun
        rr.set_time("control", duration=tick.now)
        for camera, image_HW3 in tick.images.items():
            rr.log(f"cameras/{camera}", rr.Image(image_HW3).compress(jpeg_quality=80))
        if tick.command.action_A is not None:
            rr.log("command", rr.Scalars(tick.command.action_A))
        if tick.state_S is not None:
            rr.log("state", rr.Scalars(tick.state_S))

    def note(self, text: str) -> None:
        """See `View`."""
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
