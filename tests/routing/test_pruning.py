from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.routing.layout import TokenLayout
from cogvla.routing.pruning import FiLMRouter, context_weights, put_rows, take_rows

WIDTH = 8


def choose(
    vision: int, count: int, batch: int = 3, seed: int = 0, score_all: bool = False
) -> tuple[torch.Tensor, TokenLayout, FiLMRouter]:
    torch.manual_seed(seed)
    layout = TokenLayout(vision=vision, text=4, action=2)
    return torch.randn(batch, layout.length, WIDTH), layout, FiLMRouter(WIDTH, score_all)


def whole_context(layout: TokenLayout, batch: int) -> torch.Tensor:
    valid = layout.valid(torch.ones(batch, layout.text, dtype=torch.bool))
    return context_weights(layout, valid, torch.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.data())
def test_kept_tokens_are_exactly_the_best_in_their_order(vision: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, vision))
    h, layout, router = choose(vision, count, seed=data.draw(st.integers(0, 99)))
    chosen = router(h, layout, whole_context(layout, 3), count)
    assert chosen.layout == layout.with_vision(count)
    assert chosen.kept_Bn.shape == (3, count)
    text = h[:, layout.context].mean(1, keepdim=True)
    p = router.logits(h[:, layout.visual] * (1 + router.scale(text)) + router.shift(text)).softmax(-1)[..., 1]
    for row, kept in enumerate(chosen.kept_Bn):
        assert (kept.diff() > 0).all()
        assert set(kept.tolist()) == set(p[row].argsort(descending=True)[:count].tolist())
    torch.testing.assert_close(
        chosen.factor_BS1[:, chosen.layout.visual, 0], p.gather(1, chosen.kept_Bn), rtol=1e-5, atol=1e-6
    )
    assert (chosen.factor_BS1[:, chosen.layout.rest] == 1).all()


@pytest.mark.parametrize("score_all", [False, True])
def test_hidden_tokens_are_chosen_last_and_count_for_nothing(score_all: bool) -> None:
    h, layout, router = choose(vision=6, count=3, score_all=score_all)
    seen = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 0], [0] * 6], dtype=torch.bool)
    chosen = router(h, layout, whole_context(layout, 3), 3, seen)
    assert seen.gather(1, chosen.kept_Bn).sum(1).tolist() == [3, 2, 0]
    assert chosen.factor_BS1.isfinite().all()
    assert ((chosen.factor_BS1[:, chosen.layout.visual, 0] > 0) == seen.gather(1, chosen.kept_Bn)).all()
    chosen.factor_BS1.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


def test_everything_that_is_not_vision_stays() -> None:
    h, layout, router = choose(vision=6, count=2)
    chosen = router(h, layout, whole_context(layout, 3), 2)
    kept = take_rows(h, chosen.rows)
    assert torch.equal(kept[:, 0], h[:, 0])
    assert torch.equal(kept[:, chosen.layout.rest], h[:, layout.rest])
    for row in range(3):
        assert torch.equal(kept[row, chosen.layout.visual], h[row, layout.visual][chosen.kept_Bn[row]])


def test_put_rows_changes_only_those_rows() -> None:
    h, layout, router = choose(vision=6, count=2)
    chosen = router(h, layout, whole_context(layout, 3), 2)
    back = put_rows(h, chosen.rows, take_rows(h, chosen.rows) + 1)
    touched = torch.zeros(h.shape[:2], dtype=torch.bool).flatten()
    touched[chosen.rows] = True
    touched = touched.view(h.shape[:2])
    assert torch.equal(back[~touched], h[~touched])
    torch.testing.assert_close(back[touched], h[touched] + 1)
    assert (~touched).sum() == 3 * 4


def test_padding_does_not_reach_the_summary() -> None:
    h, layout, router = choose(vision=6, count=3, batch=1)
    mask = torch.tensor([[True, True, False, False]])
    before = router(h, layout, context_weights(layout, layout.valid(mask), torch.float32), 3)
    h[:, layout.words.start + 2 : layout.words.stop] = 100.0
    after = router(h, layout, context_weights(layout, layout.valid(mask), torch.float32), 3)
    assert torch.equal(before.kept_Bn, after.kept_Bn)
    assert torch.equal(before.factor_BS1, after.factor_BS1)


def test_all_tokens_can_have_a_probability() -> None:
    h, layout, router = choose(vision=6, count=3, score_all=True)
    factor = router(h, layout, whole_context(layout, 3), 3).factor_BS1
    expected = router.logits(h).softmax(-1)[..., 1:]
    torch.testing.assert_close(factor[:, -3:], expected[:, -3:])
    torch.testing.assert_close(factor[:, :1], expected[:, :1])


@pytest.mark.parametrize("count", [1, 6])
def test_gradient_reaches_every_parameter(count: int) -> None:
    h, layout, router = choose(vision=6, count=count)
    router(h, layout, whole_context(layout, 3), count).factor_BS1[:, 1 : 1 + count].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())
