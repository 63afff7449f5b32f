"""`objective.foresight`: known answers, what it may see, and that training with it resumes and can be divided."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.training.auxiliary.foresight import (
    LATENT,
    ForesightHead,
    FrozenLatents,
    Seen,
    latent_l1,
    patch_weights,
    when,
)
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.objective import Batch, ObjectiveConfig
from cogvla.tests.policy.training.test_auxiliary_training import gradients, last_row, run_again
from cogvla.tests.support.small_data import (
    CHUNK,
    IMITATION,
    LABELLED,
    settings,
    small_data,
    small_preprocessor,
    small_trainer,
)

AHEAD = replace(IMITATION, foresight=0.5)


def test_changed_patches_have_half_of_the_weight() -> None:
    changed_BVP = torch.tensor([[[True, False, False, False], [False] * 4, [True] * 4]])
    found = patch_weights(changed_BVP)[0]
    torch.testing.assert_close(found[0], torch.tensor([2.0, 2 / 3, 2 / 3, 2 / 3]))
    assert torch.equal(found[1:], torch.ones(2, 4))
    error_BVPE = torch.zeros(1, 3, 4, 2)
    error_BVPE[0, 0, 0] = 1.0
    assert latent_l1(error_BVPE, torch.zeros(1, 3, 4, 2), patch_weights(changed_BVP)) == pytest.approx(2 / 12)


def test_an_untrained_head_copies_and_the_control_has_nothing_to_copy() -> None:
    now, later = torch.full((2, 2, 4, LATENT), 1.0), torch.full((2, 2, 4, LATENT), 3.0)
    seen = Seen(now, later, torch.ones(2, 2, 4), torch.randn(2, 3))
    for target, wanted in (("future", 2.0), ("present", 1.0)):
        head = ForesightHead(4, 16, 3, 2, 4, target)
        error, copied = head(torch.randn(2, 4, 16), seen)
        assert (float(error.detach()), float(copied)) == (wanted, 2.0)
        torch.nn.init.ones_(head.write.bias)  # one more than nothing
        assert float(head(torch.randn(2, 4, 16), seen)[0].detach()) == wanted - 1


def test_only_frames_of_the_episode_and_its_own_instruction_count() -> None:
    samples = {"later_is_pad": torch.tensor([False, True, False, False]), "instruction_id": torch.tensor([0, 0, 1, 2])}
    assert when(samples, torch.tensor([0, 0, 2, 2])).tolist() == [2.0, 0.0, 0.0, 2.0]


def test_the_later_frame_is_that_at_the_end_of_the_chunk() -> None:
    data = small_data()
    batches = TrainingBatches(data, 4, 0, ahead=CHUNK)
    end = int((data.episode_N == 0).sum())
    rows = torch.tensor([0, end - CHUNK - 1, end - CHUNK, end - 1])
    samples = batches.gather(rows)
    assert samples["later_is_pad"].tolist() == [False, False, True, True]
    wanted = torch.minimum(rows + CHUNK, torch.tensor(end - 1))
    assert torch.equal(samples["later_pixels"], torch.from_numpy(data.frames.take(wanted.numpy())))
    assert not {"later_pixels", "later_is_pad"} & TrainingBatches(data, 4, 0).gather(rows).keys()


def batch_of(config: ObjectiveConfig = AHEAD) -> Batch:
    data = small_data()
    samples = TrainingBatches(data, 16, 0, ahead=CHUNK).gather(torch.arange(16))
    return BatchBuilder(data, small_preprocessor(data), config).training(samples, torch.Generator().manual_seed(0))


def test_the_target_is_frozen_and_the_head_sees_tokens_and_state_but_no_actions(tmp_path: Path) -> None:
    objective, batch = small_trainer(tmp_path, objective=AHEAD).raw, batch_of()
    assert batch.seen is not None
    assert not batch.seen.later_BVPE.requires_grad
    losses = objective(batch)
    loss = losses["foresight_l1"]
    assert loss == losses["foresight_copy_l1"] > 0, "before its first step, it copies"
    assert float(losses["loss"].detach()) == pytest.approx(float(losses["action_l1"] + 0.5 * loss), rel=1e-5)
    assert objective.foresight is not None
    torch.nn.init.normal_(objective.foresight.write.weight, std=0.1)
    loss = objective(batch)["foresight_l1"]
    assert objective(replace(batch, actions_BKA=batch.actions_BKA + 1))["foresight_l1"] == loss
    seen = replace(batch.seen, state_BS=batch.seen.state_BS + 1)
    assert objective(replace(batch, seen=seen))["foresight_l1"] != loss
    objective(replace(batch, weight_BK=torch.zeros_like(batch.weight_BK)))["loss"].backward()
    reached = {".".join(name.split(".")[:3]) for name, p in objective.named_parameters() if p.grad is not None}
    assert {"model.vision.towers", "model.vision.fusion", "foresight.tokens.0", "foresight.state.weight"} <= reached


def test_a_hidden_state_is_seen_here_and_a_swapped_instruction_does_not_count() -> None:
    plain, hidden = batch_of(), batch_of(replace(AHEAD, state_dropout=1.0))
    assert plain.seen is not None
    assert hidden.seen is not None
    assert not hidden.inputs.state.any()
    assert torch.equal(plain.seen.state_BS, hidden.seen.state_BS)
    swapped = batch_of(replace(LABELLED, foresight=0.5, counterfactual=0.9))
    assert swapped.seen is not None
    none_B = ~swapped.weight_BK.any(dim=1)
    assert none_B.any()
    assert not swapped.seen.weight_BVP[none_B].any()


@pytest.mark.parametrize("target", ["future", "present"])
def test_fifty_steps_beat_what_it_begins_with(target: str, tmp_path: Path) -> None:
    objective = small_trainer(tmp_path, objective=replace(AHEAD, foresight_target=target)).raw
    batch = batch_of(objective.config)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    values = []
    for _ in range(50):
        losses = objective(batch)
        losses["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        values.append(float(losses["foresight_l1"]))
    assert values[-1] < 0.8 * values[0]


def test_a_stopped_run_goes_on_exactly_and_the_head_is_left_out(tmp_path: Path) -> None:
    whole, resumed = run_again(tmp_path, AHEAD)
    for file in ("metrics.jsonl", "policy/model.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    assert {"train/foresight_l1", "train/foresight_copy_l1"} <= last_rows(whole)
    plain = small_trainer(tmp_path / "plain", objective=IMITATION)
    assert load_file(whole / "policy" / "model.safetensors").keys() == plain.raw.model.state_dict().keys()
    shutil.rmtree(resumed / "policy")
    other = replace(AHEAD, foresight_target="present")
    with pytest.raises(ValueError, match=r"objective\.foresight_target was future, is present"):
        small_trainer(resumed, settings(steps=7), other).run()


def last_rows(output: Path) -> set[str]:
    return {name for line in (output / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}


@pytest.mark.parametrize("change", [{"accumulation": 2}, {"cpu_parts": 2}])
def test_a_step_in_parts_is_the_whole_step(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = settings(clip_norm=1e9, validate_every=0)
    whole = gradients(small_trainer(tmp_path / "whole", step, AHEAD), monkeypatch)
    divided = small_trainer(tmp_path / "parts", replace(step, **change), AHEAD)
    parts = gradients(divided, monkeypatch)
    if divided.parallel is not None:
        divided.parallel.close()
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-3)


def test_every_routing_can_look_ahead(tmp_path: Path) -> None:
    patches: dict[str, Any] = {"efa": False, "lfp": False}
    router = {"name": "random", "budget": 4}
    small_trainer(tmp_path, settings(steps=2, validate_every=0), AHEAD, **patches, router=router).run()
    assert last_row(tmp_path)["train/foresight_l1"] > 0
    varies = {**router, "budget": 8, "train_budgets": [2, 8]}
    with pytest.raises(ValueError, match=r"objective.foresight needs a fixed number of vision tokens"):
        small_trainer(tmp_path / "varies", objective=AHEAD, **patches, router=varies)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"foresight_target must be future or present, got 'past'"):
        ObjectiveConfig(foresight_target="past")
    with pytest.raises(ValueError, match=r"objective\.foresight needs all vision tokens"):
        ObjectiveConfig(foresight=0.1, masking=0.5)
    with pytest.raises(ValueError, match="weights must be positive"):
        ObjectiveConfig(foresight=-1.0)
    odd = small_data()
    with pytest.raises(ValueError, match=r"objective.foresight: images of 31 x 31 cannot be cut .*; set it to 0"):
        FrozenLatents(replace(odd, frames=_Cropped(odd.frames.take)))  # type: ignore[arg-type]


class _Cropped:
    """Frames of 31 x 31 pixels."""

    def __init__(self, take: object) -> None:
        self.take = lambda rows: take(rows)[..., :31, :31]  # type: ignore[operator]

    def __len__(self) -> int:
        return len(small_data().frames)
