"""The estimate of how far a camera is turned."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cogvla.policy.foresight.turn import LARGEST_ANGLE, LARGEST_SHIFT, SEEN, SIDE, TurnEstimator, _moved

SIZE = 64


def pictures(count: int, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> torch.Tensor:
    """Draw pictures [X,3,H,W]: a fixed bright cross, as a camera sees the fingers, before things that differ."""
    generator = torch.Generator().manual_seed(seed)
    things = F.interpolate(torch.rand(count, 3, 5, 5, generator=generator) * 100, size, mode="bilinear")
    height, width = size
    things[:, :, height // 2 - 2 : height // 2 + 3] = 250
    things[:, 0, :, width // 2 - 2 : width // 2 + 3] = 250
    return things.to(torch.uint8)


def views(count: int, seed: int) -> torch.Tensor:
    """Draw pictures [X,2,3,H,W] of two cameras, of which the second looks elsewhere."""
    return torch.stack((pictures(count, seed), pictures(count, seed + 1_000_000).roll((9, -7), dims=(2, 3))), dim=1)


@pytest.mark.parametrize("size", [(SIDE * 2, SIDE * 2), (SIDE, SIDE * 3)])
def test_a_moved_picture_shows_what_lies_there(size: tuple[int, int]) -> None:
    height, width = (round(side / SEEN) for side in size)
    x = pictures(1, 0, (height, width)).float() / 255
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    still, shifted = _moved(x, torch.zeros(1, 3)), _moved(x, torch.tensor([[0.5, 1.0, 0.0]]))
    across, down = round(LARGEST_SHIFT * width / 2), round(LARGEST_SHIFT * height)
    for found, y, x0 in ((still, top, left), (shifted, top + down, left + across)):
        there = F.interpolate(x[..., y : y + size[0], x0 : x0 + size[1]], (SIDE, SIDE), mode="bilinear")
        assert (found - there).abs().mean() < 0.02
    turned = _moved(x, torch.tensor([[0.0, 0.0, 1.0]]))
    angle = math.radians(LARGEST_ANGLE)
    for ray in torch.linspace(-0.3, 0.3, 9).tolist():  # along the arm of the cross that lies across, as it was
        row, column = -ray * math.sin(angle) * width / height, ray * math.cos(angle)
        assert turned[0, 2, round(SIDE / 2 - 0.5 + row * SIDE), round(SIDE / 2 - 0.5 + column * SIDE)] > 0.9


def test_it_learns_from_pictures_alone() -> None:
    torch.manual_seed(0)
    model = TurnEstimator(views=2, channels=8)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(200):
        loss = model.loss(views(16, step), step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    unseen = views(32, 99_999)
    assert torch.equal(model.loss(unseen, 7), model.loss(unseen, 7)), "what is drawn depends on the seed alone"
    with torch.inference_mode():
        still = model(unseen)
        moved = model(unseen.roll((-3, -2), dims=(3, 4)))  # as if the cameras looked lower and to the right
    none_Vt, found_Vt, noise_Vt = still.mean(0)[:, :2], moved.mean(0)[:, :2], still.std(0)[:, :2]
    assert ((found_Vt - none_Vt) / noise_Vt > 3).all()
