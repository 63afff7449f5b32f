"""Light and sensor of training images: each change by a known answer, drawn for each camera of each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.inputs.augmentation import AugmentationConfig, change, draw_changes
from cogvla.policy.inputs.light import BLUR, BLURRED, GAINS, GREY, HAZE_LEVEL, PLACE, LightConfig, relight


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def light(**changes: Any) -> Tensor:
    """The light that changes nothing [1,9], with other values in some columns."""
    columns = {"red": 0, "green": 1, "blue": 2, "gamma": 3, "haze": 4, "colour": 5, "noise": 6, "blur": 7, "place": 8}
    values = torch.tensor([[1.0, 1, 1, 1, 0, 1, 0, 0, 0]])
    for name, value in changes.items():
        values[0, columns[name]] = value
    return values


def pixels(*colours: tuple[int, int, int], size: int = 8) -> Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, size, size)


RANDOM = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=seeded())


def test_light_that_changes_nothing() -> None:
    assert torch.allclose(relight(RANDOM, light().expand(2, -1)), RANDOM / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"red": 0.5, "green": 0.5, "blue": 0.5}, (50, 25, 100)),
        ({"red": 1.15, "blue": 0.8}, (115, 50, 160)),
        ({"red": 3.0}, (255, 50, 200)),
        ({"gamma": 2.0}, tuple(255 * (c / 255) ** 2 for c in (100, 50, 200))),
        ({"gamma": 0.5, "green": 2.0}, tuple(255 * (c / 255) ** 0.5 for c in (100, 100, 200))),
        ({"haze": 0.4}, tuple(0.6 * c + 0.4 * 255 * HAZE_LEVEL for c in (100, 50, 200))),
        ({"colour": 0.0}, (sum(w * c for w, c in zip(GREY, (100, 50, 200), strict=True)),) * 3),
        ({"colour": 0.5}, tuple(0.5 * c + 0.5 * 82.05 for c in (100, 50, 200))),
    ],
)
def test_one_colour_becomes(changes: dict[str, float], expected: tuple[float, ...]) -> None:
    seen = relight(pixels((100, 50, 200)), light(**changes))[0, :, 0, 0] * 255
    assert seen.tolist() == pytest.approx(expected, abs=0.01)


def test_noise_has_its_strength_and_another_place_each_time() -> None:
    grey = pixels((128, 128, 128), (128, 128, 128), size=64)
    lights = torch.cat([light(noise=0.1, place=0.2), light(noise=0.1, place=0.7)])
    noise = relight(grey, lights) - 128 / 255
    assert noise.std((1, 2, 3)).tolist() == pytest.approx([0.1, 0.1], rel=0.05)
    assert noise.mean().abs() < 0.01
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1].item()) < 0.05
    assert torch.equal(relight(grey, lights), relight(grey, lights))


def test_blur_smooths_and_keeps_the_mean() -> None:
    lights = torch.cat([light(blur=0.03), light()])
    seen = relight(RANDOM, lights)
    assert seen[0].std() < 0.3 * seen[1].std()
    assert seen[0].mean() == pytest.approx((RANDOM[0] / 255).mean().item(), abs=0.01)
    assert torch.allclose(seen[1], RANDOM[1] / 255, atol=1e-6)
    line = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    line[..., 4] = 255
    profile = relight(line, light(blur=1 / 9))[0, 0, 4]
    weights = torch.exp(-0.5 * torch.arange(-3.0, 4.0) ** 2)
    assert torch.allclose(profile[1:8], weights / weights.sum(), atol=1e-5)


def test_draws_are_in_their_ranges_and_differ() -> None:
    config = build(AugmentationConfig, load("augmentation", "light"), "augmentation").light
    drawn = config.draw(500, 2, seeded())
    assert torch.equal(drawn, config.draw(500, 2, seeded()))
    assert len(drawn.flatten(0, 1).unique(dim=0)) == 1000
    gain = drawn[..., GAINS].mean(-1)
    assert config.exposure[0] <= gain.min() < 0.7
    assert 1.3 < gain.max() <= config.exposure[1] + 1e-5
    balance = drawn[..., GAINS] / gain[..., None]
    assert 1.15 < balance.max() < (1 + config.white_balance) ** 2
    assert (drawn[..., BLUR] > 0).float().mean().item() == pytest.approx(BLURRED, abs=0.05)
    assert drawn[..., BLUR].max() <= config.blur
    assert drawn[..., PLACE].min() >= 0
    assert drawn[..., PLACE].max() < 1
    off = LightConfig().draw(3, 2, seeded())
    assert torch.allclose(off[..., :PLACE], light()[0, :PLACE].expand(3, 2, -1))


def test_it_is_part_of_the_augmentation() -> None:
    config = AugmentationConfig(light=LightConfig(exposure=(0.5, 0.5)))
    views = RANDOM[None]
    changed = change(views, 1.0, draw_changes(config, 1, 2, seeded()))
    assert changed.dtype == torch.uint8
    assert torch.equal(changed, (views / 255 * 0.5 * 255).round().to(torch.uint8))
    assert draw_changes(AugmentationConfig(), 1, 2, seeded()).nothing


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"exposure": (0.0, 1.0)}, r"light.exposure must be \[low, high\] with 0.01 <= low <= high, got \[0.0, 1.0\]"),
        ({"gamma": (2.0, 1.0)}, r"light.gamma must be \[low, high\]"),
        ({"colour": (-1.0, 1.0)}, r"light.colour must be \[low, high\] with 0 <= low"),
        ({"blur": 0.5}, r"light.blur must be in \[0,0.1\], got 0.5"),
        ({"noise": -0.1}, r"light.noise must be in \[0,1\]"),
        ({"white_balance": 1.5}, r"light.white_balance must be in \[0,1\]"),
    ],
)
def test_bad_settings_are_explained(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LightConfig(**wrong)
