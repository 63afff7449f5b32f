from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvla.routing.attention import ATTENTION, additive, attention_mask
from cogvla.routing.layout import TokenLayout

LAYOUTS = st.builds(TokenLayout, vision=st.integers(2, 8), text=st.integers(1, 6), action=st.integers(1, 6))


def valid_of(layout: TokenLayout, words: int) -> torch.Tensor:
    return layout.valid(torch.arange(layout.text)[None] < words)


@given(LAYOUTS, st.integers(1, 6))
def test_coupled_is_causal_with_a_bidirectional_answer(layout: TokenLayout, words: int) -> None:
    valid = valid_of(layout, words)
    mask = attention_mask(layout, valid, "coupled")[0, 0]
    for row in range(layout.length):
        for column in range(layout.length):
            both_answer = row >= layout.answer.start and column >= layout.answer.start
            expected = (column <= row or both_answer) and bool(valid[0, column])
            assert bool(mask[row, column]) == expected, (row, column)


@given(LAYOUTS, st.sampled_from(ATTENTION), st.integers(1, 6))
def test_padding_is_never_attended_and_no_row_is_empty(layout: TokenLayout, kind: str, words: int) -> None:
    valid = valid_of(layout, words)
    mask = attention_mask(layout, valid, kind)[0, 0]
    assert not mask[:, ~valid[0]].any()
    assert mask.any(dim=1).all()


def test_ablations() -> None:
    layout = TokenLayout(vision=3, text=1, action=2)
    valid = valid_of(layout, 1)
    assert torch.equal(
        attention_mask(layout, valid, "causal")[0, 0], torch.ones(layout.length, layout.length).tril().bool()
    )
    assert attention_mask(layout, valid, "bidirectional").all()
    with pytest.raises(ValueError, match="coupled, causal, bidirectional"):
        attention_mask(layout, valid, "full")


@given(LAYOUTS, st.sampled_from(ATTENTION), st.integers(1, 6), st.integers(1, 8))
def test_a_pruned_mask_is_the_full_one_without_its_first_rows(
    layout: TokenLayout, kind: str, words: int, count: int
) -> None:
    count = min(count, layout.vision)
    pruned = layout.with_vision(count)
    expected = attention_mask(pruned, valid_of(pruned, words), kind)
    fewer = layout.vision - count
    assert torch.equal(attention_mask(layout, valid_of(layout, words), kind)[..., fewer:, fewer:], expected)


def test_additive_form() -> None:
    assert additive(torch.tensor([True, False]), torch.float32).tolist() == [0.0, float("-inf")]
