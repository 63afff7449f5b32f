"""Pictures of one colour in the encodings of sensor_msgs/Image."""

from __future__ import annotations

import numpy as np

from cogvla.real_robot.ros.node import Fields

COLOURS = {"red": (254, 0, 0), "blue": (0, 0, 254), "cyan": (0, 254, 254), "grey": (128, 128, 128)}
YUV = {"red": (81, 90, 240), "blue": (41, 240, 110), "cyan": (170, 166, 16), "grey": (126, 128, 128)}
"""Y, U and V of these colours in ITU-R BT.601, as in its colour bars."""
CHANNELS = {"rgb8": "RGB", "bgr8": "BGR", "8UC3": "BGR", "rgba8": "RGBA", "bgra8": "BGRA"}
ORDERS = {"yuv422": "UYVY", "uyvy": "UYVY", "yuv422_yuy2": "YUYV", "yuyv": "YUYV"}
PATTERNS = {"bayer_rggb8": "RGGB", "bayer_bggr8": "BGGR", "bayer_gbrg8": "GBRG", "bayer_grbg8": "GRBG"}


def one_colour(encoding: str, colour: str, height: int, width: int) -> np.ndarray:
    """The rows of a picture, uint8 [height, bytes of a row]; height and width are even."""
    rgb = dict(zip("RGBA", (*COLOURS[colour], 9), strict=True))
    if encoding in CHANNELS:
        return np.tile(np.array([rgb[letter] for letter in CHANNELS[encoding]], np.uint8), (height, width))
    if encoding in ORDERS:
        yuv = dict(zip("YUV", YUV[colour], strict=True))
        return np.tile(np.array([yuv[letter] for letter in ORDERS[encoding]], np.uint8), (height, width // 2))
    square = np.array([rgb[letter] for letter in PATTERNS[encoding]], np.uint8).reshape(2, 2)
    return np.tile(square, (height // 2, width // 2))


def fields_of(encoding: str, rows_HR: np.ndarray, width: int) -> Fields:
    """The fields of an Image without a header."""
    data = np.ascontiguousarray(rows_HR).reshape(-1)
    return {"encoding": encoding, "height": len(rows_HR), "width": width, "step": rows_HR.shape[1], "data": data}
