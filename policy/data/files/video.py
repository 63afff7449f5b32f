"""Frames of a video by their number.

The times of all frames are read from the file's packets first, which decodes nothing. So the number of frames is known,
and a frame is found by its place and not by a time that may lie between two frames.

PyAV decodes, which brings its own FFmpeg and says when a frame was damaged. torchcodec shows what FFmpeg made up for
the damaged parts as if it had been filmed.

Shape legend: F frames, H, W image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from cogvla.policy.data.files.columns import AGAIN

FRAMES_AT_ONCE = 64
REORDERED = 16
"""A key frame may be stored before as many frames that are shown before it, and depend on the key frame before."""


def frame_times(path: Path, fps: float) -> np.ndarray:
    """Return the time stamps of all frames in the order in which they are shown, int64 [F], in the stream's time base.

    Raises:
        ValueError: the file is no video, or its frames do not come at this rate.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            base = float(stream.time_base or 0)
            formats = stream.format.components
    except Exception as error:  # damaged files make PyAV raise almost anything
        raise ValueError(f"{path} is missing or no video ({error}); {AGAIN}") from error
    if len(formats) == 1 and formats[0].bits > 8:
        raise ValueError(
            f"{path} has one channel of {formats[0].bits} bits (depth?), not pictures; choose another camera"
        )
    times = [packet.pts for packet in packets]
    if not times or any(time is None for time in times):
        raise ValueError(f"{path} has no frames, or frames without a time; {AGAIN}")
    times_F = np.sort(np.array(times, np.int64))
    late_F = (times_F - times_F[0]) * base * fps - np.arange(len(times_F))
    if len(wrong := np.flatnonzero(np.abs(late_F) > 0.5)):
        frame = int(wrong[0])
        raise ValueError(
            f"{path}: frame {frame} comes after {(times_F[frame] - times_F[0]) * base:.3f} s, with {fps:g} frames per "
            f"second it should come after {frame / fps:.3f} s; correct fps in meta/info.json, or encode the video again"
        )
    return times_F


def frames(path: Path, times_F: np.ndarray, wanted_f: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decode frames of a video.

    Args:
        path: the video.
        times_F: result of `frame_times`.
        wanted_f: numbers of the wanted frames, ascending.

    Yields:
        Places in `wanted_f`, and frames uint8 [f,H,W,3], some at once.

    Raises:
        ValueError: a frame cannot be decoded, or is damaged, or one that it depends on is.
    """
    place = {int(times_F[frame]): index for index, frame in enumerate(wanted_f)}
    last = max(place)
    places: list[int] = []
    pictures: list[np.ndarray] = []
    damaged = False
    try:
        # From the start if that fails: pictures may become complete step by step, without a key frame.
        for start in dict.fromkeys((max(0, int(wanted_f[0]) - REORDERED), 0)):
            for frame in _decoded(path, int(times_F[start])):
                if damaged := frame.is_corrupt:
                    break
                if frame.pts in place:
                    places.append(place.pop(frame.pts))
                    pictures.append(_rgb(frame))
                    if len(places) == FRAMES_AT_ONCE:
                        yield np.array(places), np.stack(pictures)
                        places, pictures = [], []
                if frame.pts >= last:
                    break
            if not place:
                break
    except Exception as error:
        raise ValueError(f"{path} cannot be decoded ({error}); {AGAIN}") from error
    if place:
        problem = "is damaged, or one before it" if damaged else "cannot be decoded"
        raise ValueError(f"{path}: frame {wanted_f[min(place.values())]} {problem}; {AGAIN}")
    if places:
        yield np.array(places), np.stack(pictures)


def _decoded(path: Path, start: int) -> Iterator[Any]:
    """Yield the frames of a video from the key frame before a time on, each with its time."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # with several, FFmpeg loses what it found to be damaged
        if stream.codec_context.name == "mjpeg":
            stream.codec_context.options = {"err_detect": "explode"}  # it marks nothing as damaged
        container.seek(start, stream=stream, backward=True)
        begun = False
        for frame in container.decode(stream):
            begun |= bool(frame.key_frame)  # what is shown before the first one depends on frames before it
            if begun and frame.pts is not None:
                yield frame


def _rgb(frame: Any) -> np.ndarray:
    """Return a frame of PyAV as uint8 [H,W,3], with the colour space and range that the video declares."""
    levels = frame.color_range
    return np.asarray(
        frame.to_ndarray(
            format="rgb24",
            src_colorspace=frame.colorspace,
            dst_colorspace="ITU601",  # PyAV's default, the source's own, lets swscale take every video for BT.601
            src_color_range=levels,
            dst_color_range=levels,
        )
    )
