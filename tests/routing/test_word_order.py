"""The summary of the instruction knows the order of the words, and adds nothing before training."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.routing.word_order import WordOrder, positions


def trained(width: int, seed: int = 0) -> WordOrder:
    torch.manual_seed(seed)
    layer = WordOrder(width)
    torch.nn.init.normal_(layer.up.weight, std=width**-0.5)
    return layer


def test_it_adds_nothing_before_training() -> None:
    words_BTD = torch.randn(3, 7, 64)
    assert not WordOrder(64)(words_BTD, torch.ones(3, 7, dtype=torch.bool)).any()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 5), st.sampled_from([48, 64, 320]))
def test_order_matters_and_padding_does_not(order: list[int], padding: int, width: int) -> None:
    layer, words_TD = trained(width), torch.randn(6, width, generator=torch.Generator().manual_seed(1))
    padded_TD = torch.cat([words_TD, 100 * torch.ones(padding, width)])
    mask_T = torch.arange(6 + padding) < 6
    plain, again = layer(words_TD[None], mask_T[None, :6]), layer(padded_TD[None], mask_T[None])
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    other = layer(words_TD[order][None], mask_T[None, :6])
    assert torch.equal(other, plain) == (order == list(range(6)))


def test_positions_differ() -> None:
    for width in (5, 64):
        code_TE = positions(torch.zeros(1, 50, width))
        distance_TT = torch.cdist(code_TE, code_TE) + torch.eye(50)
        assert distance_TT.min() > 0.1
