"""READ, IMA and the statistics of vision tokens as words: known answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cogvla.envs.analysis.representations import alignment, codes, cosines, overlap, points, read, word_statistics
from cogvla.envs.analysis.routing_recording import look
from cogvla.tests.envs.analysis.test_router_comparison import EMBODIMENT, PLAIN, point_policy


def test_points_are_the_ends_of_the_range() -> None:
    vision = torch.tensor([[0.0], [10.0], [8.0], [7.9], [2.0], [2.1]])
    high, low = points(torch.tensor([[2.0], [0.0]]), vision)
    assert (high.tolist(), low.tolist()) == ([1, 2], [0, 4])
    many = torch.arange(1000.0)[:, None]
    high, low = points(torch.ones(1, 1), many)
    assert high.tolist() == list(range(999, 969, -1))
    assert low.tolist() == list(range(30))
    high, low = points(torch.ones(1, 1), torch.ones(5, 1))
    assert len(high) == 0, "all alike: none stands out"


def test_cosines_and_overlap() -> None:
    found = cosines(torch.tensor([[2.0, 0], [0, 3]]), torch.tensor([[1.0, 0], [5, 0]]))
    assert found == pytest.approx({"between": 0.5, "vision": 0.0, "words": 1.0})
    assert cosines(torch.eye(3), torch.tensor([[2.0, 0, 0]])) == pytest.approx(
        {"between": 1 / 3, "vision": 0.0, "words": None}
    )
    vision, words = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[1, 0, 1, 0]])
    assert overlap(vision, words) == pytest.approx(1 / (1 + 0.5 + 1))
    assert overlap(vision, vision) == 1


def test_codes_find_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    member = torch.randint(4, (200,), generator=generator)
    x = 10 * torch.eye(4)[member] + 0.1 * torch.randn(200, 4, generator=generator)
    for seed in range(3):
        found = codes(x, 8, seed)
        for code in found.unique():
            assert len(member[found == code].unique()) == 1
    assert torch.equal(codes(x, 8), codes(x, 8))


def test_words_of_a_known_law() -> None:
    frequent = np.round(5000 / np.arange(1, 21) ** 1.2).astype(int)
    sequence = torch.from_numpy(np.repeat(np.arange(20), frequent))
    ordered = word_statistics(sequence)
    assert ordered["zipf"] == pytest.approx(1.2, abs=0.01)
    assert ordered["fit"] == pytest.approx(1, abs=1e-3)
    assert ordered["compression"] < 0.1, "runs of one word"
    shuffled = word_statistics(sequence[torch.randperm(len(sequence), generator=torch.Generator().manual_seed(1))])
    assert shuffled["compression"] == pytest.approx(1, abs=0.02)
    assert shuffled["entropy"] == pytest.approx(ordered["entropy"])
    even = word_statistics(torch.arange(16).repeat(8))
    assert (even["entropy"], even["largest"], even["zipf"]) == pytest.approx((4, 4, 0), abs=1e-6)
    single = word_statistics(torch.zeros(9, dtype=torch.long))
    assert (single["entropy"], single["used"], single["zipf"]) == (0, 1, None)


def test_a_moment_gives_words_and_action_tokens_whatever_is_left_of_the_vision_tokens() -> None:
    policy: Any = point_policy(**PLAIN)
    whole = look(policy, EMBODIMENT.fake_observation(1))
    words = policy.preprocessor.text([whole.instruction])[1].sum()
    assert {len(states) for states in whole.words.values()} == {int(words)}
    assert {len(states) for states in whole.acting.values()} == {policy.model.action_tokens}
    found = alignment(policy.model, [whole])
    assert found["layer 0"]["overlap"] is None
    assert 0 < (found["layer 1"]["overlap"] or 0) <= 1
    assert (found["layer 1"]["change"] or 0) > 0
    marked = torch.zeros(whole.looks_NP.shape[1], dtype=torch.bool)
    high, _ = points(whole.acting[1], whole.hidden[1])
    marked[whole.after[1][high]] = True
    shares = read([replace(whole, target_P=marked)])["layer 1"]
    assert shares["high"] == 1
    assert shares["low"] == 0
    assert shares["all"] == pytest.approx(len(high) / len(marked))
    assert not math.isnan(shares["all"] or 0)
    dropped = look(point_policy(mode="drop"), EMBODIMENT.fake_observation(1))
    assert len(dropped.hidden[1]) < len(dropped.tokens_ND)
    assert len(dropped.words[1]) == int(words)
