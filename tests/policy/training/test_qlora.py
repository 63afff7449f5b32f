"""Adapters on layers in 4 bits: what is trained, what is saved, resuming, and the memory that is predicted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvla.configs.load import load
from cogvla.policy.checkpoint import load_policy, read_config, saved_config
from cogvla.policy.cost.memory import estimate_memory
from cogvla.policy.engine.nf4 import Nf4Linear
from cogvla.policy.model.empty_model import empty_model
from cogvla.policy.training import adapters
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.config import TrainingConfig
from cogvla.scripts.command import compose
from cogvla.scripts.measure.training_memory import run as training_memory
from cogvla.tests.policy.training.test_finetune import adapted, answers, assert_alike
from cogvla.tests.support.extras import needs
from cogvla.tests.support.small_data import ROBOT, settings, small_trainer
from cogvla.tests.support.tiny_model import tiny_input, tiny_model

QLORA = FinetuneConfig(**{**load("finetune", "qlora"), "rank": 4, "alpha": 2.0})
EIGHT_PER_PASS = ["training.accumulation=8", "training.optimiser=adamw8bit"]


@pytest.fixture
def _bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason=needs("nf4"))


@pytest.mark.usefixtures("_bitsandbytes")
def test_layers_with_adapters_are_in_four_bits() -> None:
    model = tiny_model()
    adapters.prepare(model, QLORA)
    layers = dict(adapters.adapted_layers(model))
    assert layers
    assert all(isinstance(layer.base_layer, Nf4Linear) for layer in layers.values())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if name.endswith(adapters.PACKED)]
    said = adapters.summary(model)
    numbers = sum(p.numel() for p in tiny_model().parameters())
    full = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)
    packed = sum(layer.base_layer.weight.numel() for layer in layers.values())
    assert f"{numbers - full:,} are frozen, {packed:,} of them in 4 bits" in said


@pytest.mark.usefixtures("_bitsandbytes")
def test_merged_weights_compute_what_was_trained() -> None:
    model, plain = adapted(QLORA), tiny_model(seed=5).eval()
    assert not torch.allclose(answers(model)[0], answers(adapted(replace(QLORA, bits=None)))[0], atol=1e-4)
    plain.load_state_dict(adapters.merged_state(model))
    assert_alike(plain, model)
    with pytest.raises(ValueError, match="cannot be merged in place: use merged_state"):
        adapters.merge(model)


@pytest.mark.usefixtures("_bitsandbytes")
def test_every_adapter_gets_a_gradient() -> None:
    model = adapted(QLORA)
    model.recompute_blocks(True)
    model(tiny_input()).actions.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if ".lora_" in name and (p.grad is None or not p.grad.any())]
    assert not silent


@pytest.mark.usefixtures("_bitsandbytes")
def test_it_trains_resumes_and_is_saved_whole(tmp_path: Path) -> None:
    config = settings(steps=4, checkpoint_every=2, validate_every=2, finetune=QLORA, gradient_checkpointing=True)
    trainer = small_trainer(tmp_path, config)
    trainer.run()
    policy = load_policy(tmp_path / "policy")
    assert not list(adapters.adapted_layers(policy.model))
    observation = ROBOT.fake_observation(2)
    expected = policy.act(observation).actions
    np.testing.assert_allclose(trainer.policy().act(observation).actions, expected, rtol=1e-3, atol=1e-4)
    begun = small_trainer(tmp_path / "begun", config).policy().act(observation).actions
    assert not np.allclose(begun, expected, atol=1e-3)
    shutil.rmtree(tmp_path / "checkpoints" / "step_0000004")
    small_trainer(tmp_path, config).run()
    again = load_policy(tmp_path / "policy").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in policy.model.state_dict().items())
    with pytest.raises(ValueError, match="was trained with another finetune"):
        small_trainer(tmp_path, replace(config, finetune=replace(QLORA, bits=None))).run()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"finetune\.bits must be 4 or null, got 8"):
        FinetuneConfig(adapt=("*",), bits=8)
    with pytest.raises(ValueError, match=r"finetune\.bits=4 needs finetune\.adapt"):
        FinetuneConfig(bits=4)


def test_seven_billion_parameters_fit_into_16_gb() -> None:
    recipe = ["policy=cogvla_7b", "embodiment=libero", "training=libero", *EIGHT_PER_PASS]
    totals = {}
    for name in ("lora_all", "qlora"):
        table = training_memory(compose("train_policy", [*recipe, f"finetune={name}"]))
        totals[name] = float(table.splitlines()[-1].split()[1])
    assert totals["qlora"] < 13
    assert totals["lora_all"] > 20


def test_the_memory_of_a_teacher_and_of_a_policy_without_vision_is_counted() -> None:
    shipped = Path(__file__).parents[3] / "checkpoints" / "tabletop_object"
    config, robot = saved_config(read_config(shipped), shipped), load_policy(shipped).embodiment
    numbers = sum(p.numel() for p in empty_model(config, robot).parameters())
    alone, *again = (estimate_memory(config, robot, TrainingConfig())[0] for _ in range(4))
    assert again == [alone] * 3, "activations were left out where they had the address of a dead buffer"
    taught, _ = estimate_memory(config, robot, TrainingConfig(), teacher=config)
    weighted, _ = estimate_memory(config, robot, TrainingConfig(), blind=config)
    assert (alone.teacher, alone.blind) == (0, 0)
    assert (taught.teacher, weighted.blind) == (2 * numbers, 4 * numbers)
    hidden = 2 * config.language.width * config.language.layers  # of each token, of student and teacher
    assert taught.activations > alone.activations + 2 * config.vision.aggregation_tokens * hidden
    assert weighted.total(4) == alone.total(4) + 4 * numbers, "every GPU holds it"
    given = [f"objective.{name}={shipped}" for name in ("teacher", "blind")]
    table = training_memory(compose("train_policy", [*given, "objective.distillation=1", "objective.prior=1"]))
    assert "\n                 teacher " in table
    assert "\n   policy without vision " in table
    with pytest.raises(ValueError, match=r"objective\.teacher=nowhere is no checkpoint folder"):
        training_memory(compose("train_policy", ["objective.teacher=nowhere", "objective.distillation=1"]))
