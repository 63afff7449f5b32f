"""Images of requests: what is accepted, what is refused before it costs anything, and that resizing is one function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogvla.policy.inputs.resize import resize
from cogvla.policy.interface import Camera
from cogvla.real_robot.serving.images import (
    check_size,
    decode_image,
    encode_jpeg,
    encoded_size,
)
from cogvla.real_robot.serving.request import ImageOffer, RequestFormat
from cogvla.real_robot.serving.resize import KERNELS, resize_image
from cogvla.real_robot.serving.wire import pack
from cogvla.tests.support.image_files import SMOOTH, encoded, jpeg_header, png, png_chunk
from cogvla.tests.support.policy_servers import LIBERO_KEYS, ROBOT, observation

GREY, RGBA = Image.fromarray(SMOOTH).convert("L"), Image.fromarray(SMOOTH).convert("RGBA")
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_files_give_their_pixels(kind: str) -> None:
    data = encoded(SMOOTH[:, :20], kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    assert encoded_size(data) == (24, 20)
    assert np.abs(decode_image(data).astype(int) - SMOOTH[:, :20]).max() <= (4 if kind == "JPEG" else 0)


def test_what_does_not_concern_the_pixels_is_left_out() -> None:
    upright = Image.Exif()
    upright[0x0112] = 1
    data = encoded(SMOOTH, "JPEG", exif=upright, comment=b"x" * 999, icc_profile=b"y" * 999)
    np.testing.assert_array_equal(decode_image(data), decode_image(encoded(SMOOTH, "JPEG")))
    bomb = png_chunk(b"zTXt", b"a\0\0" + b"not compressed at all")
    rows = b"".join(b"\0" + row.tobytes() for row in SMOOTH)
    np.testing.assert_array_equal(decode_image(png(24, 24, pixels=rows, more=bomb)), SMOOTH)


REFUSED: dict[str, tuple[bytes, str]] = {
    "grey JPEG": (encoded(GREY, "JPEG"), "JPEG has grey"),
    "grey PNG": (encoded(GREY, "PNG"), "PNG has grey"),
    "grey PNG with alpha": (encoded(GREY.convert("LA"), "PNG"), "grey with alpha"),
    "depth": (encoded(Image.fromarray(np.full((24, 24), 1234, np.uint16)), "PNG"), "grey, 16 bits"),
    "16 bits of a colour": (png(4, 4, bits=16, pixels=bytes(4 * 25)), "16 bits"),
    "12 bits of a colour": (jpeg_header(4, 4, bits=12), "12 bits"),
    "black and white": (encoded(GREY.convert("1"), "PNG"), "grey, 1 bits"),
    "palette": (encoded(Image.fromarray(SMOOTH).convert("P"), "PNG"), "a palette"),
    "alpha": (encoded(RGBA, "PNG"), "RGB with alpha"),
    "transparent colour": (png(4, 4, pixels=bytes(4 * 13), more=png_chunk(b"tRNS", bytes(6))), "transparent"),
    "CMYK": (encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"), "CMYK"),
    "two colours": (jpeg_header(4, 4, colours=2), "JPEG has 8 bits"),
    "progressive": (encoded(SMOOTH, "JPEG", progressive=True), "progressive"),
    "lossless": (jpeg_header(4, 4, frame=0xC3), "progressive or lossless"),
    "arithmetic": (jpeg_header(4, 4, frame=0xC9), "progressive or lossless"),
    "rotated": (encoded(SMOOTH, "JPEG", exif=ROTATED), "rotated"),
    "moving": (
        encoded(SMOOTH, "PNG", save_all=True, append_images=[Image.fromarray(255 - SMOOTH)]),
        "several pictures",
    ),
    "many scans": (encoded(SMOOTH, "JPEG")[:-2] + jpeg_header(24, 24)[-16:-2] * 9, "too many scans"),
    "many segments": (b"\xff\xd8" + b"\xff\xfe\0\2" * 100 + encoded(SMOOTH, "JPEG")[2:], "header has no end"),
    "many chunks": (png(4, 4, pixels=bytes(52), more=png_chunk(b"tEXt", b"a\0b") * 100), "too many chunks"),
    "two sizes": (jpeg_header(4, 4)[:21] + jpeg_header(9, 9)[2:], "no size, or two"),
    "JPEG cut short": (encoded(SMOOTH, "JPEG")[:-50], "cannot be decoded"),
    "JPEG without pixels": (encoded(SMOOTH, "JPEG")[:300], "no end|cannot be decoded"),
    "PNG cut short": (encoded(SMOOTH, "PNG")[:-20], "cut short"),
    "PNG of other pixels": (png(24, 24, pixels=bytes(9)), "cannot be decoded"),
    "padded": (encoded(SMOOTH, "JPEG") + bytes(99_999), "more than its 24x24 pixels"),
    "GIF": (encoded(SMOOTH, "GIF"), "neither a JPEG nor a PNG"),
    "WebP": (encoded(SMOOTH, "WEBP"), "neither a JPEG nor a PNG"),
    "nothing": (b"", "neither a JPEG nor a PNG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_would_become_rgb_by_a_guess_are_refused(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        decode_image(data)


def test_many_pixels_are_not_decoded() -> None:
    for data in (png(40_000, 40_000), jpeg_header(40_000, 40_000)):
        with pytest.raises(ValueError, match="at most"):
            decode_image(data)


@pytest.mark.parametrize(
    "size", [(480, 640), (720, 1280), (1280, 720), (128, 128), (16, 16), (64, 240), (4096, 4096), (2000, 520)]
)
def test_sizes_of_cameras_are_accepted(size: tuple[int, int]) -> None:
    check_size(Camera("wrist", 128, 128), *size)


@pytest.mark.parametrize("size", [(5_000_000, 1), (1, 5_000_000), (128, 513), (15, 15), (4097, 4096), (1, 1), (0, 0)])
def test_sizes_that_no_camera_has_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="'wrist' has"):
        check_size(Camera("wrist", 128, 128), *size)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows_columns", [(480, 640), (100, 131), (720, 1280), (33, 64), (64, 64)])
def test_resizing_is_that_of_training(kernel: str, rows_columns: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*rows_columns, 3), dtype=np.uint8)
    ours = resize_image(image, (128, 96), kernel)
    training = resize(torch.from_numpy(image).permute(2, 0, 1)[None], (128, 96), kernel)[0].permute(1, 2, 0).numpy()
    difference = np.abs(ours.astype(int) - training)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 3e-4, "float32 rounds a sum in another way when its order is another"


def test_values_half_way_between_two_round_as_in_training() -> None:
    steps = np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3) // 64  # 0 to 3: halves, quarters, sixths
    for size in [(32, 48), (48, 72), (96, 144), (128, 192), (32, 32)]:
        training = resize(torch.from_numpy(steps).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
        difference = resize_image(steps, size, "bilinear") != training
        assert difference.mean() < 3e-4


SIDE = 32
CAMERAS = tuple(Camera(name, SIDE, SIDE) for name in ("agentview", "wrist"))
SEEN = observation(robot=replace(ROBOT, cameras=tuple(Camera(c.name, 96, 128) for c in CAMERAS)))


def formats(offer: ImageOffer, **how: Any) -> tuple[bytes, dict[str, np.ndarray]]:
    """What a client sends to a server with this offer, and the images that the server's policy gets."""
    client = RequestFormat(replace(ROBOT, cameras=CAMERAS), LIBERO_KEYS, offer)
    frame = client.write(SEEN, **how)
    return frame, dict(client.read(frame).observation.images)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_client_that_resizes_changes_no_pixel(kernel: str) -> None:
    offer = ImageOffer(("raw", "jpeg", "png"), kernel)
    small, by_client = formats(offer)
    large, by_server = formats(offer, resize=False)
    assert len(small) < len(large) / 10
    for camera in CAMERAS:
        assert by_client[camera.name].shape == (1, SIDE, SIDE, 3)
        np.testing.assert_array_equal(by_client[camera.name], by_server[camera.name])


