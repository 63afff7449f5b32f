"""Resize images to the policy's size, on their device.

There are two kernels. Both become wider when an image shrinks, so that pixels are averaged (antialiasing):

    bilinear   a triangle; used for our training
    lanczos3   a windowed sinc over three pixels to each side, as in TensorFlow's `image.resize`; used by the published
               OpenVLA, OpenVLA-OFT and CogVLA policies

Shape legend: B batch, H, W of the input, h, w of the output.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("bilinear", "lanczos3")
_LOBES = 3


def check_kernel(kernel: str) -> None:
    """Raise ValueError for an unknown kernel."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown resize kernel {kernel!r}; one of {', '.join(KERNELS)}")


def resize(view_BCHW: Tensor, size: tuple[int, int], kernel: str = "bilinear") -> Tensor:
    """Resize uint8 images to (height, width) = `size`; images of that size are returned unchanged."""
    if view_BCHW.shape[-2:] == size:
        return view_BCHW
    if kernel == "bilinear":
        resized_BChw = F.interpolate(view_BCHW.float(), size, mode="bilinear", antialias=True)
    else:
        (height, width), device = view_BCHW.shape[-2:], view_BCHW.device
        rows_hH, columns_wW = lanczos3(height, size[0], device), lanczos3(width, size[1], device)
        resized_BChw = rows_hH @ view_BCHW.float() @ columns_wW.mT
    return resized_BChw.round_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def lanczos3(inputs: int, outputs: int, device: torch.device) -> Tensor:
    """Return the weights [outputs,inputs] of the Lanczos kernel; each row sums to 1."""
    stretch = max(inputs / outputs, 1.0)
    centre_o = (torch.arange(outputs, dtype=torch.float64) + 0.5) * inputs / outputs
    pixel_i = torch.arange(inputs, dtype=torch.float64) + 0.5
    distance_oi = (pixel_i - centre_o[:, None]) / stretch
    weight_oi = torch.sinc(distance_oi) * torch.sinc(distance_oi / _LOBES)
    weight_oi[distance_oi.abs() >= _LOBES] = 0.0
    weight_oi /= weight_oi.sum(1, keepdim=True)
    return weight_oi.float().to(device)
