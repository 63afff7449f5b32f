"""Frames of videos in the colours that were filmed, from any part of a video; damaged ones are refused."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from cogvla.policy.data.files import video

FPS = 10
BT601, BT709, LIMITED, FULL = 5, 1, 1, 2
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "later": {"g": "12", "bf": "3"},  # frames that depend on later ones
    "odd": {"size": (250, 130)},
    "bt709": {"space": BT709},
    "full": {"levels": FULL},
    "bt709_full": {"space": BT709, "levels": FULL},
    "ten_bits": {"pixels": "yuv420p10le"},
    "rgb": {"codec": "libx264rgb", "pixels": "rgb24"},
    "av1": {"codec": "libsvtav1", "preset": "12"},
    "mjpeg": {"codec": "mjpeg", "pixels": "yuvj420p", "levels": FULL},
}
PARTS: dict[str, dict[str, Any]] = {
    "later": KINDS["later"],
    "open": {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"},
    "step_by_step": {"x264-params": "intra-refresh=1:keyint=12"},
    "av1": {"codec": "libsvtav1", "preset": "12", "g": "12"},
}
"""Videos in which the frames that one depends on are found in different ways."""


def picture(width: int, height: int, step: int) -> np.ndarray:
    """Return large coloured squares that move, uint8 [H,W,3]."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), np.uint8)
    return np.ascontiguousarray(np.roll(colours.repeat(32, 0).repeat(32, 1)[:height, :width], 4 * step, axis=1))


def write(
    path: Path,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (256, 192),
    space: int | None = None,
    levels: int | None = None,
    **options: str,
) -> Path:
    """Write 80 frames, more than are decoded at once."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=FPS)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.options = dict(options)
        if space is not None:
            stream.codec_context.colorspace = space
        if levels is not None:
            stream.codec_context.color_range = levels
        for step in range(80):
            frame = av.VideoFrame.from_ndarray(picture(*size, step), format="rgb24")
            if pixels != "rgb24":
                frame = frame.reformat(
                    format=pixels,
                    src_colorspace=0,
                    dst_colorspace=space or BT601,
                    src_color_range=FULL,
                    dst_color_range=levels or LIMITED,
                )
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    with ThreadPoolExecutor(1) as executor:  # SVT-AV1 makes the thread that calls it real time (SCHED_FIFO 99) for root
        made = {kind: executor.submit(write, folder / f"{kind}.mp4", **how) for kind, how in KINDS.items()}
        return {kind: future.result() for kind, future in made.items()}


def test_tests_do_not_run_in_real_time(videos: dict[str, Path]) -> None:
    assert os.sched_getscheduler(0) != os.SCHED_FIFO, "they would take the processors from all other processes"


@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_those_that_were_filmed(kind: str, videos: dict[str, Path]) -> None:
    times_F = video.frame_times(videos[kind], FPS)
    [(places, frames_FHWC)] = video.frames(videos[kind], times_F, np.array([3, 70]))
    assert places.tolist() == [0, 1]
    width, height = KINDS[kind].get("size", (256, 192))
    for frame_HWC, step in zip(frames_FHWC, (3, 70), strict=True):
        far = np.abs(frame_HWC.astype(int) - picture(width, height, step))
        assert np.median(far) <= 3, "edges between colours are blurred, all else is not"


def test_a_video_that_is_replaced_is_decoded_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "one.mp4")
    first = [frames.copy() for _, frames in video.frames(path, video.frame_times(path, FPS), np.array([0]))]
    write(tmp_path / "other.mp4", size=(64, 64)).replace(path)
    second = [frames for _, frames in video.frames(path, video.frame_times(path, FPS), np.array([0]))]
    assert (first[0].shape, second[0].shape) == ((1, 192, 256, 3), (1, 64, 64, 3))


def all_of(path: Path, wanted: range) -> np.ndarray:
    times_F = video.frame_times(path, FPS)
    return np.concatenate([frames for _, frames in video.frames(path, times_F, np.array(wanted))])


@pytest.mark.parametrize("kind", PARTS)
def test_any_part_of_a_video_is_that_part_of_the_whole(kind: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:  # see `videos`
        path = executor.submit(write, tmp_path / "video.mp4", size=(64, 64), **PARTS[kind]).result()
    whole = all_of(path, range(80))
    for start in range(80):
        assert np.array_equal(all_of(path, range(start, min(start + 5, 80))), whole[start : start + 5])


@pytest.mark.parametrize("kind", ["plain", "later", "av1", "mjpeg"])
def test_damage_is_refused_and_not_made_up_for(kind: str, videos: dict[str, Path], tmp_path: Path) -> None:
    content, undamaged = videos[kind].read_bytes(), all_of(videos[kind], range(3, 77))
    first, end = content.find(b"mdat") + 4, content.rfind(b"moov")
    damaged, refused = tmp_path / "damaged.mp4", 0
    for number in range(16):
        noise = np.random.default_rng(number)
        place, size = int(noise.integers(first, end - 256)), int(noise.choice([16, 256]))
        damaged.write_bytes(content[:place] + noise.bytes(size) + content[place + size :])
        try:
            found = all_of(damaged, range(3, 77))
        except ValueError as error:
            refused += bool(re.search(r"(damaged|cannot be decoded|no video).*record or download", str(error)))
        else:
            assert np.abs(found.astype(int) - undamaged).mean() < 0.1
    assert refused > 8
