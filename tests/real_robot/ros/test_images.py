"""Images of ROS 2 messages: every encoding gives the right colours, and what is not RGB is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvla.real_robot.ros.messages import compressed_image_of, image_of
from cogvla.tests.support.image_files import SMOOTH, encoded, png
from cogvla.tests.support.ros_images import COLOURS, ORDERS, PATTERNS, one_colour

HEIGHT, WIDTH = 6, 8


def message(encoding: str, pixels_HR: np.ndarray, padding: int = 0, **changes: Any) -> SimpleNamespace:
    """An Image of rows of bytes, each with some bytes of padding."""
    rows = np.pad(pixels_HR.astype(np.uint8), ((0, 0), (0, padding)), constant_values=77)
    values = {
        "encoding": encoding,
        "height": len(rows),
        "width": WIDTH,
        "step": rows.shape[1],
        "data": rows.reshape(-1),
    }
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("encoding", ORDERS)
@pytest.mark.parametrize("padding", [0, 6])
def test_yuv_is_converted(encoding: str, colour: str, padding: int) -> None:
    image = image_of(message(encoding, one_colour(encoding, colour, HEIGHT, WIDTH), padding))
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image.astype(int) - COLOURS[colour]).max() <= 2


@pytest.mark.parametrize("colour", [(200, 100, 50), (0, 0, 255), (10, 250, 20)])
@pytest.mark.parametrize("encoding", PATTERNS)
@pytest.mark.parametrize("padding", [0, 5])
def test_bayer_is_converted(encoding: str, colour: tuple[int, int, int], padding: int) -> None:
    square = np.array([colour["RGB".index(letter)] for letter in PATTERNS[encoding]]).reshape(2, 2)
    image = image_of(message(encoding, np.tile(square, (HEIGHT // 2, WIDTH // 2)), padding))
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert (image == colour).all()


def test_a_pixel_of_yuv_keeps_its_place() -> None:
    pixels = np.tile([16, 128], (HEIGHT, WIDTH))  # black
    pixels[4, 2 * 5] = 235
    image = image_of(message("yuv422_yuy2", pixels))
    assert np.argwhere(image.sum(-1) > 700).tolist() == [[4, 5]]


REFUSED = {
    "depth": "16UC1",
    "depth in metres": "32FC1",
    "grey": "mono8",
    "grey of 16 bits": "mono16",
    "one channel": "8UC1",
    "colours of 16 bits": "rgb16",
    "Bayer of 16 bits": "bayer_rggb16",
    "signed": "8SC3",
    "four channels": "8UC4",
    "another YUV": "nv21",
    "nothing": "",
}


@pytest.mark.parametrize("name", REFUSED)
def test_encodings_that_are_not_rgb_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"encoding '{REFUSED[name]}' is not supported"):
        image_of(message(REFUSED[name], np.zeros((HEIGHT, 8 * WIDTH)), is_bigendian=1))


@pytest.mark.parametrize(
    ("encoding", "changes"),
    [
        ("yuv422", {"width": 7}),
        ("bayer_rggb8", {"height": 5}),
        ("bayer_grbg8", {"width": 2}),
        ("rgb8", {"height": 0}),
        ("rgb8", {"width": 0}),
        ("rgb8", {"height": 2**31}),
        ("yuv422_yuy2", {"width": 2**31}),
        ("bayer_bggr8", {"step": 3}),
    ],
)
def test_sizes_that_do_not_fit_are_refused(encoding: str, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"has only|in pairs"):
        image_of(message(encoding, np.zeros((HEIGHT, 3 * WIDTH)), **changes))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_compressed_images_are_rgb(kind: str) -> None:
    image = compressed_image_of(SimpleNamespace(format="bgr8; compressed", data=encoded(SMOOTH, kind)))
    assert np.abs(image.astype(int) - SMOOTH).max() <= 12


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(Image.fromarray(SMOOTH).convert("L"), "JPEG"), "grey"),
        (encoded(Image.fromarray(np.full((24, 24), 1234, np.uint16)), "PNG"), "16 bits"),
        (bytes(12) + encoded(Image.fromarray(np.full((24, 24), 1234, np.uint16)), "PNG"), "neither"),  # compressedDepth
        (encoded(Image.fromarray(SMOOTH).convert("P"), "PNG"), "palette"),
        (encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"), "CMYK"),
        (encoded(Image.fromarray(SMOOTH).convert("RGBA"), "PNG"), "alpha"),
        (png(60_000, 60_000), "at most"),
        (b"", "neither"),
    ],
)
def test_compressed_images_that_are_not_rgb_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'16UC1; x'.*cannot be read: .*{reason}"):
        compressed_image_of(SimpleNamespace(format="16UC1; x", data=np.frombuffer(data, np.uint8)))
