"""Frames of a video by their number, without a system FFmpeg.

The times of all frames are read from the file's packets first, which decodes nothing. So the number of frames is known,
and a frame is found by its place and not by a time that may lie between two frames.

Shape legend: F frames, H, W image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from cogvla.policy.data.files.columns import AGAIN

FRAMES_AT_ONCE = 64


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
        ValueError: a frame cannot be decoded.
    """
    place = {int(times_F[frame]): index for index, frame in enumerate(wanted_f)}
    last, first = max(place), min(place)
    places: list[int] = []
    pictures: list[np.ndarray] = []
    damaged = False
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(first, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts in place:
                    if damaged := frame.is_corrupt:
                        break
                    places.append(place.pop(frame.pts))
                    pictures.append(frame.to_ndarray(format="rgb24"))
                    if len(places) == FRAMES_AT_ONCE:
                        yield np.array(places), np.stack(pictures)
                        places, pictures = [], []
                if frame.pts is not None and frame.pts >= last:
                    break
    except Exception as error:
        raise ValueError(f"{path} cannot be decoded ({error}); {AGAIN}") from error
    if place:
        problem = "is damaged" if damaged else "cannot be decoded"
        raise ValueError(f"{path}: frame {wanted_f[min(place.values())]} {problem}; {AGAIN}")
    if places:
        yield np.array(places), np.stack(pictures)
