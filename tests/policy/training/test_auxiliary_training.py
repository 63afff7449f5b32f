"""The objectives of `policy/training/auxiliary` change nothing when off, learn when on (with every routing), and a
stopped run resumes exactly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogvla.policy.training.objective import Objective, ObjectiveConfig
from cogvla.policy.training.trainer import Trainer
from cogvla.tests.policy.training.test_auxiliary import PATCHES, batch_of, saved
from cogvla.tests.support.small_data import IMITATION, LABELLED, settings, small_trainer

ON: dict[str, Any] = {
    "contrast": 0.1, "matching": 0.3, "concepts": 0.2, "concept_pool": 16, "diversity": 1.0, "masking": 0.5,
    "mask_pool": 4, "vision_dropout": 0.25,
}  # fmt: skip
ROUTINGS: dict[str, dict[str, Any]] = {
    "cogvla": {},
    "patches": PATCHES,
    "router": {**PATCHES, "router": {"name": "random", "budget": 4}},
    "new tokens": {**PATCHES, "router": {"name": "spatial_pool", "budget": 4}},
    "in the language model": {**PATCHES, "router": {"name": "random", "stage": "llm_layer", "layers": [1]}},
    "bypass": {**PATCHES, "router": {"name": "random", "stage": "llm_layer", "layers": [0], "mode": "bypass"}},
    "any budget": {**PATCHES, "router": {"name": "random", "budget": 8, "train_budgets": [2, 8]}},
    "lfp drop": {"mode": "drop"},
}


def everything(tmp_path: Path, efa: bool, base: ObjectiveConfig = IMITATION) -> ObjectiveConfig:
    """All switches on, with a teacher and a blind policy of their own."""
    teacher = saved(tmp_path / "teacher", seed=1, **({} if efa else PATCHES))
    blind = saved(tmp_path / "blind", seed=2)
    pointer = 0.0 if efa else 0.1
    return replace(base, **ON, pointer=pointer, distillation=1.0, teacher=teacher, prior=1.0, blind=blind)


def last_row(output: Path) -> dict[str, float]:
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])


BEFORE = {
    "cogvla": (LABELLED, 2.3098196983337402, 1.426120400428772),
    "patches": (replace(LABELLED, pointing=0.0), 2.1198909282684326, 2.053715229034424),
    "router": (IMITATION, 0.804523229598999, 1.5372047424316406),
}
"""Mean loss and norm of the gradient of four steps, from before there was any of these switches;
`cogvla` since LFP keeps at least one token."""


@pytest.mark.parametrize("routing", BEFORE)
def test_switches_that_are_off_change_nothing(routing: str, tmp_path: Path) -> None:
    config, loss, norm = BEFORE[routing]
    small_trainer(
        tmp_path, settings(steps=4, validate_every=0), config, **{**ROUTINGS[routing], "summary": "words"}
    ).run()
    row = last_row(tmp_path)
    assert row["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert row["train/gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_switches_that_are_off_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer(tmp_path, objective=IMITATION)
    assert all(name.startswith("model.") for name in trainer.raw.state_dict())
    asked: dict[str, Any] = {}
    forward = trainer.raw.model.forward
    monkeypatch.setattr(
        trainer.raw.model, "forward", lambda *args, **more: asked.update(more) or forward(*args, **more)
    )
    trainer.raw(batch_of(IMITATION))
    assert asked == {"debug": False, "watch": False, "decode": False, "change": None, "observer": None}
    assert trainer.builder.blind is None


@pytest.mark.parametrize("routing", ROUTINGS)
def test_all_of_them_go_with_every_routing(routing: str, tmp_path: Path) -> None:
    config = everything(tmp_path, efa=ROUTINGS[routing].get("efa", True))
    trainer = small_trainer(tmp_path / "run", settings(steps=2, validate_every=0), config, **ROUTINGS[routing])
    trainer.run()
    row = last_row(tmp_path / "run")
    assert {"train/contrast_nce", "train/diversity_cos", "train/teacher_kl", "train/teacher_l1"} <= row.keys()
    assert all(torch.tensor(value).isfinite() for value in row.values())
    assert (row["train/teacher_kl"] == 0) == (routing == "new tokens")
    parts = [(0.1, "contrast_nce"), (0.3, "matching_ce"), (0.2, "concepts_nce")]
    parts += [(1, "diversity_cos"), (1, "teacher_kl"), (1, "teacher_l1"), (1, "action_l1")]
    if "train/pointer_ce" in row:
        parts.append((0.1, "pointer_ce"))
    assert ("train/pointer_ce" in row) == (not ROUTINGS[routing].get("efa", True))
    assert row["train/loss"] == pytest.approx(sum(weight * row[f"train/{name}"] for weight, name in parts), rel=1e-5)


def alone(tmp_path: Path, change: dict[str, Any], **routing: Any) -> Objective:
    """One switch on, and towers whose attention is not even: theirs is nearly so before they are trained."""
    config = everything(tmp_path, efa=False)
    switches = ("pointer", "contrast", "matching", "concepts", "diversity", "masking", "vision_dropout")
    changes: dict[str, Any] = {**dict.fromkeys((*switches, "distillation", "prior"), 0), **change}
    objective = small_trainer(tmp_path / "run", settings(), replace(config, **changes), **routing).raw.train()
    with torch.no_grad():
        for name, weight in objective.model.vision.named_parameters():
            if "qkv.weight" in name:
                weight.mul_(3)
    return objective


@pytest.mark.parametrize(
    ("change", "part", "to"),
    [
        ({"pointer": 1.0}, "pointer_ce", 0.8),
        ({"contrast": 1.0}, "contrast_nce", 0.8),
        ({"matching": 1.0}, "matching_ce", 0.8),
        ({"concepts": 1.0}, "concepts_nce", 0.8),
        ({"diversity": 1.0}, "diversity_cos", 0.8),
        ({"distillation": 1.0}, "teacher_kl", 0.8),
        ({"distillation": 1.0}, "teacher_l1", 0.8),
        ({"masking": 0.5}, "action_l1", 0.8),
        ({"prior": 1.0}, "action_l1", 0.8),
        ({"vision_dropout": 0.5}, "action_l1", 0.8),
    ],
)
def test_thirty_steps_reduce_what_a_switch_asks_for(
    change: dict[str, float], part: str, to: float, tmp_path: Path
) -> None:
    objective = alone(tmp_path, change, **ROUTINGS["router"])
    batch = batch_of(objective.config, 6)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-3)
    values = []
    for _ in range(30):
        losses = objective(batch)
        losses["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        values.append(losses[part].item())
    assert values[-1] < to * values[0]


DECODER = {"model.decoder.llm", "model.state.0", "model.state.2", "model.placeholder", "model.head.net"}
POINTER = {f"pointer.{name}.{index}" for name in ("query", "key") for index in (0, 1)}


@pytest.mark.parametrize(
    ("change", "reached"),
    [
        ({"diversity": 1.0}, {"model.vision.towers"}),
        ({"contrast": 1.0}, {"model.vision.towers", "model.vision.fusion"}),
        ({"pointer": 1.0}, {"model.vision.towers", "model.vision.fusion"} | POINTER | DECODER - {"model.head.net"}),
        ({"distillation": 1.0}, {"model.vision.towers", "model.vision.fusion"} | DECODER),
    ],
)
def test_each_reaches_what_it_should(change: dict[str, float], reached: set[str], tmp_path: Path) -> None:
    """Without actions to imitate, only the gradient of the switch is left."""
    objective = alone(tmp_path, change, **PATCHES)
    batch = batch_of(objective.config)
    objective(replace(batch, weight_BK=torch.zeros_like(batch.weight_BK)))["loss"].backward()
    found = [name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()]
    assert {".".join(name.split(".")[:3]) for name in found} == reached


def run_again(tmp_path: Path, config: ObjectiveConfig, **routing: Any) -> tuple[Path, Path]:
    """A run of six steps, and one that is taken up after the third."""
    run = settings(steps=6, checkpoint_every=3, keep_checkpoints=9, validate_every=3)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    small_trainer(whole, run, config, **routing).run()
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_0000006")
    shutil.rmtree(resumed / "policy")
    small_trainer(resumed, run, config, **routing).run()
    return whole, resumed


def test_a_stopped_run_goes_on_exactly_and_the_policy_is_released_alone(tmp_path: Path) -> None:
    config = everything(tmp_path, efa=False, base=replace(LABELLED, pointing=0.0))
    whole, resumed = run_again(tmp_path, config, **ROUTINGS["router"])
    for file in ("metrics.jsonl", "policy/model.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    states = [
        torch.load(run / "checkpoints" / "step_0000006" / "training.pt", weights_only=True)["objective"]
        for run in (whole, resumed)
    ]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert "mask.pool_PD" in states[0]
    assert not any("teacher" in name for name in states[0])
    released = load_file(whole / "policy" / "model.safetensors")
    plain = small_trainer(tmp_path / "plain", objective=IMITATION, **ROUTINGS["router"])
    assert released.keys() == plain.raw.model.state_dict().keys()


def test_another_teacher_does_not_go_on(tmp_path: Path) -> None:
    config = replace(IMITATION, distillation=1.0, teacher=saved(tmp_path / "teacher", **PATCHES))
    small_trainer(tmp_path / "run", settings(steps=2, validate_every=0), config, **PATCHES).run()
    other = replace(config, teacher=saved(tmp_path / "other", seed=9, **PATCHES))
    said = r"another setting: weights of objective\.teacher differs; choose"
    with pytest.raises(ValueError, match=said):
        small_trainer(tmp_path / "run", settings(steps=4, validate_every=0), other, **PATCHES).run()
    (tmp_path / "teacher").rename(tmp_path / "moved")
    moved = replace(config, teacher=str(tmp_path / "moved"))
    small_trainer(tmp_path / "run", settings(steps=3, validate_every=0), moved, **PATCHES).run()
    shutil.copytree(tmp_path / "other", tmp_path / "teacher")
    with pytest.raises(ValueError, match=said):
        small_trainer(tmp_path / "run", settings(steps=4, validate_every=0), config, **PATCHES).run()


def test_the_place_of_a_policy_that_is_not_used_does_not_matter(tmp_path: Path) -> None:
    """A base is the teacher unless another one is given."""
    for place in ("nowhere", "elsewhere"):
        config = replace(IMITATION, teacher=place, blind=place)
        small_trainer(tmp_path, settings(steps=2 + (place == "elsewhere"), validate_every=0), config).run()


def gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(trainer.weights.optimiser, "zero_grad", lambda set_to_none: None)
    trainer._train_step()
    return {name: p.grad.clone() for name, p in trainer.raw.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("change", [{"accumulation": 2}, {"cpu_parts": 2}])
def test_a_step_in_parts_is_masked_hidden_taught_and_weighted_as_the_whole(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but those whose negatives are those of a part; diversity is a mean over rows too."""
    config = replace(everything(tmp_path, efa=False), contrast=0.0, matching=0.0, concepts=0.0)
    step = settings(clip_norm=1e9, validate_every=0)
    whole = gradients(small_trainer(tmp_path / "whole", step, config, **ROUTINGS["router"]), monkeypatch)
    divided = small_trainer(tmp_path / "parts", replace(step, **change), config, **ROUTINGS["router"])
    parts = gradients(divided, monkeypatch)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-3, msg=partial("{}: {}".format, name))


