"""What training minimises, by known answers, and what is asked of which sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.interface import Camera
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.objective import Batch, Objective, ObjectiveConfig, masked_l1, pointing_loss
from cogvla.policy.training.validation import validate
from cogvla.tests.support.small_data import (
    IMITATION,
    LABELLED,
    ROBOT,
    small_config,
    small_data,
    small_preprocessor,
    small_trainer,
)

ONES = torch.ones(1, 1, 2)


def builder(config: ObjectiveConfig = LABELLED, data: DemonstrationData | None = None) -> BatchBuilder:
    data = data or small_data()
    return BatchBuilder(data, small_preprocessor(data), config)


def samples(count: int, data: DemonstrationData | None = None) -> dict[str, Any]:
    data = data or small_data()
    return TrainingBatches(data, count, seed=0).gather(torch.arange(count) % len(data))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_masked_l1() -> None:
    predicted = torch.zeros(1, 3, 2)
    expert = torch.tensor([[[1.0, 3.0], [5.0, 5.0], [100.0, 100.0]]])
    assert masked_l1(predicted, expert, torch.tensor([[1.0, 1.0, 0.0]])).item() == pytest.approx((2 + 5) / 2)
    assert masked_l1(predicted, expert, torch.tensor([[3.0, 1.0, 0.0]])).item() == pytest.approx((3 * 2 + 5) / 4)
    assert masked_l1(predicted, expert, torch.zeros(1, 3)).item() == 0


def log_attention(patches_2: tuple[int, int], patch_count: int = 16) -> Tensor:
    """Two heads and four tokens: in the guided head the first two attend to one patch, the others to another."""
    probability = torch.full((1, 2, 4, patch_count), 1e-9)
    probability[:, 0, :2, patches_2[0]] = 1
    probability[:, 0, 2:, patches_2[1]] = 1
    return probability.log()


def centre(row: int, column: int, side: int = 4) -> list[float]:
    """Of a patch, as (right, down)."""
    return [(column + 0.5) / side, (row + 0.5) / side]


def test_attention_on_the_right_patches_costs_nothing() -> None:
    points = torch.tensor([[[centre(1, 2), centre(3, 0)]]])
    right = log_attention((1 * 4 + 2, 3 * 4 + 0))
    assert pointing_loss(right, points, ONES).item() == pytest.approx(0, abs=1e-5)
    swapped = log_attention((3 * 4 + 0, 1 * 4 + 2))
    assert pointing_loss(swapped, points, ONES).item() == pytest.approx(-torch.tensor(1e-9).log().item(), rel=1e-5)
    transposed = log_attention((2 * 4 + 1, 0 * 4 + 3))
    assert pointing_loss(transposed, points, ONES).item() > 10


def test_attention_everywhere_costs_the_logarithm_of_the_number_of_patches() -> None:
    even = torch.full((1, 2, 4, 16), 1 / 16).log()
    points = torch.rand(1, 1, 2, 2, generator=seeded())
    assert pointing_loss(even, points, ONES).item() == pytest.approx(torch.tensor(16.0).log().item())


def test_a_point_between_patches_asks_for_each_by_its_distance() -> None:
    # a quarter of the way from column 1 to 2, three quarters from row 0 to 1
    point = [(1 + 0.25 + 0.5) / 4, (0 + 0.75 + 0.5) / 4]
    logits = torch.randn(1, 2, 4, 16, generator=seeded()).log_softmax(-1)
    wanted = torch.zeros(16)
    wanted[[1, 2, 5, 6]] = torch.tensor([0.25 * 0.75, 0.25 * 0.25, 0.75 * 0.75, 0.75 * 0.25])
    expected = -(wanted * logits[0, 0].view(2, 2, 16).mean(1)).sum(-1).mean()
    torch.testing.assert_close(pointing_loss(logits, torch.tensor([[[point, point]]]), ONES), expected)


def test_a_point_at_the_border_belongs_to_the_border_patch() -> None:
    points = torch.tensor([[[[0.0, 0.0], [0.999, 0.999]]]])
    assert pointing_loss(log_attention((0, 15)), points, ONES).item() == pytest.approx(0, abs=1e-5)


def test_a_point_without_weight_does_not_count() -> None:
    points = torch.tensor([[[centre(1, 2), [-1.0, -1.0]]]])
    weight = torch.tensor([[[2.0, 0.0]]])
    assert pointing_loss(log_attention((6, 9)), points, weight).item() == pytest.approx(0, abs=1e-5)


def test_points_outside_of_the_picture_have_no_weight_and_the_others_average_one() -> None:
    data = small_data()
    shift = data.frame_labels["projection_front"].clone()
    shift[: len(data) // 2, 0, 3] = 5.0  # far to the right
    behind = data.frame_labels["projection_wrist"].clone()
    behind[:, 2, 3] = -1.0
    data.frame_labels.update(projection_front=shift, projection_wrist=behind)
    config = replace(LABELLED, counterfactual=0.0)
    batch = builder(config, data).training(samples(len(data), data), seeded())
    assert batch.point_weight_BV2 is not None
    assert batch.image_points_BV22 is not None
    assert (batch.point_weight_BV2[:, 1] == 0).all()
    assert (batch.point_weight_BV2[: len(data) // 2, 0] == 0).all()
    assert (batch.point_weight_BV2[len(data) // 2 :, 0] > 0).all()
    assert batch.point_weight_BV2.mean().item() == pytest.approx(1)
    target_uv = data.frame_labels["target"][-1, :2]
    torch.testing.assert_close(batch.image_points_BV22[-1, 0, 0], target_uv)


def test_the_end_of_an_episode_has_no_weight() -> None:
    batch = builder(IMITATION).training(samples(7), seeded())  # all of the first episode
    expected = torch.tensor([[1, 1, 1, 1]] * 4 + [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).float()
    torch.testing.assert_close(batch.weight_BK, expected / expected.mean())


def test_counterfactual_samples_have_the_labels_of_another_task_and_no_action_to_imitate() -> None:
    data = small_data()
    build = builder(replace(LABELLED, counterfactual=0.5, state_dropout=0.0), data)
    rows = samples(len(data), data)
    batch = build.training(rows, seeded())
    assert batch.positions_BG is not None
    own = rows["labels"]["task"]
    asked = torch.tensor([build.instructions.index(text) for text in decode(batch)])
    swapped = asked != own
    assert 0.3 < swapped.float().mean() < 0.7
    assert ((asked - own) % 3)[swapped].eq(2).all(), "the task after its own is not possible in any scene"
    assert (batch.weight_BK[swapped] == 0).all()
    assert (batch.weight_BK[~swapped, 0] > 0).all()
    everyone = torch.arange(len(data))
    points = batch.positions_BG * build.position_std + build.position_mean
    torch.testing.assert_close(points, rows["labels"]["alternatives"][everyone, asked])


def decode(batch: Batch) -> list[str]:
    words = small_preprocessor().tokenizer.words  # type: ignore[attr-defined]
    inputs = batch.inputs
    return [" ".join(words[i] for i in ids[mask]) for ids, mask in zip(inputs.text_ids, inputs.text_mask, strict=True)]


def test_nothing_is_swapped_where_no_other_task_is_possible() -> None:
    data = small_data()
    data.frame_labels["possible"] = torch.nn.functional.one_hot(data.frame_labels["task"], 3).bool()
    batch = builder(replace(LABELLED, counterfactual=0.9), data).training(samples(20, data), seeded())
    assert decode(batch) == [data.instructions[i] for i in samples(20, data)["instruction_id"]]


def test_an_instruction_that_the_data_never_names_is_not_asked_for() -> None:
    data = small_data()
    keep = torch.isin(data.episode_N, torch.tensor([0, 1, 3, 4, 6, 7]))  # the episodes of tasks 0 and 1
    part = replace(data, rows=torch.arange(len(data))[keep])
    rows = TrainingBatches(part, 8, seed=0).gather(part.rows)  # type: ignore[arg-type]
    batch = builder(replace(LABELLED, counterfactual=0.9), part).training(rows, seeded())
    assert data.instructions[2] not in decode(batch)


def test_the_state_is_hidden_from_a_share_of_the_samples() -> None:
    data = small_data()
    rows = samples(400, data)
    batch = builder(replace(LABELLED, state_dropout=0.3), data).training(rows, seeded())
    hidden = (batch.inputs.state == 0).all(1)
    assert 0.2 < hidden.float().mean() < 0.4
    shown = builder(IMITATION, data).training(rows, seeded()).inputs.state
    assert torch.equal(batch.inputs.state[~hidden], shown[~hidden])
    always = builder(replace(LABELLED, state_dropout=1.0), data).training(rows, seeded())
    assert (always.inputs.state == 0).all()


def test_evaluation_hides_nothing_and_swaps_nothing() -> None:
    data = small_data()
    rows = samples(30, data)
    batch = builder(replace(LABELLED, counterfactual=0.9, state_dropout=1.0), data).evaluation(rows)
    assert decode(batch) == [data.instructions[i] for i in rows["instruction_id"]]
    assert (batch.inputs.state != 0).any(1).all()
    other = builder(data=data).evaluation(rows, torch.zeros(30, dtype=torch.long))
    assert set(decode(other)) == {data.instructions[0]}


def test_the_same_generator_gives_the_same_batch() -> None:
    build, rows = builder(), samples(40)
    first, second, third = (build.training(rows, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.inputs.text_ids, second.inputs.text_ids)
    assert torch.equal(first.inputs.state, second.inputs.state)
    assert torch.equal(first.weight_BK, second.weight_BK)
    assert not torch.equal(first.weight_BK, third.weight_BK)


def test_phases_are_weighted() -> None:
    rows = samples(6)
    rows["action_is_pad"][:] = False
    batch = builder(replace(IMITATION, phase_weights=(1.0, 2.0, 3.0))).training(rows, seeded())
    torch.testing.assert_close(batch.weight_BK[:, 0], torch.tensor([1.0, 2.0, 3.0] * 2) / 2)


@pytest.mark.parametrize(
    ("config", "drop", "said"),
    [
        (LABELLED, "goal", r"objective\.grounding needs the labels goal.*objective=imitation needs no labels"),
        (LABELLED, "projection_wrist", r"objective\.pointing needs the labels projection_wrist"),
        (LABELLED, "possible", r"objective\.counterfactual needs the labels possible"),
        (
            replace(IMITATION, phase_weights=(1.0, 1.0, 1.0)),
            "phase",
            r"objective\.phase_weights needs the labels phase",
        ),
        (replace(IMITATION, phase_weights=(1.0, 1.0)), "none", r"2 entries, the data has phases 0 to 2; give a weight"),
    ],
)
def test_missing_labels_are_explained(config: ObjectiveConfig, drop: str, said: str) -> None:
    data = small_data()
    data.frame_labels.pop(drop, None)
    with pytest.raises(ValueError, match=said):
        builder(config, data)


def test_labels_that_are_not_finite_are_explained() -> None:
    data = small_data()
    data.frame_labels["goal"][3] = torch.nan
    with pytest.raises(ValueError, match="`goal` holds NaN"):
        builder(LABELLED, data)


@pytest.mark.parametrize(
    "bad",
    [
        {"grounding": -1.0},
        {"pointing": -0.1},
        {"counterfactual": 1.0},
        {"state_dropout": 1.1},
        {"phase_weights": (2.0, -1.5)},
    ],
)
def test_bad_shares_and_weights(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="weights must be positive and shares between 0 and 1"):
        ObjectiveConfig(**bad)


def test_pointing_needs_square_images_and_two_halves(tmp_path: Any) -> None:
    model = CogVLA(small_config(), replace(ROBOT, cameras=(Camera("front", 32, 16), Camera("wrist", 32, 16))))
    with pytest.raises(ValueError, match=r"needs square images and an even .*aggregation_tokens, got 32x16 and 2"):
        Objective(model, LABELLED)


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path: Any) -> None:
    config = replace(LABELLED, grounding=0.5, reading=0.75, pointing=0.25)
    trainer = small_trainer(tmp_path, objective=config)
    batch = trainer.builder.evaluation(samples(6))
    losses = trainer.raw(batch)
    expected = losses["action_l1"] + 0.5 * losses["grounding_l1"] + 0.75 * losses["reading_l1"]
    expected = expected + 0.25 * losses["pointing_ce"]
    torch.testing.assert_close(losses["loss"].detach(), expected)
    actions = trainer.raw.model(batch.inputs).actions.detach()
    torch.testing.assert_close(losses["action_l1"], masked_l1(actions, batch.actions_BKA, batch.weight_BK))


def test_imitation_needs_no_labels(tmp_path: Any) -> None:
    data = small_data(labels=False)
    trainer = small_trainer(tmp_path, objective=IMITATION, data=data)
    losses = trainer.raw(trainer.builder.training(samples(6, data), seeded()))
    assert losses.keys() == {"loss", "action_l1"}


def test_validation_knows_a_perfect_policy_and_one_that_does_not_listen(tmp_path: Any) -> None:
    trainer = small_trainer(tmp_path)
    metrics = validate(trainer.weights.averaged(), trainer.held_out, trainer.builder)
    assert metrics == validate(trainer.weights.averaged(), trainer.held_out, trainer.builder)
    assert metrics["validation/wrong_instruction_l1"] != metrics["validation/action_l1"]
    deaf = trainer.weights.averaged()
    with torch.no_grad():
        deaf.model.decoder.llm.embed_tokens.weight.zero_()
    metrics = validate(deaf, trainer.held_out, trainer.builder)
    assert metrics["validation/wrong_instruction_l1"] == pytest.approx(metrics["validation/action_l1"])
    phases = [metrics[f"validation/phase{phase}_l1"] for phase in range(3)]
    assert min(phases) <= metrics["validation/action_l1"] <= max(phases)
    assert metrics["validation/target_cm"] > 1
