"""Crops by known answers, colours by known answers, and the same crop in training, evaluation and the checkpoint."""

from __future__ import annotations

import colorsys
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.inputs.augmentation import (
    AugmentationConfig,
    Changes,
    centre,
    change,
    draw_changes,
    move_points,
)
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.interface import Observation
from cogvla.policy.training.batches import BatchBuilder
from cogvla.tests.support import small_data as small

PAPER = AugmentationConfig(0.9, 0.2, (0.8, 1.2), (0.8, 1.2), 0.05)
SIDE = 0.9**0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(size: int) -> Tensor:
    """One picture [1,1,3,H,W] whose red is the column and whose green is the row."""
    line = torch.arange(size, dtype=torch.uint8)
    columns, rows = repeat(line, "w -> h w", h=size), repeat(line, "h -> h w", w=size)
    return rearrange([columns, rows, torch.zeros_like(rows)], "c h w -> 1 1 c h w")


def test_the_centre_crop_of_nine_tenths_of_the_area_has_sides_of_its_root() -> None:
    cropped = change(ramp(201), 0.9, centre(0.9, 1, 1))[0, 0]
    expected = torch.linspace(100 - 100 * SIDE, 100 + 100 * SIDE, 201)
    assert cropped.shape == (3, 201, 201)
    assert (cropped[0, 7].float() - expected).abs().max() <= 0.501
    assert (cropped[1, :, 7].float() - expected).abs().max() <= 0.501


def test_a_crop_at_a_corner_reads_from_that_corner() -> None:
    corner = torch.tensor([[[1 - SIDE, 0.0]]])  # right, up
    cropped = change(ramp(201), 0.9, Changes(corner))[0, 0]
    assert (cropped[0, 0].float() - torch.linspace(200 - 200 * SIDE, 200, 201)).abs().max() <= 0.501
    assert (cropped[1, :, 0].float() - torch.linspace(0, 200 * SIDE, 201)).abs().max() <= 0.501


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.3, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0.35, 0.65), st.floats(0.35, 0.65),
    st.sampled_from([(40, 40), (30, 50)]),
)  # fmt: skip
def test_points_move_with_what_they_point_at(
    area: float, right: float, down: float, u: float, v: float, size: tuple[int, int]
) -> None:
    """The centre of mass of a blob is where `move_points` says."""
    height, width = size
    y_H1, x_1W = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    blob = 255 * torch.exp(-((x_1W - u * width) ** 2 + (y_H1 - v * height) ** 2) / 4)
    pixels = repeat(blob.round().to(torch.uint8), "h w -> 1 1 3 h w")
    free = 1 - area**0.5
    changes = Changes(torch.tensor([[[right * free, down * free]]]))
    expected = move_points(torch.tensor([[[[u, v], [u, v]]]]), area, changes, size)[0, 0, 0]
    if expected.min() < 0.2 or expected.max() > 0.8:
        return  # the blob is cut
    seen = change(pixels, area, changes)[0, 0, 0].float()
    found = torch.stack(((seen * x_1W).sum() / width, (seen * y_H1).sum() / height)) / seen.sum()
    assert torch.allclose(found, expected, atol=0.15 / min(size))


def pictures(*colours: tuple[float, float, float]) -> Tensor:
    """One sample per colour, [B,1,3,2,2]."""
    values = (torch.tensor(colours) * 255).round().to(torch.uint8)
    return repeat(values, "b c -> b 1 c h w", h=2, w=2)


def jittered(
    pixels: Tensor, hue: float = 0, saturation: float = 1, contrast: float = 1, brightness: float = 0
) -> Tensor:
    change_4 = torch.tensor([float(x) for x in (hue, saturation, contrast, brightness)])
    return change(pixels, 1.0, Changes(None, repeat(change_4, "f -> b v f", b=len(pixels), v=pixels.shape[1])))


COLOURS = [(1.0, 0.0, 0.0), (0.2, 0.6, 0.4), (0.1, 0.1, 0.9), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (0.9, 0.8, 0.1)]


