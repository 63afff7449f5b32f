"""Changes of light and sensor in training images: exposure, white balance, gamma, haze, colour, blur and noise.

They are drawn for each camera of each sample. What changes each channel alone is one table of 256 values, noise is a
window of one fixed picture of noise, and a quarter of the images is blurred: so a training step on a CPU hardly takes
longer.

Shape legend: X images, H, W image, P pixels, V values of a pixel, K kernel, Y = 3X channels of all images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.configs.build import check_kind

GAINS, GAMMA, HAZE, COLOUR, NOISE, BLUR, PLACE = slice(0, 3), 3, 4, 5, 6, 7, 8
"""Columns of a drawn light: gain of each channel, exponent, share of haze, factor on the distance to grey, sigma of the
noise, sigma of the blur as a share of the image's width, and where the noise is taken from."""
HAZE_LEVEL = 0.7
"""Pixel value of the haze, a light grey."""
GREY = (0.299, 0.587, 0.114)
"""Weights of the channels in the luminance (ITU-R BT.601)."""
BLURRED = 0.25
"""Share of the images that are blurred."""
BLUR_RADIUS = 3
"""Pixels on each side of a pixel that its blur reads."""
NOISE_MARGIN = 64


@dataclass(frozen=True)
class LightConfig:
    """Changes of light and sensor in training images. The defaults change nothing.

    Attributes:
        exposure: range of the factor on all channels.
        white_balance: how much a channel's gain may differ from the mean gain, as a share.
        gamma: range of the exponent on pixel values.
        haze: largest share of light grey in the image.
        colour: range of the factor on the distance of each pixel to grey.
        noise: largest standard deviation of noise, for pixel values in [0,1].
        blur: largest standard deviation of the blur, as a share of the image's width; a quarter of the images has it.
    """

    exposure: tuple[float, float] = (1.0, 1.0)
    white_balance: float = 0.0
    gamma: tuple[float, float] = (1.0, 1.0)
    haze: float = 0.0
    colour: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("exposure", 0.01), ("gamma", 0.01), ("colour", 0)):
            check_kind(tuple[float, float], getattr(self, name), f"augmentation.light.{name}")
            low, high = getattr(self, name)
            object.__setattr__(self, name, (low, high))
            if not least <= low <= high:
                raise ValueError(
                    f"augmentation.light.{name} must be [low, high] with {least} <= low <= high, got [{low}, {high}]"
                )
        for name, most in (("white_balance", 1), ("haze", 1), ("noise", 1), ("blur", 0.1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"augmentation.light.{name} must be in [0,{most}], got {getattr(self, name)}")

    def draw(self, samples: int, views: int, generator: torch.Generator) -> Tensor:
        """Draw the light of each image of B samples with V views, [B,V,9]; it depends only on the generator."""
        unit = torch.rand(samples, views, 11, generator=generator)
        gains = ((2 * unit[..., :3] - 1) * math.log1p(self.white_balance)).exp()
        exposure, gamma = (_between(r, unit[..., i, None]) for r, i in ((self.exposure, 3), (self.gamma, 4)))
        low, high = self.colour
        others = [self.haze * unit[..., 5], low + (high - low) * unit[..., 6], self.noise * unit[..., 7]]
        others += [self.blur * unit[..., 8] * (unit[..., 9] < BLURRED), unit[..., 10]]
        return torch.cat((gains / gains.mean(-1, keepdim=True) * exposure, gamma, torch.stack(others, -1)), dim=-1)


def _between(limits: tuple[float, float], unit: Tensor) -> Tensor:
    """Return factors between the limits, evenly spread on a logarithmic scale."""
    return limits[0] * (limits[1] / limits[0]) ** unit


def relight(pixels_X3HW: Tensor, light_X9: Tensor) -> Tensor:
    """Change light and sensor of images.

    Args:
        pixels_X3HW: images, uint8.
        light_X9: drawn light, on the host, so that nothing waits for a device.

    Returns:
        Float images in [0,1].
    """
    device = pixels_X3HW.device
    blurred_x = light_X9[:, BLUR].nonzero().flatten().to(device)
    light_X9 = light_X9.to(device)
    level_V = torch.arange(256, device=device) / 255
    lit_X3V = (level_V * light_X9[:, GAINS, None]).clamp(0, 1) ** light_X9[:, GAMMA, None, None]
    lit_X3V = torch.lerp(lit_X3V, torch.full_like(lit_X3V, HAZE_LEVEL), light_X9[:, HAZE, None, None])
    x_X3P = lit_X3V.gather(2, pixels_X3HW.flatten(2).long())  # indices cannot have 8 bits
    grey_33 = torch.tensor(GREY, device=device).expand(3, 3)
    mix_X33 = torch.lerp(grey_33, torch.eye(3, device=device), light_X9[:, COLOUR, None, None])
    x_X3HW = torch.bmm(mix_X33, x_X3P).view(pixels_X3HW.shape)
    if len(blurred_x):
        x_X3HW[blurred_x] = _blur(x_X3HW[blurred_x], light_X9[blurred_x, BLUR])
    height, width = x_X3HW.shape[-2:]
    place_X = (light_X9[:, PLACE] * NOISE_MARGIN**2).long()
    windows = _noise(height, width, device).unfold(1, height, 1).unfold(2, width, 1)
    noise_3XHW = windows[:, place_X // NOISE_MARGIN, place_X % NOISE_MARGIN]
    return x_X3HW.addcmul_(noise_3XHW.transpose(0, 1), light_X9[:, NOISE, None, None, None]).clamp_(0, 1)


def _blur(x_X3HW: Tensor, sigma_X: Tensor) -> Tensor:
    """Blur each image with a Gaussian of its own width, as a share of the image's."""
    step_K = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x_X3HW.device)
    weight_XK = torch.exp(-0.5 * (step_K / (sigma_X[:, None] * x_X3HW.shape[-1]).clamp(min=1e-3)) ** 2)
    weight_YK = (weight_XK / weight_XK.sum(1, keepdim=True)).repeat_interleave(3, 0)
    planes_1YHW = F.pad(x_X3HW, (BLUR_RADIUS,) * 4, mode="replicate").flatten(0, 1)[None]
    planes_1YHW = F.conv2d(planes_1YHW, weight_YK[:, None, :, None], groups=len(weight_YK))
    planes_1YHW = F.conv2d(planes_1YHW, weight_YK[:, None, None, :], groups=len(weight_YK))
    return planes_1YHW.view(x_X3HW.shape)


@lru_cache(maxsize=4)
def _noise(height: int, width: int, device: torch.device) -> Tensor:
    shape = (3, height + NOISE_MARGIN, width + NOISE_MARGIN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
