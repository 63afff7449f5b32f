"""Layers in 4 bits: bitsandbytes' own answers, gradients, what is kept for them, and the engine on a trained policy."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.engine.nf4 import Nf4Linear, nf4_bytes
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import SHIPPED

LEVELS = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip
"""NF4, appendix E of the QLoRA paper."""


@pytest.fixture(autouse=True)
def _bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason=needs("nf4"))


def linear(inputs: int = 128, outputs: int = 96) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def nearest(weight_OI: Tensor) -> Tensor:
    """The weights that blocks of 64 with their largest value and the nearest level stand for."""
    blocks = weight_OI.detach().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (LEVELS[(blocks / scale)[..., None].sub(LEVELS).abs().argmin(-1)] * scale).reshape(weight_OI.shape)


def test_the_weights_are_the_nearest_levels() -> None:
    layer = linear()
    four = Nf4Linear(layer.weight, layer.bias)
    expected, found = nearest(layer.weight), four.weight
    assert (found - expected).abs().max() < 0.02 * expected.abs().max(), "but for the 8 bits of the scales"
    assert (found - layer.weight).abs().mean() > 0.01 * layer.weight.abs().mean()
    assert four.packed.dtype == torch.uint8
    assert four.packed.numel() == layer.weight.numel() // 2


def test_it_computes_with_these_weights_and_has_their_gradients() -> None:
    layer = linear()
    four = Nf4Linear(layer.weight, layer.bias)
    x, same = (torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    y, expected = four(x), F.linear(same, four.weight, layer.bias)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    assert four.packed.grad is None


def test_nothing_is_kept_for_the_backward_pass() -> None:
    layer = linear()
    four = Nf4Linear(layer.weight, None)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        four(torch.randn(2, 128, requires_grad=True))
    assert not kept


def test_its_size_is_the_counted_one() -> None:
    layer = linear(512, 512)
    four = Nf4Linear(layer.weight, None)
    state: Any = four._state
    stored = [four.packed, state.absmax, state.state2.absmax]
    assert sum(t.numel() * t.element_size() for t in stored) == pytest.approx(nf4_bytes(512 * 512), rel=0.01)
    assert nf4_bytes(512 * 512) / (512 * 512) * 8 == pytest.approx(4.127, abs=1e-3), "bits of a weight, as in the paper"


def test_copies_and_other_precisions() -> None:
    layer = linear()
    four = Nf4Linear(layer.weight, layer.bias)
    x = torch.randn(2, 128)
    torch.testing.assert_close(copy.deepcopy(four)(x), four(x))
    four.answer_in(torch.bfloat16)
    assert four.weight.dtype == torch.bfloat16
    assert four(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(four(x.bfloat16()).float(), four(x), atol=0.02, rtol=0.02)


def test_a_trained_policy_in_four_bits() -> None:
    plain = load_policy(SHIPPED)
    observation = plain.embodiment.fake_observation(2)
    expected = plain.act(observation).actions
    four = load_policy(SHIPPED).with_engine(EngineConfig(dtype="nf4", smallest=64), release=True)
    four.warm_up(2)
    assert (four.describe()["dtype"], four.describe()["engine"]) == ("nf4", "eager")
    actions = four.act(observation).actions
    change = np.abs(actions - expected).mean() / np.abs(expected).mean()
    assert 0 < change < 0.5, "it is another network, but not any"
    layers = [module for module in four.engine.network.modules() if isinstance(module, Nf4Linear)]  # type: ignore[union-attr]
    assert len(layers) > 10


@pytest.mark.parametrize("kind", ["trace", "cuda_graph", "compile", "plain"])
def test_other_kinds_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"engine\.(dtype=nf4 needs engine\.kind=eager|kind=plain runs)"):
        EngineConfig(kind, dtype="nf4")


def test_without_bitsandbytes_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"] + ["bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r'weights in 4 bits need bitsandbytes .*`uv pip install "cogvla\[nf4\]"`'):
        Nf4Linear(linear().weight, None)