@pytest.mark.parametrize(("hue", "saturation"), [(0.05, 1.0), (-0.05, 0.8), (0.3, 1.2)])
def test_hue_and_saturation_are_those_of_the_standard_library(hue: float, saturation: float) -> None:
    for colour, seen in zip(COLOURS, jittered(pictures(*COLOURS), hue, saturation), strict=True):
        exact = [round(c * 255) / 255 for c in colour]
        h, s, v = colorsys.rgb_to_hsv(*exact)
        expected = colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v)
        assert seen[0, :, 0, 0].tolist() == pytest.approx([255 * c for c in expected], abs=0.51)


def test_brightness_adds_and_contrast_scales_around_the_mean_of_a_channel() -> None:
    pixels = torch.tensor([100, 200], dtype=torch.uint8).expand(1, 1, 3, 2, 2)
    assert jittered(pixels, brightness=0.2)[0, 0, 0, 0].tolist() == [151, 251]
    assert jittered(pixels, brightness=0.25)[0, 0, 0, 0].tolist() == [164, 255], "values stay in their range"
    assert jittered(pixels, contrast=0.8)[0, 0, 0, 0].tolist() == [110, 190]
    assert jittered(pixels, contrast=1.2)[0, 0, 0, 0].tolist() == [90, 210]


def test_colours_that_are_not_changed_stay_bit_for_bit() -> None:
    pixels = torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8, generator=seeded())
    assert torch.equal(jittered(pixels), pixels)
    assert change(pixels, 1.0, Changes()) is pixels


def test_draws_stay_in_their_ranges_and_fill_them() -> None:
    changes = draw_changes(PAPER, 500, 2, seeded())
    assert changes.corner_BV2 is not None
    assert changes.jitter_BV4 is not None
    low, high = changes.jitter_BV4.amin((0, 1)), changes.jitter_BV4.amax((0, 1))
    expected_low, expected_high = torch.tensor([-0.05, 0.8, 0.8, -0.2]), torch.tensor([0.05, 1.2, 1.2, 0.2])
    assert (low >= expected_low).all()
    assert (high <= expected_high).all()
    torch.testing.assert_close(low, expected_low, atol=0.01, rtol=0)
    torch.testing.assert_close(high, expected_high, atol=0.01, rtol=0)
    assert changes.corner_BV2.min() >= 0
    assert 0.95 * (1 - SIDE) < changes.corner_BV2.max() <= 1 - SIDE
    assert not torch.equal(changes.corner_BV2[:, 0], changes.corner_BV2[:, 1]), "each view has its own"


def test_nothing_is_drawn_when_nothing_changes() -> None:
    generator = seeded()
    assert draw_changes(AugmentationConfig(), 5, 2, generator) == Changes()
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=seeded()))


def builder(config: AugmentationConfig) -> BatchBuilder:
    data = small.small_data()
    words = small.small_preprocessor(data).tokenizer
    preprocessor = Preprocessor(small.ROBOT, words, data.statistics(), config.crop_area)
    return BatchBuilder(data, preprocessor, replace(small.LABELLED, counterfactual=0.0), config)


def samples() -> dict:
    return TrainingBatches(small.small_data(), 6, seed=0).gather(torch.tensor([0, 8, 20, 33, 41, 50]))


def test_evaluation_batches_and_inference_see_the_same_crop() -> None:
    build, rows = builder(PAPER), samples()
    images = rearrange(rows["pixels"], "b v c h w -> v b h w c").numpy()
    observation = Observation(
        images=dict(zip(small.ROBOT.camera_names, map(np.ascontiguousarray, images), strict=True)),
        state=rows["state"].numpy(),
        instruction=[small.INSTRUCTIONS[i] for i in rows["instruction_id"]],
    )
    evaluated, seen = build.evaluation(rows).inputs, build.preprocessor.observation(observation)
    for field in fields(seen):
        given, expected = getattr(evaluated, field.name), getattr(seen, field.name)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(given, expected), field.name
        elif field.name != "draw":  # what is random in training
            assert given == expected, field.name
    assert not torch.equal(seen.pixels, rows["pixels"])
    assert torch.equal(builder(AugmentationConfig()).evaluation(rows).inputs.pixels, rows["pixels"])
    assert torch.equal(builder(AugmentationConfig()).training(rows, seeded()).inputs.pixels, rows["pixels"])


