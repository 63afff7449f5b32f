"""Training and inference see the same numbers, and observations that do not fit are explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from einops import rearrange

from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.inputs import preprocess
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.resize import resize
from cogvla.policy.interface import Camera, Observation
from cogvla.policy.training.batches import BatchBuilder
from cogvla.tests.support.small_data import IMITATION, INSTRUCTIONS, ROBOT, SIZE, small_data, small_preprocessor


def test_training_and_inference_give_the_same_model_input() -> None:
    data = small_data()
    preprocessor = small_preprocessor(data)
    samples = TrainingBatches(data, 5, seed=0).gather(torch.tensor([0, 8, 20, 33, 41]))
    trained = BatchBuilder(data, preprocessor, IMITATION).training(samples, torch.Generator()).inputs
    observation = Observation(
        images={
            name: np.ascontiguousarray(rearrange(samples["pixels"][:, view], "b c h w -> b h w c").numpy())
            for view, name in enumerate(ROBOT.camera_names)
        },
        state=samples["state"].numpy(),
        instruction=[INSTRUCTIONS[i] for i in samples["instruction_id"]],
    )
    seen = preprocessor.observation(observation)
    for field in fields(seen):
        given, expected = getattr(trained, field.name), getattr(seen, field.name)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(given, expected), field.name
        elif field.name != "draw":  # what is random in training
            assert given == expected, field.name


def test_views_are_resized_in_the_order_of_the_embodiment() -> None:
    preprocessor = small_preprocessor()
    observation = ROBOT.fake_observation(2)
    white, black = np.full((2, 64, 48, 3), 255, np.uint8), np.zeros((2, 20, 20, 3), np.uint8)
    inputs = preprocessor.observation(replace(observation, images={"wrist": black, "front": white, "other": black}))
    assert inputs.pixels.shape == (2, 2, 3, SIZE, SIZE)
    assert inputs.pixels.dtype == torch.uint8
    assert (inputs.pixels[:, 0] == 255).all()
    assert (inputs.pixels[:, 1] == 0).all()


def test_the_kernel_of_the_checkpoint_is_used() -> None:
    big = replace(ROBOT.fake_observation(1), images={n: _noise() for n in ROBOT.camera_names})
    statistics, tokenizer = small_data().statistics(), small_preprocessor().tokenizer
    sharp = Preprocessor(ROBOT, tokenizer, statistics, resize_kernel="lanczos3").observation(big).pixels
    soft = Preprocessor(ROBOT, tokenizer, statistics).observation(big).pixels
    assert torch.equal(sharp[0, 0], resize(torch.from_numpy(_noise()).movedim(-1, 1), (SIZE, SIZE), "lanczos3")[0])
    assert not torch.equal(sharp, soft)
    with pytest.raises(ValueError, match="unknown resize kernel 'nearest'; one of bilinear, lanczos3"):
        Preprocessor(ROBOT, tokenizer, statistics, resize_kernel="nearest")


def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, 64, 48, 3), dtype=np.uint8)


def test_a_flipped_or_read_only_picture_is_taken() -> None:
    preprocessor = small_preprocessor()
    observation = ROBOT.fake_observation(1)
    flipped = {name: image[:, ::-1, ::-1] for name, image in observation.images.items()}
    state = observation.state.copy()
    state.setflags(write=False)
    inputs = preprocessor.observation(replace(observation, images=flipped, state=state))
    straight = preprocessor.observation(observation)
    assert torch.equal(inputs.pixels.flip(-1, -2), straight.pixels)


def test_each_instruction_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessor = small_preprocessor()
    encoded: list[str] = []
    encode = preprocessor.tokenizer.encode

    def watched(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.extend(texts)
        return encode(texts)

    monkeypatch.setattr(preprocessor.tokenizer, "encode", watched)
    for _ in range(3):
        ids_BT, mask_BT = preprocessor.text([INSTRUCTIONS[0], "touch", INSTRUCTIONS[0]])
    assert sorted(encoded) == sorted([INSTRUCTIONS[0], "touch"])
    assert mask_BT.sum(1).tolist() == [4, 1, 4]
    assert torch.equal(ids_BT[1, 1:], torch.zeros(3, dtype=torch.long))


def test_a_full_text_cache_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "INSTRUCTION_CACHE", 2)
    preprocessor = small_preprocessor()
    preprocessor.text(["touch", "red"])
    _, mask_BT = preprocessor.text(["red", "the green square"])  # `red` is known, but there is no room for the other
    assert mask_BT.sum(1).tolist() == [1, 3]
    _, mask_BT = preprocessor.text(["touch", "red", "green", "blue one"])  # more than there is ever room for
    assert mask_BT.sum(1).tolist() == [1, 1, 1, 2]


def test_cached_text_follows_the_policy_to_another_device() -> None:
    preprocessor = small_preprocessor()
    preprocessor.text(INSTRUCTIONS)
    ids_BT, mask_BT = preprocessor.to("meta").text(INSTRUCTIONS)
    assert (ids_BT.device.type, mask_BT.device.type) == ("meta", "meta")


def test_views_of_different_sizes_are_refused() -> None:
    robot = replace(ROBOT, cameras=(Camera("front", 32, 32), Camera("wrist", 16, 16)))
    preprocessor = small_preprocessor()
    with pytest.raises(ValueError, match="must have the same image size"):
        Preprocessor(robot, preprocessor.tokenizer, small_data().statistics())


GOOD = ROBOT.fake_observation(2)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (replace(GOOD, images={"front": GOOD.images["front"]}), r"no camera \['wrist'\].*Map the robot's cameras to"),
        (
            replace(GOOD, images={**GOOD.images, "front": GOOD.images["front"] / np.float32(255)}),
            r"'front' must be uint8 \[B=2,H,W,3\] RGB, got float32",
        ),
        (replace(GOOD, images={**GOOD.images, "front": GOOD.images["front"][:1]}), r"uint8 \[B=2,H,W,3\]"),
        (replace(GOOD, images={**GOOD.images, "front": GOOD.images["front"][0]}), r"uint8 \[B=2,H,W,3\]"),
        (replace(GOOD, images={**GOOD.images, "front": GOOD.images["front"].transpose(0, 3, 1, 2)}), r"H,W,3\]"),
        (replace(GOOD, state=np.zeros((2, 8), np.float32)), r"state must have shape \[B=2,S=3\], got \(2, 8\)"),
        (replace(GOOD, state=np.full((2, 3), np.nan, np.float32)), "state contains NaN or infinite values"),
        (replace(GOOD, instruction="touch the red square"), "must be a list with one string per sample"),
    ],
)
def test_an_observation_that_does_not_fit_is_explained(bad: Observation, said: str) -> None:
    preprocessor = small_preprocessor()
    preprocessor.observation(GOOD)
    with pytest.raises(ValueError, match=said):
        preprocessor.observation(bad)
