"""Frames of a video by their number.

The times of all frames are read from the file's packets first, which decodes nothing. So the number of frames is known,
and a frame is found by its place and not by a time that may lie between two frames.

torchcodec decodes where it finds a system FFmpeg, because it needs a third of the time. PyAV, which brings its own,
decodes elsewhere, and what torchcodec would decode otherwise or refuses. The frames are the same to the last bit.

Shape legend: F frames, H, W image.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from cogvla.policy.data.files.columns import AGAIN

FRAMES_AT_ONCE = 64
_opened = threading.local()
"""The decoder that each thread used last: to open a video takes as long as to read through it."""


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
    done = 0
    decoder = by_torchcodec(path)
    if decoder is not None and len(decoder) == len(times_F):
        for start in range(0, len(wanted_f), FRAMES_AT_ONCE):
            some = wanted_f[start : start + FRAMES_AT_ONCE]
            try:
                pictures = decoder.get_frames_at([int(frame) for frame in some]).data.numpy()
            except Exception:  # it raises almost anything; PyAV says what is wrong
                break
            yield np.arange(start, start + len(some)), pictures
            done += len(some)
    if done < len(wanted_f):
        for places, pictures in _with_pyav(path, times_F, wanted_f[done:]):
            yield done + places, pictures


def _with_pyav(path: Path, times_F: np.ndarray, wanted_f: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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
                    pictures.append(_rgb(frame))
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


@cache
def _torchcodec_decoder() -> Any:
    """Return torchcodec's class of decoders; None where it is not installed or finds no FFmpeg."""
    try:
        from torchcodec.decoders import VideoDecoder
    except Exception:  # ImportError, and RuntimeError with pages of tracebacks where there is no FFmpeg
        return None
    return VideoDecoder


def by_torchcodec(path: Path) -> Any:
    """Return torchcodec's decoder of a video; None where PyAV is to decode it."""
    if _torchcodec_decoder() is None:
        return None
    try:
        status = path.stat()
        key = (path, status.st_ino, status.st_mtime_ns, status.st_size)
        if getattr(_opened, "key", None) != key:
            with av.open(str(path)) as container:
                deep = any(component.bits > 8 for component in container.streams.video[0].format.components)
            decoder = _torchcodec_decoder()(str(path), dimension_order="NHWC")
            # Ten bits are rounded otherwise, and it turns what was filmed with a turned camera.
            _opened.decoder = None if deep or getattr(decoder.metadata, "rotation", None) else decoder
            _opened.key = key
    except Exception:  # as above: PyAV says what is wrong
        return None
    return _opened.decoder
