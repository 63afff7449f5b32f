"""Faults of cameras, on the images that a policy gets: noise, blur, haze, compression, exposure, late frames.

Each episode has one fault, with its own values for each camera. Widths are shares of the image's width, so that the
fault does not depend on the resolution.

Shape legend: H, W image.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageFilter

from cogvla.envs.perturbation.perturbation import Perturbation

FAULTS = ("noise", "defocus", "motion", "haze", "jpeg", "exposure", "late")
HAZE_LEVEL = 200.0


class FaultySensor:
    """The cameras of one episode.

    Args:
        perturbation: gives the level.
        seed: see `Perturbation.seed`.
    """

    def __init__(self, perturbation: Perturbation, seed: list[int]) -> None:
        self._level, self._seed = perturbation, seed
        self.fault = str(np.random.default_rng(seed).choice(FAULTS))
        self._last: dict[str, np.ndarray] = {}

    def __call__(self, images: Mapping[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
        """Return the images, uint8 [H,W,3] by camera, as the sensors give them at a control step."""
        seen = {}
        for index, (name, image_HW3) in enumerate(images.items()):
            whole = np.random.default_rng([*self._seed, index])  # the same for all images of a camera in an episode
            each = np.random.default_rng([*self._seed, index, step])
            seen[name] = self._image(name, image_HW3, whole, each)
        return seen

    def _image(
        self, name: str, image_HW3: np.ndarray, whole: np.random.Generator, each: np.random.Generator
    ) -> np.ndarray:
        pick, width = self._level.pick, image_HW3.shape[1]
        if self.fault == "late":
            late = name in self._last and each.random() < pick(0.1, 0.25, 0.5)
            self._last[name] = self._last[name] if late else image_HW3.copy()
            return self._last[name]
        if self.fault == "noise":
            return _bytes(image_HW3 + each.normal(0, pick(6, 14, 28), image_HW3.shape))
        if self.fault == "defocus":
            blurred = Image.fromarray(image_HW3).filter(ImageFilter.GaussianBlur(pick(0.004, 0.008, 0.014) * width))
            return np.asarray(blurred)
        if self.fault == "motion":
            return _moved(image_HW3, whole.uniform(0, np.pi), pick(0.02, 0.04, 0.07) * width)
        if self.fault == "haze":
            share = pick(0.15, 0.30, 0.50)
            return _bytes(image_HW3 * (1 - share) + share * HAZE_LEVEL)
        if self.fault == "jpeg":
            buffer = io.BytesIO()
            Image.fromarray(image_HW3).save(buffer, "JPEG", quality=int(pick(40, 20, 10)))
            return np.asarray(Image.open(buffer))
        exposure = whole.uniform(*((0.85, 1.1), (0.7, 1.2), (0.5, 1.3))[self._level.level - 1])
        balance_3 = 1 + whole.uniform(-1, 1, 3) * pick(0.08, 0.15, 0.25)
        return _bytes(image_HW3 * (exposure * balance_3))


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def _moved(image_HW3: np.ndarray, angle: float, length: float) -> np.ndarray:
    """Return the mean of the image along a line of this length in pixels."""
    reach = int(np.ceil(length / 2))
    height, width = image_HW3.shape[:2]
    padded = np.pad(image_HW3, ((reach, reach), (reach, reach), (0, 0)), mode="edge").astype(np.float32)
    places = np.linspace(-length / 2, length / 2, 2 * reach + 1)
    total = np.zeros(image_HW3.shape, np.float32)
    for place in places:
        down, right = round(float(np.sin(angle) * place)) + reach, round(float(np.cos(angle) * place)) + reach
        total += padded[down : down + height, right : right + width]
    return _bytes(total / len(places))
