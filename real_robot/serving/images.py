"""Images on their way to a policy: bounds of their size, JPEG and PNG.

What an encoded image needs is known from its header; nothing is decoded before the caller has accepted its size.
Images that would only become RGB by a guess (grey, palette, alpha, CMYK, 16 bits, rotated) are refused.

Shape legend: H, W image size.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from cogvla.policy.interface import Camera

JPEG, PNG = "jpeg", "png"
LARGER, SMALLER, STRETCHED = 32, 8, 4
"""Most that an image's sides may be longer or shorter than the camera's, and that its ratio may differ."""

MAX_PIXELS = 2**25

_JPEG_START, _PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {0: "grey", 3: "a palette", 4: "grey with alpha", 6: "RGB with alpha"}
_JPEG_COLOURS = {1: "grey", 4: "CMYK"}
_PARTS = 64
"""Most segments of a JPEG's header, and chunks of a PNG beside its pixels."""
_SCANS = 4
_HEADER_BYTES = 2**16
_ORIENTATION = 0x0112
_UPRIGHT = 1


def check_size(camera: Camera, height: int, width: int) -> None:
    """Raise ValueError unless an image of this size can show what the policy's camera shows.

    An image far larger, smaller or longer than the camera's is a mistake, and resizing it may take minutes.
    """
    large = height > LARGER * camera.height or width > LARGER * camera.width
    small = height * SMALLER < camera.height or width * SMALLER < camera.width
    long, wide = height * camera.width, width * camera.height
    if large or small or max(long, wide) > STRETCHED * min(long, wide):
        raise ValueError(
            f"an image of camera {camera.name!r} has {height} rows and {width} columns; the policy's have "
            f"{camera.height} and {camera.width}: at most {LARGER} times as many, an eighth, or {STRETCHED} times "
            "another ratio is accepted"
        )


def encoded_size(data: bytes) -> tuple[int, int]:
    """Return rows and columns of a JPEG or PNG from its header.

    Raises:
        ValueError: it is neither, it is damaged, or its pixels are not RGB with 8 bits.
    """
    return _opened(data)[:2]


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a JPEG or PNG to uint8 [H,W,3] RGB.

    Args:
        data: the file.
        max_pixels: most pixels of the image; its header is read before anything is decoded.

    Raises:
        ValueError: see `encoded_size`; or there are more pixels, or they cannot be decoded.
    """
    height, width, kind, plain = _opened(data)
    if height * width > max_pixels:
        raise ValueError(f"the {kind.upper()} has {height}x{width} pixels; at most {max_pixels} are decoded")
    if len(data) > 3 * height * width + _HEADER_BYTES:
        raise ValueError(f"the {kind.upper()} has {len(data)} bytes, more than its {height}x{width} pixels")
    try:
        with Image.open(io.BytesIO(plain), formats=(kind.upper(),)) as picture:
            pixels_HW3 = np.array(picture)
    except Exception as error:  # decoders raise errors of every kind for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the {kind.upper()} cannot be decoded: {reason[:100]}") from None
    if pixels_HW3.shape != (height, width, 3) or pixels_HW3.dtype != np.uint8:
        raise ValueError(f"the {kind.upper()} does not have the {height}x{width} RGB pixels of its header")
    return pixels_HW3


def encode_jpeg(image_HW3: np.ndarray, quality: int) -> bytes:
    """Encode an image, uint8 [H,W,3] RGB, as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HW3)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _opened(data: bytes) -> tuple[int, int, str, bytes]:
    """Return rows, columns and kind of an encoded image, and the file without what does not concern its pixels."""
    if data.startswith(_PNG_START):
        return _png(data)
    if data.startswith(_JPEG_START):
        return _jpeg(data)
    raise ValueError("the image is neither a JPEG nor a PNG")


def _png(data: bytes) -> tuple[int, int, str, bytes]:
    if len(data) < 33 or data[8:16] != b"\x00\x00\x00\x0dIHDR":
        raise ValueError("the PNG is damaged: it has no header")
    width, height, bits, colours = struct.unpack(">IIBB", data[16:26])
    if colours != 2 or bits != 8:
        _refuse("PNG", bits, _PNG_COLOURS.get(colours))
    kept, at, others = [data[:33]], 33, 0
    while at + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        if name in (b"tRNS", b"acTL"):
            raise ValueError("the PNG has transparent colours or several pictures; send plain RGB")
        if name == b"IDAT":
            kept.append(data[at : at + 12 + length])
        elif name != b"IEND":
            others += 1
        if others > _PARTS or len(kept) > _PARTS + len(data) // 1024:
            raise ValueError("the PNG has too many chunks")
        at += 12 + length
        if name == b"IEND":
            return height, width, PNG, b"".join([*kept, data[at - 12 : at]])
    raise ValueError("the PNG is cut short")


def _jpeg(data: bytes) -> tuple[int, int, str, bytes]:
    kept, size, at = [data[:2]], None, 2
    for _ in range(_PARTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            break
        marker, length = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])[0]
        segment = data[at : at + 2 + length]
        if marker == 0xDA and size is not None:
            if data.count(b"\xff\xda", at) > _SCANS:
                raise ValueError("the JPEG has too many scans")
            return *size, JPEG, b"".join([*kept, data[at:]])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if size is not None or len(segment) < 10:
                raise ValueError("the JPEG is damaged: its header has no size, or two")
            if marker > 0xC1:
                raise ValueError("the JPEG is progressive or lossless; send a baseline JPEG")
            bits, height, width, colours = struct.unpack(">BHHB", segment[4:10])
            if bits != 8 or colours != 3:
                _refuse("JPEG", bits, _JPEG_COLOURS.get(colours))
            size = height, width
        if marker == 0xE1 and segment[4:10] == b"Exif\x00\x00":
            _check_upright(segment[4:])
        elif not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):  # keep all but comments and metadata
            kept.append(segment)
        at += 2 + length
    raise ValueError("the JPEG is damaged: its header has no end")


def _check_upright(exif: bytes) -> None:
    found = Image.Exif()
    try:
        found.load(exif)
        orientation = found.get(_ORIENTATION, _UPRIGHT)
    except Exception:  # the metadata is damaged, and not needed
        return
    if orientation != _UPRIGHT:
        raise ValueError("the JPEG says that it must be rotated; send upright images without this Exif entry")


def _refuse(kind: str, bits: int, colours: str | None) -> None:
    found = f"{bits} bits" if colours is None else f"{colours}, {bits} bits"
    raise ValueError(f"the {kind} has {found}; policy cameras are RGB with 8 bits for each colour")
