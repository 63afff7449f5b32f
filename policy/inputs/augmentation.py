"""Image augmentation in training (light, random crop, colour jitter), and the matching centre crop at test time.

As in OpenVLA and CogVLA, a random crop of `crop_area` of each view is resized to the view's size, then the colours are
changed. At test time, a crop of the same area is taken from the centre. All images of a batch are processed together on
their device. `policy.training.batches` draws the random numbers for a whole step beforehand.

Corner pixels of a crop become corner pixels of the result, as in TensorFlow's `crop_and_resize`, which the published
policies use.

Shape legend: B batch, V views, X = B*V, H, W image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvla.configs.build import check_kind
from cogvla.policy.inputs.light import LightConfig, relight

HUE, SATURATION, CONTRAST, BRIGHTNESS = range(4)


@dataclass(frozen=True)
class AugmentationConfig:
    """Image augmentation in training. The defaults change nothing.

    Attributes:
        crop_area: area of the crop as a share of the image; 1: no crop.
            The crop is random in training and centred at test time.
        brightness: maximum brightness to add or subtract, for pixel values in [0,1].
        contrast: range of the factor on the distance to each channel's mean; (1, 1): off.
        saturation: range of the factor on the saturation (HSV); (1, 1): off.
        hue: maximum rotation of the hue, as a share of a full turn.
        light: changes of light and sensor.
    """

    crop_area: float = 1.0
    brightness: float = 0.0
    contrast: tuple[float, float] = (1.0, 1.0)
    saturation: tuple[float, float] = (1.0, 1.0)
    hue: float = 0.0
    light: LightConfig = field(default_factory=LightConfig)

    def __post_init__(self) -> None:
        check_crop_area(self.crop_area)
        for name in ("contrast", "saturation"):
            check_kind(tuple[float, float], getattr(self, name), f"augmentation.{name}")
            low, high = getattr(self, name)
            object.__setattr__(self, name, (low, high))
            if not 0 <= low <= high:
                raise ValueError(f"augmentation.{name} must be [low, high] with 0 <= low <= high, got [{low}, {high}]")
        if not 0 <= self.brightness <= 1 or not 0 <= self.hue <= 0.5:
            raise ValueError("augmentation: brightness must be in [0,1] and hue in [0,0.5]")

    @property
    def jitters(self) -> bool:
        """True if colours are changed."""
        return (self.brightness, self.contrast, self.saturation, self.hue) != (0, (1, 1), (1, 1), 0)

    @property
    def crops(self) -> bool:
        return self.crop_area < 1


@dataclass(frozen=True)
class Changes:
    """The drawn augmentation of each image of a batch.

    Attributes:
        corner_BV2: upper left corner (right, down) of the crop, in [0,1] from the first to the last pixel; None: no
            crop.
        jitter_BV4: hue rotation, saturation factor, contrast factor, added brightness; None: no change of colours.
        light_BV9: see `policy.inputs.light`; None: no change of light and sensor.
    """

    corner_BV2: Tensor | None = None
    jitter_BV4: Tensor | None = None
    light_BV9: Tensor | None = None

    @property
    def nothing(self) -> bool:
        """True if no image changes."""
        return self.corner_BV2 is None and self.jitter_BV4 is None and self.light_BV9 is None


def check_crop_area(area: float) -> None:
    """Raise ValueError unless `area` is in (0,1]."""
    if not 0 < area <= 1:
        raise ValueError(f"crop_area must be in (0,1], got {area}; 1 is no crop, OpenVLA and CogVLA use 0.9")


def draw_changes(config: AugmentationConfig, samples: int, views: int, generator: torch.Generator) -> Changes:
    """Draw the changes of B samples with V views each; they depend only on the generator."""
    corner_BV2 = jitter_BV4 = light_BV9 = None
    if config.crops:
        corner_BV2 = torch.rand(samples, views, 2, generator=generator) * (1 - math.sqrt(config.crop_area))
    if config.jitters:
        low, high = zip(
            (-config.hue, config.hue),
            config.saturation,
            config.contrast,
            (-config.brightness, config.brightness),
            strict=True,
        )  # in the order of HUE, SATURATION, CONTRAST, BRIGHTNESS
        low_4, high_4 = torch.tensor(low), torch.tensor(high)
        jitter_BV4 = low_4 + (high_4 - low_4) * torch.rand(samples, views, 4, generator=generator)
    if config.light != LightConfig():
        light_BV9 = config.light.draw(samples, views, generator)
    return Changes(corner_BV2, jitter_BV4, light_BV9)


def centre(area: float, samples: int, views: int) -> Changes:
    """Return the changes for a centre crop of `area` in every view."""
    return Changes(torch.full((samples, views, 2), (1 - math.sqrt(area)) / 2)) if area < 1 else Changes()


def change(pixels_BVCHW: Tensor, area: float, changes: Changes) -> Tensor:
    """Change the light of uint8 images [B,V,3,H,W], crop them to `area`, resize them back, and change their colours.

    The result is uint8, too.
    """
    if changes.nothing:
        return pixels_BVCHW
    device = pixels_BVCHW.device
    pixels_XCHW = rearrange(pixels_BVCHW, "b v c h w -> (b v) c h w")
    if changes.light_BV9 is None:
        x_XCHW = pixels_XCHW.float() / 255
    else:
        x_XCHW = relight(pixels_XCHW, changes.light_BV9.flatten(0, 1))
    if changes.corner_BV2 is not None:
        x_XCHW = _crop(x_XCHW, rearrange(changes.corner_BV2, "b v two -> (b v) two").to(device), math.sqrt(area))
    if changes.jitter_BV4 is not None:
        x_XCHW = _jitter(x_XCHW, rearrange(changes.jitter_BV4, "b v four -> (b v) four").to(device))
    bytes_XCHW = (x_XCHW * 255).round_().clamp_(0, 255).to(torch.uint8)
    return rearrange(bytes_XCHW, "(b v) c h w -> b v c h w", v=pixels_BVCHW.shape[1])


def move_points(points_BV22: Tensor, area: float, changes: Changes, image_size: tuple[int, int]) -> Tensor:
    """Return the positions of image points [B,V,2,2] after the crop: (right, down), in [0,1] from edge to edge."""
    if changes.corner_BV2 is None:
        return points_BV22
    height, width = image_size
    size_2 = torch.tensor([width, height], dtype=points_BV22.dtype)
    pixel_BV22 = points_BV22 * size_2 - 0.5  # the centre of pixel i is at i
    moved_BV22 = (pixel_BV22 - changes.corner_BV2[:, :, None] * (size_2 - 1)) / math.sqrt(area)
    return (moved_BV22 + 0.5) / size_2


def _crop(x_XCHW: Tensor, corner_X2: Tensor, side: float) -> Tensor:
    """Crop windows of `side` times the height and width, and resize them back bilinearly."""
    height, width = x_XCHW.shape[-2:]
    along_H, along_W = (torch.linspace(0, side, count, device=x_XCHW.device) for count in (height, width))
    column_XHW = (corner_X2[:, :1] + along_W)[:, None].expand(-1, height, -1)
    row_XHW = (corner_X2[:, 1:] + along_H)[:, :, None].expand(-1, -1, width)
    grid_XHW2 = torch.stack((column_XHW, row_XHW), dim=-1) * 2 - 1
    return F.grid_sample(x_XCHW, grid_XHW2, mode="bilinear", padding_mode="border", align_corners=True)


def _jitter(x_XCHW: Tensor, jitter_X4: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order; values are clamped to [0,1] after each."""
    by_X411 = rearrange(jitter_X4, "x four -> four x 1 1")
    x_XCHW = (x_XCHW + by_X411[BRIGHTNESS][:, None]).clamp(0, 1)
    mean_XC11 = x_XCHW.mean(dim=(-2, -1), keepdim=True)
    x_XCHW = torch.lerp(mean_XC11, x_XCHW, by_X411[CONTRAST][:, None]).clamp(0, 1)
    hue_XHW, saturation_XHW, value_XHW = _hsv(x_XCHW)
    saturation_XHW = (saturation_XHW * by_X411[SATURATION]).clamp(0, 1)
    return _rgb(hue_XHW + by_X411[HUE], saturation_XHW, value_XHW)


def _hsv(x_XCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert RGB in [0,1] to hue (a full turn is 1), saturation and value, each [X,H,W]."""
    red, green, blue = x_XCHW.unbind(1)
    value, least = x_XCHW.amax(1), x_XCHW.amin(1)
    chroma = value - least
    safe = chroma.clamp(min=1e-12)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    return sixth / 6, chroma / value.clamp(min=1e-12), value


def _rgb(hue_XHW: Tensor, saturation_XHW: Tensor, value_XHW: Tensor) -> Tensor:
    """Convert HSV back to RGB [X,3,H,W]; the hue may be outside [0,1]."""
    start_3 = torch.tensor([5.0, 3.0, 1.0], device=hue_XHW.device)  # where red, green and blue begin to fall
    k_X3HW = (start_3[:, None, None] + 6 * hue_XHW[:, None]) % 6
    fall_X3HW = torch.minimum(k_X3HW, 4 - k_X3HW).clamp(0, 1)
    return value_XHW[:, None] * (1 - saturation_XHW[:, None] * fall_X3HW)
