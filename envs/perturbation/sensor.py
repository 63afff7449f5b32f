"""Perturb the images that a policy sees, as a worse camera would. Works for every suite, at any image size.

Each episode has one fault; the initial states of a task take turns through all.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from cogvla.envs.perturbation.perturbation import Values, by_level, within

LEVELS: Sequence[Values] = by_level(
    noise=(6, 14, 24),  # standard deviation in grey levels of 255
    defocus=(0.006, 0.010, 0.016),  # standard deviation of the blur, in widths of the image
    motion=(0.02, 0.04, 0.07),  # length of the streak, in widths of the image
    fog=(0.15, 0.30, 0.50),  # share of the fog's grey, on average
    jpeg=(40, 22, 12),  # quality
    dropped=(0.15, 0.35, 0.60),  # probability that the policy gets its last image again
    exposure=([0.15, 0.3], [0.3, 0.6], [0.6, 1.0]),  # stops, brighter or darker, for each camera
    white_balance=([0.04, 0.08], [0.08, 0.16], [0.16, 0.28]),  # with the exposure: relative change of red and blue
)
FAULTS = ("noise", "defocus", "motion", "fog", "jpeg", "dropped", "exposure")
_FOG_GREY = 0.72


class Sensor:
    """Changes the images of one episode.

    Args:
        level: level of the dimension `sensor`.
        seed: see `Perturbation.seed`.
        turn: number of the episode, whose faults take turns.

    Attributes:
        drawn: what the episode's cameras suffer from.
    """

    def __init__(self, level: int, seed: Sequence[int], turn: int) -> None:
        self._seed = list(seed)
        self._fault = FAULTS[turn % len(FAULTS)]
        self._values = LEVELS[level - 1]
        self._last: dict[str, np.ndarray] = {}
        self.drawn: dict[str, Any] = {"fault": self._fault}

    def __call__(self, images: Mapping[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
        """Return the images as the policy gets them, uint8 [H,W,3]; `step`: number of control steps before them."""
        seen = {name: self._changed(name, image, step) for name, image in images.items()}
        self._last |= seen
        return seen

    def _changed(self, camera: str, image: np.ndarray, step: int) -> np.ndarray:
        name = zlib.crc32(camera.encode())
        fixed = np.random.default_rng([*self._seed, name])  # the same in all images of this camera
        rng = np.random.default_rng([*self._seed, name, step])
        amount = self._values[self._fault]
        match self._fault:
            case "noise":
                return _rounded(image + rng.normal(0.0, amount, image.shape))
            case "defocus":
                blur = ImageFilter.GaussianBlur(amount * image.shape[1])
                return np.asarray(Image.fromarray(image).filter(blur))
            case "motion":
                return _smeared(image, amount * image.shape[1], float(rng.uniform(0.0, np.pi)))
            case "fog":
                thick = amount * (0.75 + 0.5 * _clouds(fixed, image.shape[0], image.shape[1]))[..., None]
                return _rounded((1.0 - thick) * image + thick * 255.0 * _FOG_GREY)
            case "jpeg":
                packed = io.BytesIO()
                Image.fromarray(image).save(packed, "JPEG", quality=amount, subsampling=0)
                return np.asarray(Image.open(packed))
            case "dropped":
                lost = bool(rng.random() < amount) and camera in self._last
                return self._last[camera] if lost and self._last[camera].shape == image.shape else image
            case _:
                return self._exposed(image, fixed)

    def _exposed(self, image: np.ndarray, fixed: np.random.Generator) -> np.ndarray:
        """Brighten or darken the light, not the grey levels, and shift red against blue."""
        signs = np.where(fixed.random(2) < 0.5, -1.0, 1.0)
        stops, shift = (within(fixed, self._values[name]) for name in ("exposure", "white_balance"))
        balance = 1.0 + signs[1] * shift * np.array([1.0, 0.0, -1.0])
        light = (image / 255.0) ** 2.2 * 2.0 ** (signs[0] * stops) * balance
        return _rounded(255.0 * np.clip(light, 0.0, 1.0) ** (1 / 2.2))


def _rounded(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _smeared(image: np.ndarray, length: float, angle: float) -> np.ndarray:
    """Average an image along a line of `length` pixels; the border is repeated."""
    count = 2 * int(np.ceil(length)) + 1
    reach = int(np.ceil(length / 2)) + 1
    padded = np.pad(image.astype(np.float32), ((reach + 1, reach + 1), (reach + 1, reach + 1), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    total = np.zeros(image.shape, np.float32)
    for along in np.linspace(-length / 2, length / 2, count):
        x, y = reach + 1 + along * np.cos(angle), reach + 1 + along * np.sin(angle)
        left, top = int(np.floor(x)), int(np.floor(y))
        for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
            for column, share_x in ((left, 1 - (x - left)), (left + 1, x - left)):
                total += share_y * share_x * padded[row : row + height, column : column + width]
    return _rounded(total / count)


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return smooth patches in [0,1], [H,W]; the same at every size."""
    coarse = Image.fromarray(rng.uniform(0.0, 1.0, (4, 4)).astype(np.float32))
    return np.clip(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)), 0.0, 1.0)
