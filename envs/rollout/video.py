"""Write episodes as mp4 files, with instruction, step and outcome in a caption above the picture."""

from __future__ import annotations

import contextlib
import io
import os
import textwrap
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

STATUS_COLOURS = {"success": (64, 200, 120), "failure": (240, 96, 88), "error": (240, 176, 64)}
_BACKGROUND = (24, 26, 32)
_TEXT = (236, 238, 242)


def annotate(frame_HWC: np.ndarray, instruction: str, progress: str, status: str = "") -> np.ndarray:
    """Add a caption above a frame: the instruction in at most two lines, and a line with progress and status.

    Args:
        frame_HWC: frame, uint8 [H,W,3].
        instruction: instruction of the episode; cut if it needs more than two lines.
        progress: text such as "step 12 / 200".
        status: empty, or a text whose first word is a key of `STATUS_COLOURS`.

    Returns:
        frame uint8 [H',W',3] with even sides, as h264 needs; the caption does not cover the picture.
    """
    height, width = frame_HWC.shape[:2]
    size = max(10, round(width / 20))
    font = ImageFont.load_default(size=size)
    line = round(size * 1.35)
    margin = size // 2
    letters = max(8, int((width - 2 * margin) / font.getlength("abcdefghij klmnopqrs") * 20))
    wrapped = textwrap.wrap(instruction, letters, max_lines=2, placeholder=" …") or [""]
    band = 3 * line + margin  # always three lines, so that all frames of a video have one size
    canvas = Image.new("RGB", (width + width % 2, height + band + (height + band) % 2), _BACKGROUND)
    canvas.paste(Image.fromarray(frame_HWC), (0, band))
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(wrapped):
        draw.text((margin, margin // 2 + row * line), text, _TEXT, font)
    draw.text((margin, margin // 2 + 2 * line), progress, (150, 156, 168), font)
    if status:
        colour = STATUS_COLOURS.get(status.split()[0], _TEXT)
        draw.text((width - margin - font.getlength(status), margin // 2 + 2 * line), status, colour, font)
    return np.asarray(canvas)


class VideoWriter:
    """Writer for an mp4 (h264, or else mpeg4) that gets its name only when it is complete.

    Use it as a context manager. If the block raises an exception, no file remains.
    """

    def __init__(self, path: Path | str, fps: float = 20.0) -> None:
        if fps <= 0:
            raise ValueError(f"a video needs a positive number of frames per second, got {fps}")
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}.partial.mp4")
        self._fps = Fraction(fps).limit_denominator(1000)
        self._output: tuple[OutputContainer, VideoStream] | None = None  # opened at the first frame, for its size

    def __enter__(self) -> VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, frame_HWC: np.ndarray, repeat: int = 1) -> None:
        """Append a uint8 [H,W,3] frame with even sides, `repeat` times."""
        import av

        if self._output is None:
            self._output = self._open(frame_HWC.shape[0], frame_HWC.shape[1])
        container, stream = self._output
        for _ in range(repeat):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(frame))

    def _open(self, height: int, width: int) -> tuple[OutputContainer, VideoStream]:
        import av
        from av.video.stream import VideoStream

        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        container = av.open(str(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
        stream = container.add_stream(codec, rate=self._fps)
        assert isinstance(stream, VideoStream), f"{codec} encodes video"
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the other cores play episodes
        if codec == "libx264":
            stream.options = {"preset": "veryfast", "crf": "24"}
        return container, stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._output is not None:
                container, stream = self._output
                with contextlib.closing(container):
                    if kind is None:
                        container.mux(stream.encode())
            elif kind is None:
                raise ValueError(f"no frame was written to {self.path}")
            if kind is None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def contact_sheet(path: Path | str, frames: int = 6, height: int = 150) -> bytes:
    """Return a PNG with `frames` pictures of a video side by side, from the first to the last.

    Raises:
        ValueError: the file holds no readable video.
    """
    pictures = _pick(path, lambda total: set(np.linspace(0, total - 1, frames).round().astype(int).tolist()))
    thumbnails = []
    for picture in pictures:
        picture.thumbnail((10_000, height))
        thumbnails.append(picture)
    gap = 4
    sheet = Image.new(
        "RGB", (sum(t.width for t in thumbnails) + gap * (len(thumbnails) - 1), thumbnails[0].height), "white"
    )
    left = 0
    for thumbnail in thumbnails:
        sheet.paste(thumbnail, (left, 0))
        left += thumbnail.width + gap
    buffer = io.BytesIO()
    # A palette makes the report four times smaller. Maximum coverage keeps the colours of small things, which
    # instructions often name; Pillow's default, the median cut, shows a yellow cube as orange.
    sheet.quantize(128, Image.Quantize.MAXCOVERAGE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _pick(path: Path | str, choose: Callable[[int], set[int]]) -> list[Image.Image]:
    import av

    try:
        with av.open(str(path)) as container:
            total = sum(packet.size > 0 for packet in container.demux(video=0))
            chosen = choose(total) if total else set()
        with av.open(str(path)) as container:
            pictures = [f.to_image() for index, f in enumerate(container.decode(video=0)) if index in chosen]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{path} is no readable video: {error}") from error
    if not pictures:
        raise ValueError(f"{path} is no readable video: it has no frames")
    return pictures
