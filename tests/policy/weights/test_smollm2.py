"""SmolLM2-135M from its GGUF file, as the language model of `policy=small` and as a text encoder.

A minute on two cores, 4 GB of memory: `pytest -m slow tests/policy/weights/test_smollm2.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvla.configs.load import load
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.inputs.text_encoder import with_encoder
from cogvla.policy.inputs.tokenizer import PretrainedTokenizer
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.trainer import Trainer
from cogvla.scripts.training.build import build_trainer
from cogvla.tests.support.small_data import IMITATION, MODEL, ROBOT, TOWER, settings, small_data
from cogvla.tests.support.text_encoders import smollm2

pytestmark = pytest.mark.slow


def trainer(config: CogVLAConfig, output: Path, **changes: Any) -> Trainer:
    few = settings(**{"steps": 3, "batch_size": 4, "ema_decay": 0.0, "validate_every": 0, **changes})
    return build_trainer(few, config, IMITATION, ROBOT, small_data(), output, lambda metrics, step: None)


def control(policy: CogVLAPolicy, instruction: str) -> np.ndarray:
    """The actions of three decisions, each with another picture."""
    policy.reset()
    seen = [replace(ROBOT.fake_observation(1, seed), instruction=(instruction,)) for seed in range(3)]
    return np.concatenate([policy.act(observation).actions for observation in seen])


def test_small_on_its_30_layers_with_adapters(tmp_path: Path) -> None:
    body = load("policy", "small")
    body["vision"] = {"dinov2": TOWER, "siglip": TOWER, "aggregation_tokens": 4}
    sizes = {"width": 576, "intermediate": 1536, "layers": 30, "heads": 9, "kv_heads": 3}
    body["language"] |= {"hub": str(smollm2()), **sizes}
    config = CogVLAConfig.from_dict({**body, "routing": load("routing", "cogvla")})
    lora = load("finetune", "lora")
    adapted = FinetuneConfig(train=tuple(lora["train"]), adapt=("decoder.llm",), rank=4)
    training = trainer(config, tmp_path, finetune=adapted)
    base = training.raw.model.decoder.llm.layers[29].mlp.up_proj.base_layer.weight.clone()
    assert base.std() > 0.05, "published weights, not initial ones"
    policy = training.run()
    assert isinstance(policy.preprocessor.tokenizer, PretrainedTokenizer)
    loaded = load_policy(tmp_path / "policy")
    merged = loaded.model.decoder.llm.layers[29].mlp.up_proj.weight
    assert 0 < (merged - base).abs().max() < 0.1, "the adapters are folded in"
    actions = control(policy, "touch the red square")
    assert np.isfinite(actions).all()
    np.testing.assert_allclose(control(loaded, "touch the red square"), actions, atol=1e-4)
    engine = loaded.with_engine(EngineConfig(kind="trace"), release=True)
    np.testing.assert_allclose(control(engine, "touch the red square"), actions, atol=1e-3)


def test_as_text_encoder(tmp_path: Path) -> None:
    language = {**MODEL["language"], "encoder": str(smollm2())}
    config = with_encoder(CogVLAConfig.from_dict({**MODEL, "language": language, "routing": {"film_init": 1.0}}))
    assert config.language.encoder_width == 576
    policy = trainer(config, tmp_path).run()
    loaded = load_policy(tmp_path / "policy")
    for instruction in ("touch the red square", "grab the crimson teapot"):
        np.testing.assert_array_equal(control(loaded, instruction), control(policy, instruction))
    assert not np.array_equal(control(loaded, "grab the crimson teapot"), control(loaded, "grab the blue teapot"))
    assert loaded.unknown_words("grab the crimson teapot") == []
    weights = sum(p.numel() for p in loaded.model.parameters())
    assert weights < 1e6
    assert torch.isfinite(loaded.model.text.mean_E).all()  # type: ignore[union-attr]
