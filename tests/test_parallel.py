"""Parts of a batch side by side have the gradient of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cogvla.policy.parallel import ParallelGradients, use_threads


def _losses(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": model(batch).square().mean()}


def test_two_parts_equal_the_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    batch = torch.randn(8, 5)
    _losses(model, batch)["loss"].backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = ParallelGradients(lambda x: _losses(model, x), list(model.parameters()), 2)(batch.chunk(2))
    torch.testing.assert_close(losses["loss"], _losses(model, batch)["loss"].detach())
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_gradients_accumulate_with_a_scale() -> None:
    model = nn.Linear(2, 1)
    parallel = ParallelGradients(lambda x: _losses(model, x), list(model.parameters()), 2)
    parts = torch.randn(4, 2).chunk(2)
    parallel(parts)
    once = model.weight.grad.clone()
    parallel(parts, 0.5)
    torch.testing.assert_close(model.weight.grad, 1.5 * once)


def test_unused_and_frozen_parameters_get_none() -> None:
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(1, 1)])
    model[2].requires_grad_(False)
    ParallelGradients(lambda x: _losses(model[0], x), list(model.parameters()), 2)(torch.randn(4, 2).chunk(2))
    assert model[0].weight.grad is not None
    assert model[1].weight.grad is None
    assert model[2].weight.grad is None


@pytest.mark.parametrize(("wanted", "beside", "threads"), [(None, 0, 4), (None, 3, 1), (None, 1, 3), (2, 3, 2)])
def test_processes_beside_keep_their_cores(
    monkeypatch: pytest.MonkeyPatch, wanted: int | None, beside: int, threads: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    torch.set_num_threads(4)
    try:
        use_threads(wanted, beside)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
