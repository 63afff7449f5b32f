from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvla.routing.layout import TokenLayout

LAYOUTS = st.builds(TokenLayout, vision=st.integers(1, 20), text=st.integers(0, 9), action=st.integers(1, 9))


@given(LAYOUTS)
def test_segments_cover_the_sequence_once_and_in_order(layout: TokenLayout) -> None:
    segments = (layout.bos, layout.visual, layout.state, layout.words, layout.actions, layout.stop)
    covered = [i for segment in segments for i in range(segment.start, segment.stop)]
    assert covered == list(range(layout.length))
    assert layout.length == 1 + layout.vision + 1 + layout.text + layout.action + 1
    assert (layout.context.start, layout.context.stop) == (layout.state.start, layout.words.stop)
    assert (layout.answer.start, layout.answer.stop) == (layout.actions.start, layout.length)
    assert (layout.rest.start, layout.rest.stop) == (layout.visual.stop, layout.length)


def test_positions_skip_padding() -> None:
    layout = TokenLayout(vision=2, text=3, action=2)
    valid = layout.valid(torch.tensor([[True, True, True], [True, False, False]]))
    positions = layout.positions(valid)
    assert positions[0].tolist() == list(range(layout.length))
    real = positions[1][valid[1]]
    assert real.tolist() == list(range(layout.length - 2))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="action tokens"):
        TokenLayout(vision=-1, text=1, action=1)
    with pytest.raises(ValueError, match="text mask has 2"):
        TokenLayout(vision=1, text=3, action=1).valid(torch.ones(1, 2, dtype=torch.bool))
