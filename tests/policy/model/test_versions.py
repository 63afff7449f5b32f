"""The same weights give the same numbers with every version of transformers and timm that we support.

The weights are drawn here, by name, so that a library's own initialisation does not matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.tiny_model import MODEL, ROBOT, tiny_input

PAPER = {"tokens_per_step": "action_dim", "placeholder": "zero", "shifted": True}
FAITHFUL = {"summary": "faithful", "period": 31, "position_policy": "renumber", "scale": "all"}
WORDS = {"summary": "words"}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"language": {"rope_theta": 500.0}, "routing": WORDS},
    "qwen2": {"language": {"architecture": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-3}, "routing": WORDS},
    "faithful": {"head": PAPER, "routing": FAITHFUL},
    "drop": {"routing": {"mode": "drop", **WORDS}},
    "contextual": {},
    "plain": {"routing": {"efa": False, "lfp": False, "attention": "bidirectional"}},
}
FIRST_ACTIONS = {
    "llama": [2.1215371, 0.8764672, 0.9217175, 1.8683703, 0.5183717, 1.5792592, 1.9441464, 0.7076079, 1.0144084],
    "qwen2": [2.420251, 1.2175603, 0.7501443, 2.374081, 1.1620843, 0.8938874, 2.5036228, 1.3814147, 0.6670336],
    "faithful": [2.6715368, 0.0760943, 2.6835804, 2.4729056, -0.0657543, 2.5354081, 2.2441045, -0.0687517, 3.2241126],
    "drop": [2.4576687, 0.3831989, 0.5771045, 2.1983, 0.7228882, 1.385117, 2.0781253, 0.1499417, 0.5954931],
    "contextual": [2.57298, -0.0209589, 0.950953, 2.4265648, -0.6569199, 0.2697295, 2.1145038, -0.5933421, 0.6906402],
    "plain": [1.9821667, 1.3264071, 1.4299554, 1.788345, 1.185886, 1.3165066, 1.7014469, 1.2812059, 1.1463631],
}
"""The first action of each sample: transformers 4.57.6 and timm 1.0.31 gave these, 5.23.0 and 1.0.20 the same."""


def drawn(variant: dict[str, Any]) -> CogVLA:
    language = {**MODEL["language"], **variant.get("language", {})}
    rest = {"head": variant.get("head", {}), "routing": variant.get("routing", {})}
    model = CogVLA(CogVLAConfig.from_dict({**MODEL, "language": language, **rest}), ROBOT).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * fan_in**-0.5 if parameter.ndim > 1 else 1 + 0.1 * noise)
    return model


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_numbers_do_not_depend_on_the_version(name: str) -> None:
    inputs = tiny_input()
    inputs.state.data = inputs.state.double()
    found = drawn(VARIANTS[name])(inputs).actions[:, 0].flatten().tolist()
    assert found == pytest.approx(FIRST_ACTIONS[name], abs=1e-6)


def test_every_variant_is_a_model_of_its_own() -> None:
    """Otherwise a key that a library ignores, such as `rope_theta`, would not be seen."""
    firsts = [tuple(FIRST_ACTIONS[name]) for name in VARIANTS]
    assert len(set(firsts)) == len(firsts)


def test_the_shipped_checkpoint_loads_and_acts() -> None:
    policy = load_policy(SHIPPED)
    actions = policy.act(policy.embodiment.fake_observation(2)).actions
    assert actions.shape == (2, policy.embodiment.chunk, policy.embodiment.action_dim)
    assert np.isfinite(actions).all()
