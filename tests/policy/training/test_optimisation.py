"""Learning rate, weight decay and averaged weights, by known answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cogvla.policy.training.optimisation import ExponentialAverage, adamw, warmup_cosine


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.5 * (1 + 0.02)), (110, 0.02), (1000, 0.02)],
)
def test_warm_up_and_cosine(step: int, expected: float) -> None:
    assert warmup_cosine(step, 10, 110, floor=0.02) == pytest.approx(expected)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    assert warmup_cosine(0, 0, 100) == 1


def test_the_rate_never_rises_after_the_warm_up() -> None:
    rates = [warmup_cosine(step, 5, 50) for step in range(5, 60)]
    assert rates == sorted(rates, reverse=True)


def test_only_matrices_decay() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    module[0].weight.data.fill_(1.0)
    module[1].weight.data.fill_(1.0)
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    module.register_parameter("frozen", frozen)
    optimiser = adamw(module, learning_rate=0.1, weight_decay=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    assert module[0].weight.flatten().tolist() == pytest.approx([0.95] * 4)
    assert module[1].weight.tolist() == [1.0, 1.0]
    assert frozen.eq(1).all()


def test_the_average_follows_its_definition() -> None:
    parameter = torch.tensor([0.0])
    average = ExponentialAverage({"w": parameter}, decay=0.9)
    expected = 0.0
    for step in range(1, 200):
        parameter.fill_(float(step))
        average.update({"w": parameter}, step)
        decay = min(0.9, step / (step + 10))
        expected = decay * expected + (1 - decay) * step
    assert average.average["w"].item() == pytest.approx(expected, rel=1e-5)
    assert average.average["w"].item() == pytest.approx(199 - 9, rel=1e-3)  # lags decay/(1-decay) steps behind


def test_without_decay_the_average_is_the_present() -> None:
    parameter = torch.tensor([0.0])
    average = ExponentialAverage({"w": parameter}, decay=0.0)
    parameter.fill_(3.0)
    average.update({"w": parameter}, 1)
    assert average.average["w"].item() == 3


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_bad_decays(decay: float) -> None:
    with pytest.raises(ValueError, match=r"EMA decay must be in \[0,1\)"):
        ExponentialAverage({}, decay)