def test_recomputing_blocks_gives_the_same_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = everything(tmp_path, efa=True)
    found = []
    for recompute in (False, True):
        run = settings(clip_norm=1e9, gradient_checkpointing=recompute)
        found.append(gradients(small_trainer(tmp_path / str(recompute), run, config), monkeypatch))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=partial("{}: {}".format, name))


def test_a_policy_that_does_not_see_is_trained_and_then_asked(tmp_path: Path) -> None:
    run = settings(steps=2, validate_every=0)
    blind = small_trainer(tmp_path / "blind", run, replace(IMITATION, vision_dropout=1.0))
    batch = batch_of(blind.raw.config)
    blank = replace(batch, inputs=replace(batch.inputs, pixels=torch.zeros_like(batch.inputs.pixels)))
    assert torch.equal(blind.raw(batch)["loss"], blind.raw(blank)["loss"])
    blind.run()
    config = replace(IMITATION, prior=1.0, blind=str(tmp_path / "blind" / "policy"))
    weighted = small_trainer(tmp_path / "run", run, config)
    weighted.run()
    assert last_row(tmp_path / "run")["train/action_l1"] > 0


def test_an_objective_that_distils_needs_its_teacher(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, objective=IMITATION)
    with pytest.raises(AssertionError):
        Objective(trainer.raw.model, replace(IMITATION, distillation=1.0, teacher="folder"))
