"""torchcodec and PyAV give the same frames, in the colours that were filmed, and nobody notices a missing FFmpeg.

torchcodec needs a system FFmpeg, which the machine need not have: here it finds the one inside PyAV's wheel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from cogvla.policy.data.files import video
from cogvla.tests.support.decode_videos import FPS

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
}
BY_PYAV = {"ten_bits"}


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


def decoded(videos: dict[str, Path], libraries: Path) -> dict[str, Any]:
    """What a process prints that finds these libraries first; it must print nothing else."""
    names = [str(path) for path in videos.values()]
    command = [sys.executable, "-m", "cogvla.tests.support.decode_videos", *names]
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def without_ffmpeg(videos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Decoded where the files of FFmpeg are empty, in all versions that torchcodec may ask for."""
    folder = tmp_path_factory.mktemp("empty")
    for version in range(50, 70):
        (folder / f"libavutil.so.{version}").touch()
    return decoded(videos, folder)


@pytest.fixture(scope="module")
def with_ffmpeg(videos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Decoded where PyAV's FFmpeg has the names of a system FFmpeg."""
    folder = tmp_path_factory.mktemp("ffmpeg")
    for library in (Path(av.__file__).parents[1] / "av.libs").iterdir():
        if name := re.fullmatch(r"(lib.+)-[0-9a-f]{8}(\.so\.\d+).*", library.name):
            (folder / (name[1] + name[2])).symlink_to(library)
    return decoded(videos, folder)


def test_pyav_decodes_where_there_is_no_ffmpeg(without_ffmpeg: dict[str, Any]) -> None:
    assert set(without_ffmpeg["decoders"].values()) == {"PyAV"}


@pytest.mark.parametrize("kind", KINDS)
def test_both_give_the_same_frames(kind: str, with_ffmpeg: dict[str, Any], without_ffmpeg: dict[str, Any]) -> None:
    if find_spec("torchcodec") is None:
        pytest.skip("torchcodec has no wheels for this machine")
    assert with_ffmpeg["decoders"][kind] == ("PyAV" if kind in BY_PYAV else "torchcodec")
    assert with_ffmpeg["frames"][kind] == without_ffmpeg["frames"][kind]


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