def test_jpeg_is_decoded_before_it_is_resized() -> None:
    offer = ImageOffer(("raw", "jpeg", "png"), "bilinear")
    _, seen = formats(offer, resize=False, jpeg_quality=90)
    for camera in CAMERAS:
        image = decode_image(encode_jpeg(SEEN.images[camera.name][0], 90))
        np.testing.assert_array_equal(seen[camera.name][0], resize_image(image, (SIDE, SIDE), "bilinear"))


def test_an_older_server_gets_raw_images_of_any_size() -> None:
    _, seen = formats(ImageOffer(), jpeg_quality=90)
    for camera in CAMERAS:
        np.testing.assert_array_equal(seen[camera.name], SEEN.images[camera.name])


def test_a_client_sends_no_image_that_no_camera_has() -> None:
    seen = replace(SEEN, images={**SEEN.images, "wrist": np.zeros((1, 2, 640, 3), np.uint8)})
    with pytest.raises(ValueError, match="'wrist' has 2 rows and 640 columns"):
        RequestFormat(replace(ROBOT, cameras=CAMERAS), LIBERO_KEYS).write(seen)
    with pytest.raises(ValueError, match="the server takes 999: send smaller images"):
        RequestFormat(replace(ROBOT, cameras=CAMERAS), LIBERO_KEYS, max_bytes=999).write(SEEN)


def test_small_files_of_many_pixels_cost_nothing() -> None:
    reader = RequestFormat(replace(ROBOT, cameras=CAMERAS), LIBERO_KEYS, max_bytes=10**6)
    values = {"observation/state": np.zeros(4, np.float32), "prompt": "a"}
    images = {key: png(1000, 1000, pixels=bytes(3_001_000)) for key in ("observation/image", "observation/wrist_image")}
    with pytest.raises(ValueError, match="6000000 bytes when decoded"):
        reader.receive(pack({**values, **images}))
