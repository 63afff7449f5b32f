"""Resize images to the policy's size without torch, with the pixels that `policy.inputs.resize` gives.

Server and clients share this function, so an image that a client resizes gives the same pixels as one that the server
resizes. Pillow computes in float32 like torch, but adds in another order. For `bilinear`, values so close to half-way
between two integers that the order decides are therefore computed again, in torch's order (that of its CPU kernels on
x86-64: four products at a time, the rest fused). For `lanczos3`, and on other devices, about one value in 10,000 may
round to the other integer.

Shape legend: H, W size of the input, h, w of the output, N values, O outputs of an axis, T taps of a kernel.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

KERNELS = {"bilinear": Image.Resampling.BILINEAR, "lanczos3": Image.Resampling.LANCZOS}
"""Kernels of `policy.inputs.resize`."""
_CLOSE = 1e-3
"""Distance from half-way within which a value is computed again; float32 is much more exact."""
_VECTOR = 4


def resize_image(image_HW3: np.ndarray, size: tuple[int, int], kernel: str) -> np.ndarray:
    """Resize an image, uint8 [H,W,3], to uint8 [h,w,3], (h, w) = `size`; an image of that size is returned unchanged.

    Args:
        image_HW3: the image.
        size: rows and columns.
        kernel: one of `KERNELS`.
    """
    if image_HW3.shape[:2] == size:
        return image_HW3
    resized_hw3 = np.empty((*size, 3), np.float32)
    for colour in range(3):
        plane = Image.fromarray(np.ascontiguousarray(image_HW3[..., colour], dtype=np.float32))
        resized_hw3[..., colour] = np.asarray(plane.resize(size[::-1], KERNELS[kernel]))
    if kernel == "bilinear":
        close = np.nonzero(np.abs(np.abs(resized_hw3 - np.rint(resized_hw3)) - 0.5) < _CLOSE)
        resized_hw3[close] = _bilinear(image_HW3, size, *close)
    return np.rint(resized_hw3).clip(0, 255).astype(np.uint8)


def _bilinear(
    image_HW3: np.ndarray, size: tuple[int, int], row_N: np.ndarray, column_N: np.ndarray, colour_N: np.ndarray
) -> np.ndarray:
    """Compute values [N] of the resized image: along the rows first, then along the columns."""
    (height, width), (rows, columns) = image_HW3.shape[:2], size
    first_O, row_taps_O, row_weights_OT = _taps(height, rows)
    left_O, column_taps_O, column_weights_OT = _taps(width, columns)
    y_NT = np.minimum(first_O[row_N, None] + np.arange(row_weights_OT.shape[1]), height - 1)
    x_NT = np.minimum(left_O[column_N, None] + np.arange(column_weights_OT.shape[1]), width - 1)
    pixels_NTT = image_HW3[y_NT[:, :, None], x_NT[:, None, :], colour_N[:, None, None]].astype(np.float32)
    along_NT = _sum(pixels_NTT, column_weights_OT[column_N, None], column_taps_O[column_N, None])
    return _sum(along_NT, row_weights_OT[row_N], row_taps_O[row_N])


def _sum(values: np.ndarray, weights: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Return the weighted sum [...] of float32 values [...,T], each of its first `taps` values, in torch's order."""
    total = values[..., 0] * weights[..., 0]
    for tap in range(1, values.shape[-1]):
        value, weight = values[..., tap], weights[..., tap]
        plain = total + value * weight
        fused = (total.astype(float) + value.astype(float) * weight.astype(float)).astype(np.float32)
        in_vector = tap - 1 < (taps - 1) // _VECTOR * _VECTOR
        total = np.where(tap < taps, np.where(in_vector, plain, fused), total)
    return total


@lru_cache(maxsize=32)
def _taps(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first tap [O], the number of taps [O], and the weights float32 [O,T] of an axis."""
    one, half = np.float32(1), np.float32(0.5)
    stretch = np.float32(inputs) / np.float32(outputs)
    support, inverse = max(stretch, one), min(one / stretch, one)
    centre_O = stretch * (np.arange(outputs, dtype=np.float32) + half)
    first_O = np.maximum((centre_O - support + half).astype(int), 0)
    taps_O = np.minimum((centre_O + support + half).astype(int), inputs) - first_O
    tap_T = np.arange(taps_O.max())
    away_OT = ((first_O[:, None] + tap_T).astype(np.float32) - centre_O[:, None] + half) * inverse
    weights_OT = np.where(tap_T < taps_O[:, None], np.maximum(one - np.abs(away_OT), 0), 0).astype(np.float32)
    total_O = np.zeros(outputs, np.float32)
    for tap in tap_T:
        total_O += weights_OT[:, tap]
    return first_O, taps_O, weights_OT / total_O[:, None]