def test_a_step_is_augmented_by_its_seed_and_in_parts_as_in_one_piece() -> None:
    build, rows = builder(PAPER), samples()
    whole = build.training(rows, seeded(3))
    assert torch.equal(whole.inputs.pixels, build.training(rows, seeded(3)).inputs.pixels)
    assert not torch.equal(whole.inputs.pixels, build.training(rows, seeded(4)).inputs.pixels)
    choices, part = build.choose(rows, seeded(3)), torch.tensor([1, 4])
    some = {k: v[part] for k, v in rows.items() if k != "labels"}
    some["labels"] = {k: v[part] for k, v in rows["labels"].items()}
    assert torch.equal(build.build(some, choices.part(part)).inputs.pixels, whole.inputs.pixels[part])


def test_what_attention_is_taught_to_look_at_moves_with_the_crop() -> None:
    only_crop = AugmentationConfig(0.5)
    plain, cropped = (builder(config).training(samples(), seeded()) for config in (AugmentationConfig(), only_crop))
    assert plain.image_points_BV22 is not None
    assert cropped.image_points_BV22 is not None
    assert cropped.point_weight_BV2 is not None
    corner = draw_changes_after_the_rest(only_crop)
    expected = move_points(plain.image_points_BV22, 0.5, Changes(corner), (small.SIZE, small.SIZE))
    torch.testing.assert_close(cropped.image_points_BV22, expected)
    outside = ((expected < 0) | (expected >= 1)).any(-1)
    assert outside.any(), "half of the picture is gone"
    assert torch.equal(cropped.point_weight_BV2 == 0, outside)


def draw_changes_after_the_rest(config: AugmentationConfig) -> Tensor:
    corner = builder(config).choose(samples(), seeded()).corner_BV2
    assert corner is not None
    return corner


def test_the_crop_is_in_the_checkpoint_and_nowhere_else(tmp_path: Path) -> None:
    config = small.settings(steps=2, augmentation=PAPER)
    trained = small.small_trainer(tmp_path, config).run()
    policy = load_policy(tmp_path / "policy")
    observation = small.ROBOT.fake_observation(2)
    assert policy.preprocessor.crop_area == 0.9
    assert np.array_equal(policy.act(observation).actions, trained.act(observation).actions)

    path = tmp_path / "policy" / "config.json"
    body = json.loads(path.read_text())
    del body["pictures"]  # as checkpoints were before there was augmentation
    path.write_text(json.dumps(body))
    whole = load_policy(tmp_path / "policy")
    assert whole.preprocessor.crop_area == 1
    assert not np.array_equal(whole.act(observation).actions, policy.act(observation).actions)
    images = [torch.from_numpy(observation.images[name]) for name in small.ROBOT.camera_names]
    assert torch.equal(whole.preprocessor.pixels(images)[:, 0], rearrange(images[0], "b h w c -> b c h w"))


def test_training_and_preprocessor_must_crop_alike() -> None:
    with pytest.raises(ValueError, match=r"training crops 0\.9 of the area, the preprocessor 1\.0"):
        BatchBuilder(small.small_data(), small.small_preprocessor(), small.LABELLED, PAPER)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"crop_area": 0.0}, r"crop_area must be in \(0,1\], got 0\.0"),
        ({"crop_area": 1.1}, "crop_area must be in"),
        ({"contrast": (1.2, 0.8)}, r"augmentation\.contrast must be \[low, high\]"),
        ({"hue": 0.6}, r"hue in \[0,0\.5\]"),
        ({"brightness": -0.1}, r"brightness must be in \[0,1\]"),
    ],
)
def test_bad_settings_are_explained(bad: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AugmentationConfig(**bad)
