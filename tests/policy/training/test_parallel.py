"""Parts of a batch side by side have the gradient of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cogvla import processes
from cogvla.policy.threads import use_threads
from cogvla.policy.training.parallel import ParallelGradients, keep_freed_memory
from cogvla.tests.support.parallel_objective import FirstOnly, MeanSquare


@pytest.fixture
def parallel() -> Iterator[Callable[[nn.Module, int], ParallelGradients]]:
    """Builds objectives in processes, and ends those after the test."""
    made: list[ParallelGradients] = []

    def build(module: nn.Module, parts: int) -> ParallelGradients:
        made.append(ParallelGradients(MeanSquare(module), parts))
        return made[-1]

    yield build
    for one in made:
        one.close()


def test_parts_equal_the_whole_at_every_step(parallel: Callable[..., ParallelGradients]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    objective, parts = MeanSquare(model), parallel(model, 3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        batch = torch.randn(9, 5)
        expected = torch.autograd.grad(objective(batch)["loss"], list(model.parameters()))
        parts.give(batch.chunk(3))
        losses = parts()
        torch.testing.assert_close(losses["loss"], objective(batch)["loss"].detach())
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        optimiser.step()
        optimiser.zero_grad()


def test_gradients_accumulate_with_a_scale(parallel: Callable[..., ParallelGradients]) -> None:
    model = nn.Linear(2, 1)
    two, parts = parallel(model, 2), torch.randn(4, 2).chunk(2)
    two.give(parts)
    two(meanwhile=lambda: two.give(parts))
    assert model.weight.grad is not None
    once = model.weight.grad.clone()
    two(0.5)
    torch.testing.assert_close(model.weight.grad, 1.5 * once)


def test_the_next_parts_meet_the_weights_of_the_next_step(parallel: Callable[..., ParallelGradients]) -> None:
    torch.manual_seed(0)
    model, batches = nn.Linear(2, 1), torch.randn(3, 4, 2)
    two, objective = parallel(model, 2), MeanSquare(model)
    two.give(batches[0].chunk(2))
    for step, batch in enumerate(batches):
        expected = objective(batch)["loss"].detach()
        following = batches[(step + 1) % 3].chunk(2)
        torch.testing.assert_close(two(meanwhile=partial(two.give, following))["loss"], expected)
        with torch.no_grad():
            model.weight += 1


def test_what_is_given_last_counts_and_once(parallel: Callable[..., ParallelGradients]) -> None:
    model = nn.Linear(2, 1)
    two, batch = parallel(model, 2), torch.randn(4, 2)
    two.give(torch.randn(4, 2).chunk(2))
    two.give(batch.chunk(2))
    torch.testing.assert_close(two()["loss"], MeanSquare(model)(batch)["loss"].detach())
    with pytest.raises(RuntimeError, match="give the parts first"):
        two()


def test_unused_and_frozen_parameters_get_none(parallel: Callable[..., ParallelGradients]) -> None:
    model = FirstOnly()
    two = parallel(model, 2)
    two.give(torch.randn(4, 2).chunk(2))
    two()
    assert model.used.weight.grad is not None
    assert model.unused.weight.grad is None
    assert model.frozen.weight.grad is None


@pytest.mark.parametrize(("bad", "said"), [(float("inf"), "this part is infinite"), (float("nan"), "is gone")])
def test_a_process_that_fails_is_reported_and_replaced(
    parallel: Callable[..., ParallelGradients], bad: float, said: str
) -> None:
    two, good = parallel(nn.Linear(2, 1), 2), torch.randn(2, 2)
    two.give([torch.full((2, 2), bad), good])
    with pytest.raises(RuntimeError, match=said):
        two()
    two.give([good, good])
    assert two()["loss"] > 0


def test_what_a_step_draws_depends_on_its_seed_only(parallel: Callable[..., ParallelGradients]) -> None:
    """So a resumed run, whose processes are new, drops what an uninterrupted one does."""

    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.Dropout(0.5))

    def step(three: ParallelGradients, seed: int) -> Tensor:
        model.zero_grad()
        torch.manual_seed(seed)
        three.give(torch.ones(6, 64).chunk(3))
        three()
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    first, resumed = parallel(model, 3), parallel(model, 3)
    step(first, 1)
    assert torch.equal(step(first, 2), step(resumed, 2))


def test_nothing_is_left_running(parallel: Callable[..., ParallelGradients], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE_S", 300)  # a process that has to be killed ends with another status
    two = parallel(nn.Linear(2, 1), 2)
    two.give(torch.randn(4, 2).chunk(2))
    two()
    (other,) = two.others
    two.close()
    assert other.child.process.returncode == 0


def test_kept_memory_changes_no_result() -> None:
    keep_freed_memory()
    assert torch.ones(3_000_000).sum() == 3_000_000


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four cores, and as many threads of torch."""
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr("cogvla.policy.threads._lowered", None)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_what_comes_later_has_all_threads_again(four_threads: None, parallel: Callable[..., ParallelGradients]) -> None:
    """Rounds train, evaluate and collect by turns in one process."""
    found = []
    for beside in (3, 1, 0):
        use_threads(None, beside)
        found.append(torch.get_num_threads())
    assert found == [1, 3, 4]
    two = parallel(nn.Linear(2, 1), 2)
    for _ in range(2):  # it may be closed, and given more
        two.give(torch.randn(4, 2).chunk(2))
        two()
        assert torch.get_num_threads() == 1
        two.close()
        assert torch.get_num_threads() == 4
    use_threads(2)
    use_threads(None)
    assert torch.get_num_threads() == 2, "what was given stays"


@pytest.mark.parametrize(("wanted", "beside", "threads"), [(None, 0, 4), (None, 3, 1), (None, 1, 3), (2, 3, 2)])
def test_processes_beside_keep_their_cores(four_threads: None, wanted: int | None, beside: int, threads: int) -> None:
    use_threads(wanted, beside)
    assert torch.get_num_threads() == threads
