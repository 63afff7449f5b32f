"""Known answers of the numbers that `analyse_routing` reports."""

from __future__ import annotations

import math

import pytest
import torch

from cogvla.routing.diagnostics import (
    ALIVE,
    DEAD,
    SINK,
    attention_entropy,
    flicker,
    information,
    information_horizon,
    kept_share,
    nearest,
    token_kinds,
)


def test_entropy_of_uniform_and_of_one_token() -> None:
    attention_QN = torch.stack([torch.full((8,), 3.0), torch.eye(8)[2], torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])])
    torch.testing.assert_close(attention_entropy(attention_QN), torch.tensor([math.log(8), 0.0, math.log(2)]))


def test_flicker_is_the_jaccard_distance_of_neighbours() -> None:
    assert flicker([[0, 1], [1, 0], [1, 2], [5, 6], []]) == pytest.approx([0.0, 2 / 3, 1.0, 1.0])
    assert flicker([[], []]) == [0.0]
    assert flicker([[1]]) == []


def test_share_of_marked_patches_kept() -> None:
    marked_P = torch.tensor([True, True, True, True, False, False])
    kept_N = torch.tensor([True, False, False, False, True, True])
    assert kept_share(kept_N, torch.eye(6), marked_P) == pytest.approx(0.25)
    assert kept_share(kept_N, torch.eye(6), torch.zeros(6, dtype=torch.bool)) is None
    # two tokens that look: the kept one sees 0.6 of what is seen of the object
    looks_NP = torch.tensor([[0.3, 0.7, 0.0], [0.2, 0.0, 0.8]])
    share = kept_share(torch.tensor([True, False]), looks_NP, torch.tensor([True, False, False]))
    assert share == pytest.approx(0.6)


def test_kinds_of_tokens() -> None:
    """Token 0 is the same everywhere and looked at, token 1 the same and not looked at, token 2 differs."""
    generator = torch.Generator().manual_seed(0)
    tokens_FND = torch.randn(4, 3, 32, generator=generator)
    tokens_FND[:, :2] = tokens_FND[:1, :2] * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None, None]
    attention_FN = torch.tensor([0.8, 0.1, 0.1]).expand(4, 3)
    kinds_FN = token_kinds(tokens_FND, attention_FN, torch.arange(4))
    assert kinds_FN is not None
    assert kinds_FN.tolist() == [[SINK, DEAD, ALIVE]] * 4


def test_tokens_repeated_within_a_scene_are_alive() -> None:
    tokens_FND = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=0)
    attention_FN = torch.ones(4, 5)
    kinds_FN = token_kinds(tokens_FND, attention_FN, torch.tensor([0, 0, 1, 1]))
    assert kinds_FN is not None
    assert (kinds_FN == ALIVE).all()
    assert token_kinds(tokens_FND, attention_FN, torch.zeros(4)) is None


def test_nearest_words_by_direction() -> None:
    bank_WD = torch.eye(4)
    index_Nn, cosine_Nn = nearest(torch.tensor([[0.0, 5.0, 1.0, 0.0]]), bank_WD, 2)
    assert index_Nn.tolist() == [[1, 2]]
    torch.testing.assert_close(cosine_Nn, torch.tensor([[5.0, 1.0]]) / math.sqrt(26))
    assert nearest(torch.ones(1, 4), bank_WD, 9)[0].shape == (1, 4)


def test_information_falls_to_nothing_at_the_horizon() -> None:
    found_L = information(torch.tensor([math.log(2), 0.2, 0.001, 0.0]))
    torch.testing.assert_close(found_L, torch.tensor([0.5, 1 - math.exp(-0.2), 1 - math.exp(-0.001), 0.0]))
    assert information_horizon(found_L) == 2
    assert information_horizon(torch.tensor([0.5, 0.0, 0.4])) == 3, "what comes back was not gone"
    assert information_horizon(torch.zeros(3)) == 0
