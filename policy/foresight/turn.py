"""Estimate from a single picture how far its camera is turned, learned from pictures that were moved on purpose.

A small turn of a camera moves its picture and turns it in its plane, whatever it shows. So a network that was trained
to tell by how much recorded pictures were moved tells it of a camera, too: from the table that a fixed camera always
shows, or from the fingers that a wrist camera always shows. It needs no labels, no calibration of the camera and no
earlier picture, so that a camera that was turned before the episode is noticed as well.

Shape legend: as in docs/architecture.md, with X pictures, t the three numbers of a turn.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUMBERS = 3
"""Shift to the right and down, and the angle in the plane; each in parts of the largest one that is trained."""
LARGEST_SHIFT = 3 / 32
"""Largest shift, as a share of the picture's side."""
LARGEST_ANGLE = 10.0
"""Largest angle in degrees."""
SEEN = 13 / 16
"""Share of each side that the network sees, around the centre: a moved picture shows all of it."""
SIDE = 52
"""Height and width of what the network sees."""
BRIGHTNESS, CONTRAST, NOISE = 0.1, 0.2, 0.01


class TurnEstimator(nn.Module):
    """A small convolutional network with an output for each camera.

    Args:
        views: number V of cameras.
        channels: channels of its first layer.
    """

    def __init__(self, views: int, channels: int = 16) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels, 4 * channels)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        cells = math.ceil(SIDE / 2 ** len(self.layers)) ** 2
        self.leave = nn.ModuleList(nn.Linear(widths[-1] * cells, 2 * NUMBERS) for _ in range(views))

    def forward(self, pixels_BVCHW: Tensor) -> Tensor:
        """Return the turns [B,V,t] of pictures uint8 [B,V,3,H,W], each divided by the error that is to be expected."""
        x_XCHW = _small(pixels_BVCHW)
        grid_XHW2 = _still(_ratio(x_XCHW), x_XCHW.device).expand(len(x_XCHW), -1, -1, -1)
        found_BVt, width_BVt = self._read(_sampled(x_XCHW, grid_XHW2), len(pixels_BVCHW))
        return found_BVt * (-width_BVt).exp()

    def loss(self, pixels_BVCHW: Tensor, seed: int) -> Tensor:
        """Return how badly it tells by how much it moves pictures uint8 [B,V,3,H,W]; what is drawn depends on the seed.

        The negative logarithm of a Laplace distribution, whose width is estimated, too.
        """
        generator = torch.Generator().manual_seed(seed)
        x_XCHW = _small(pixels_BVCHW)
        turn_Xt = torch.rand(len(x_XCHW), NUMBERS, generator=generator) * 2 - 1
        moved_XCHW = _changed(_moved(x_XCHW, turn_Xt), generator)
        found_BVt, width_BVt = self._read(moved_XCHW, len(pixels_BVCHW))
        distance_BVt = (found_BVt - turn_Xt.unflatten(0, found_BVt.shape[:2])).abs()
        return (distance_BVt * (-width_BVt).exp() + width_BVt).mean()

    def _read(self, x_XCHW: Tensor, batch: int) -> tuple[Tensor, ...]:
        """Return turns and logarithms of their errors, [B,V,t] each."""
        x = x_XCHW - 0.5
        for layer in self.layers:
            x = F.gelu(layer(x))
        x_BVF = x.flatten(1).unflatten(0, (batch, -1))
        return torch.stack([leave(x_BVF[:, view]) for view, leave in enumerate(self.leave)], dim=1).chunk(2, dim=-1)


def _small(pixels_BVCHW: Tensor) -> Tensor:
    """Return pictures [X,3,h,w], 0 to 1, of which the network's are no coarse samples: about twice as large."""
    factor = max(1, round(int(min(pixels_BVCHW.shape[-2:])) * SEEN / (2 * SIDE)))
    x_XCHW = pixels_BVCHW.flatten(0, 1).float() / 255
    return x_XCHW if factor == 1 else F.avg_pool2d(x_XCHW, factor)


def _moved(x_XCHW: Tensor, turn_Xt: Tensor) -> Tensor:
    """Return what the network sees of pictures [X,3,h,w] that are moved by `turn_Xt`."""
    return _sampled(x_XCHW, _grid(turn_Xt, _ratio(x_XCHW)))


def _sampled(x_XCHW: Tensor, grid_XHW2: Tensor) -> Tensor:
    return F.grid_sample(x_XCHW, grid_XHW2, padding_mode="border", align_corners=False)


def _ratio(x_XCHW: Tensor) -> float:
    """Return height by width, as a number also while the network is recorded."""
    return int(x_XCHW.shape[2]) / int(x_XCHW.shape[3])


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # it is kept, also for passes with gradients
def _still(ratio: float, device: torch.device) -> Tensor:
    """Return the grid [1,H,W,2] of pictures that are not moved."""
    return _grid(torch.zeros(1, NUMBERS, device=device), ratio)


def _grid(turn_Xt: Tensor, ratio: float) -> Tensor:
    """Return where the network looks in pictures of this height by width, [X,H,W,2]."""
    right_X, down_X, part_X = turn_Xt.unbind(1)
    angle_X, shift = torch.deg2rad(part_X * LARGEST_ANGLE), 2 * LARGEST_SHIFT  # a side is 2 long for `affine_grid`
    cosine_X, sine_X = SEEN * angle_X.cos(), SEEN * angle_X.sin()
    map_X6 = (cosine_X, -sine_X * ratio, shift * right_X, sine_X / ratio, cosine_X, shift * down_X)
    map_X23 = torch.stack(map_X6, dim=1).unflatten(1, (2, 3))
    return F.affine_grid(map_X23, [len(turn_Xt), 3, SIDE, SIDE], align_corners=False)


def _changed(x_XCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness and contrast, and add noise, so that the estimate does not depend on them."""

    def drawn(scale: float) -> Tensor:
        return (torch.rand(len(x_XCHW), 1, 1, 1, generator=generator) * 2 - 1) * scale

    return x_XCHW * (1 + drawn(CONTRAST)) + drawn(BRIGHTNESS) + torch.randn(x_XCHW.shape, generator=generator) * NOISE
