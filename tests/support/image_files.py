"""Files of images for tests: good ones, and headers of ones that nobody may decode."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SMOOTH = np.stack(np.broadcast_arrays(*np.ix_(range(0, 240, 10), range(0, 240, 10)), 90), -1).astype(np.uint8)
"""uint8 [24,24,3]."""


def encoded(picture: Image.Image | np.ndarray, kind: str, **how: Any) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **how)
    return buffer.getvalue()


def jpeg_header(height: int, width: int, *, frame: int = 0xC0, bits: int = 8, colours: int = 3) -> bytes:
    """A JPEG that says how large it is, and ends."""
    size = struct.pack(">BHHB", bits, height, width, colours) + b"\1\x11\0" * colours
    scan = bytes([colours]) + b"\1\0" * colours + b"\0\x3f\0"
    parts = [
        bytes([0xFF, kind]) + struct.pack(">H", len(part) + 2) + part for kind, part in ((frame, size), (0xDA, scan))
    ]
    return b"\xff\xd8" + b"".join(parts) + b"\xff\xd9"


def png(height: int, width: int, *, bits: int = 8, colours: int = 2, pixels: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG of any size with these pixels, compressed here, and with further chunks."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), more, png_chunk(b"IDAT", zlib.compress(pixels)), png_chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_chunk(name: bytes, data: bytes = b"") -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
