"""Videos: what is written can be read, captions are really drawn, half a file never appears."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cogvla.envs.rollout.video import STATUS_COLOURS, VideoWriter, annotate, contact_sheet


def frames(path: Path) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    with av.open(str(path)) as container:
        found += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return found


def write(path: Path, shades: list[int], size: int = 64) -> None:
    with VideoWriter(path, fps=20) as video:
        for shade in shades:
            video.add(np.full((size, size, 3), shade, np.uint8))


def test_frames_come_back_in_order(tmp_path: Path) -> None:
    shades = list(range(20, 240, 20))
    write(tmp_path / "new" / "video.mp4", shades)
    read = frames(tmp_path / "new" / "video.mp4")
    assert [round(float(f.mean())) for f in read] == pytest.approx(shades, abs=4)
    with av.open(str(tmp_path / "new" / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.pix_fmt) == (20, "yuv420p")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["video.mp4"]


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"the old one")
    with pytest.raises(KeyError), VideoWriter(path) as video:  # noqa: PT012
        video.add(np.zeros((64, 64, 3), np.uint8))
        raise KeyError
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="no frame"), VideoWriter(tmp_path / "empty.mp4"):
        pass


@pytest.mark.parametrize("shape", [(96, 96, 3), (31, 45, 3), (256, 256, 3)])
def test_captions_do_not_cover_the_picture(shape: tuple[int, int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    shown = annotate(picture, "pick up the red cube", "step 3 / 200", "success")
    assert shown.shape[0] % 2 == shown.shape[1] % 2 == 0
    height, width = shape[:2]
    offsets = range(shown.shape[0] - height + 1)
    rows = [r for r in offsets if np.array_equal(shown[r : r + height, :width], picture)]
    assert rows, "the whole picture is in the frame"
    top = shown[: rows[0]].reshape(-1, 3)
    assert len(np.unique(top, axis=0)) > 10, "there is text above it"


def test_the_outcome_is_visible_and_every_text_has_its_place() -> None:
    picture = np.zeros((256, 256, 3), np.uint8)
    plain = annotate(picture, "pick up the red cube", "step 3 / 200")
    green = annotate(picture, "pick up the red cube", "step 3 / 200", "success")
    red = annotate(picture, "pick up the red cube", "step 3 / 200", "failure (replay differs)")
    assert plain.shape == green.shape == red.shape == annotate(picture, "word " * 100, "step 3 / 200").shape
    for image, status in ((green, "success"), (red, "failure")):
        assert (np.abs(image.astype(int) - STATUS_COLOURS[status]).sum(-1) < 30).any()
        assert not (np.abs(plain.astype(int) - STATUS_COLOURS[status]).sum(-1) < 30).any()
    assert not np.array_equal(plain, annotate(picture, "pick up the blue cube", "step 3 / 200"))
    assert not np.array_equal(plain, annotate(picture, "pick up the red cube", "step 4 / 200"))


def test_contact_sheet_spans_the_video(tmp_path: Path) -> None:
    write(tmp_path / "video.mp4", [0] * 10 + [120] * 10 + [240])
    sheet = contact_sheet(tmp_path / "video.mp4", frames=3, height=32)
    image = np.asarray(Image.open(io.BytesIO(sheet)).convert("L"))
    assert image.shape == (32, 3 * 32 + 2 * 4)
    assert [round(float(image[:, x : x + 32].mean())) for x in (0, 36, 72)] == pytest.approx([0, 120, 240], abs=6)


def test_a_contact_sheet_keeps_the_colours_of_small_things(tmp_path: Path) -> None:
    down, right = np.mgrid[:128, :128]
    frame = np.stack([90 + down // 2, 88 + right // 2, 80 + (down + right) // 4], axis=-1).astype(np.uint8)
    colours = {(8, 8): (250, 220, 20), (8, 64): (250, 115, 5), (64, 8): (30, 50, 230), (64, 64): (130, 25, 165)}
    for (row, column), colour in colours.items():
        frame[row : row + 8, column : column + 8] = colour
    with VideoWriter(tmp_path / "video.mp4") as video:
        video.add(frame, repeat=3)
    (played, *_) = frames(tmp_path / "video.mp4")
    sheet = Image.open(io.BytesIO(contact_sheet(tmp_path / "video.mp4", frames=2, height=128))).convert("RGB")
    for row, column in colours:
        middle = slice(row + 2, row + 6), slice(column + 2, column + 6)
        shown, real = (pixels[middle].mean((0, 1)) for pixels in (np.asarray(sheet), played))
        assert np.abs(shown - real).max() < 25


def test_a_short_video_still_has_a_sheet(tmp_path: Path) -> None:
    write(tmp_path / "video.mp4", [50])
    assert Image.open(io.BytesIO(contact_sheet(tmp_path / "video.mp4"))).height == 64


def test_a_broken_video_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4 is no readable video"):
        contact_sheet(path)
    with pytest.raises(ValueError, match="no readable video"):
        contact_sheet(tmp_path / "missing.mp4")
