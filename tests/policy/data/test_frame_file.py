"""Pictures come back from a file as they were; a damaged file gives an error and never other pictures."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cogvla.policy.data.frame_file import DamagedError, FrameFile, FrameWriter


def write(path: Path, pixels_NVCHW: np.ndarray, episode: int = 4) -> Path:
    """Write pictures as the cache does: the first of each episode is the key of the others."""
    writer = FrameWriter(path, pixels_NVCHW.shape)
    for row in range(len(pixels_NVCHW)):
        first = row - row % episode
        for view in range(pixels_NVCHW.shape[1]):
            key = None if row == first else (first, pixels_NVCHW[first, view])
            writer.add(row, view, pixels_NVCHW[row, view], key)
    writer.finish()
    return path


def still(frames: int, views: int = 2, size: int = 16) -> np.ndarray:
    """Pictures of noise in which little changes, so that keys are used."""
    generator = np.random.default_rng(0)
    pixels = np.repeat(generator.integers(0, 256, (1, views, 3, size, size), np.uint8), frames, 0)
    pixels[:, :, :, :2, :2] = generator.integers(0, 256, (frames, views, 3, 2, 2), np.uint8)
    return pixels


@st.composite
def pictures(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    shape = draw(
        st.tuples(*(st.integers(1, most) for most in (6, 3)), st.just(3), st.integers(1, 9), st.integers(1, 9))
    )
    kinds = [arrays(np.uint8, shape), arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 128, 255]))]
    pixels = draw(st.one_of(*kinds))
    return pixels, draw(st.lists(st.integers(-shape[0], shape[0] - 1), max_size=12))


@given(pictures(), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_any_pictures_come_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[np.ndarray, list[int]], episode: int
) -> None:
    pixels, rows = drawn
    frames = FrameFile(write(tmp_path_factory.mktemp("frames") / "file", pixels, episode))
    found = frames.take(np.array(rows, np.int64))
    assert found.dtype == np.uint8
    assert frames.shape == pixels.shape
    assert len(frames) == len(pixels)
    np.testing.assert_array_equal(found, pixels[rows])


def test_a_still_camera_takes_little_and_noise_little_more_than_raw(tmp_path: Path) -> None:
    pixels = still(40, size=32)
    assert write(tmp_path / "still", pixels, 40).stat().st_size < pixels.nbytes / 10
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    assert write(tmp_path / "noise", noise, 40).stat().st_size < pixels.nbytes * 1.02


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    frames = FrameFile(write(tmp_path / "file", still(3)))
    for row in (3, -4):
        with pytest.raises(IndexError):
            frames.take(np.array([0, row]))


def test_threads_read_at_once(tmp_path: Path) -> None:
    pixels = still(600, views=1, size=8)
    frames = FrameFile(write(tmp_path / "file", pixels, 2))  # more keys than stay in memory
    wrong: list[int] = []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(30):
            rows = generator.integers(0, 600, 32)
            if not np.array_equal(frames.take(rows), pixels[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    pixels = still(5, size=4)
    content = write(tmp_path / "whole", pixels).read_bytes()
    rows = np.arange(5)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            FrameFile(path).take(rows)


@pytest.mark.parametrize("change", ["cut", "longer", "empty", "begin", "other", "two"])
def test_other_content_is_noticed(tmp_path: Path, change: str) -> None:
    content = write(tmp_path / "whole", still(5)).read_bytes()
    for length in range(0, len(content), 37):
        changed = {
            "cut": content[:length],
            "longer": content + bytes(length + 1),
            "empty": b"",
            "begin": content[length + 1 :],
            "other": bytes(length),
            "two": content[: length + 1] + content,
        }[change]
        path = tmp_path / "changed"
        path.write_bytes(changed)
        with pytest.raises(DamagedError):
            FrameFile(path).take(np.arange(5))


def test_a_file_that_is_not_finished_is_none(tmp_path: Path) -> None:
    writer = FrameWriter(tmp_path / "file", (2, 1, 3, 4, 4))
    writer.add(0, 0, still(1, 1, 4)[0, 0], None)
    writer.close()
    with pytest.raises(DamagedError):
        FrameFile(tmp_path / "file")
