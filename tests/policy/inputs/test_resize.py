"""Resizing: averages, keeps flat areas, and agrees with Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cogvla.policy.inputs.resize import KERNELS, lanczos3, resize

CPU = torch.device("cpu")


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth areas, edges and noise, uint8 [1,3,H,W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = 100 + 80 * np.sin(x / 9)[..., None] * np.cos(y / 13)[..., None] + rng.normal(0, 12, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 120)
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)[None].contiguous()


def pillow(view: Tensor, size: tuple[int, int], kernel: str) -> np.ndarray:
    """Pillow's resize of each channel in float, which neither rounds nor clips between rows and columns."""
    filters = {"bilinear": Image.Resampling.BILINEAR, "lanczos3": Image.Resampling.LANCZOS}
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in view[0]]
    return np.stack([np.array(channel.resize((size[1], size[0]), filters[kernel])) for channel in channels])[None]


SIZES = [((256, 256), (224, 224)), ((480, 640), (224, 224)), ((64, 48), (96, 80))]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_the_same_as_pillow(kernel: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    view = picture(*before)
    expected = pillow(view, after, kernel).clip(0, 255)
    assert np.abs(resize(view, after, kernel).numpy() - expected).max() < 0.51, "rounded, and nothing else"


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_averages_when_it_shrinks(kernel: str) -> None:
    stripes = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    stripes[..., ::2] = 200
    small = resize(stripes, (4, 4), kernel)
    assert small.shape == (1, 3, 4, 4)
    assert (small[..., 1:-1].int() - 100).abs().max() <= 2
    assert resize(stripes, (16, 16), kernel) is stripes


def test_the_kernels_differ_at_an_edge() -> None:
    edge = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    edge[..., 8:] = 200
    soft, sharp = (resize(edge, (14, 14), kernel)[0, 0, 7].int() for kernel in KERNELS)
    assert sharp.max() > 200 >= soft.max(), "a sinc overshoots"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 255))
def test_flat_areas_stay_flat(inputs: int, outputs: int, value: int) -> None:
    weight = lanczos3(inputs, outputs, CPU)
    torch.testing.assert_close(weight.sum(1), torch.ones(outputs))
    flat = torch.full((1, 1, inputs, inputs), value, dtype=torch.uint8)
    assert (resize(flat, (outputs, outputs), "lanczos3") == value).all()
