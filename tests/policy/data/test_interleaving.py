"""The turns of the data sets of a mixture: exact shares at every position, found without counting from the start."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from cogvla.policy.data.mixture.interleaving import Interleaving

LENGTH = 3000


def shares_of(seed: int, size: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.choice([1.0, 1.0, 2.0, 0.01, draw.random(), 100 * draw.random()]) for _ in range(size)]


def counted(turns: Interleaving, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """The data set of each position, and how often each was drawn until then, itself included."""
    set_P, _ = turns.turns(torch.arange(length))
    return set_P, torch.nn.functional.one_hot(set_P, turns.size).cumsum(0)


@pytest.mark.parametrize(("size", "most"), [(1, 0.001), (2, 0.501), (3, 1.001), (4, 2), (5, 2), (8, 2)])
@pytest.mark.parametrize("seed", range(8))
def test_every_data_set_is_at_its_share_at_every_position(size: int, most: float, seed: int) -> None:
    shares = torch.tensor(shares_of(seed, size), dtype=torch.float64)
    _, drawn_PS = counted(Interleaving(shares.tolist()))
    wanted_PS = torch.arange(1, LENGTH + 1)[:, None] * shares / shares.sum()
    assert (drawn_PS - wanted_PS).abs().max() <= most


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_sample_of_a_data_set_is_left_out_or_drawn_twice(size: int) -> None:
    turns = Interleaving(shares_of(size, size))
    set_P, drawn_PS = counted(turns)
    _, index_P = turns.turns(torch.arange(LENGTH))
    assert torch.equal(index_P, drawn_PS[torch.arange(LENGTH), set_P] - 1)


@pytest.mark.parametrize("start", [0, 1, 777, 10**9])
def test_a_position_alone_is_the_position_among_others(start: int) -> None:
    turns = Interleaving([3, 1, 2.5])
    set_P, index_P = turns.turns(torch.arange(start, start + 50))
    for offset in (0, 17, 49):
        one = turns.turns(torch.tensor([start + offset]))
        assert [int(x) for x in one] == [int(set_P[offset]), int(index_P[offset])]


def test_counts_are_those_of_the_turns() -> None:
    turns = Interleaving([3, 1, 2.5, 0.2])
    _, drawn_PS = counted(turns)
    assert turns.counts(0) == [0, 0, 0, 0]
    for length in (1, 2, 100, LENGTH):
        assert turns.counts(length) == drawn_PS[length - 1].tolist()


def test_equal_data_sets_take_turns() -> None:
    set_P, _ = Interleaving([5, 5, 5, 5]).turns(torch.arange(40))
    assert all(sorted(set_P[start : start + 4].tolist()) == [0, 1, 2, 3] for start in range(0, 40, 4))
