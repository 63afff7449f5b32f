"""Routers that remember: answers worked out by hand, and properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvla.routing.router import RouterContext, latest
from cogvla.routing.routers.adp import ADP
from cogvla.routing.routers.spec_prune import fine_motion, tiers
from cogvla.routing.routers.vla_iap import iou, levels, moving, named, patch_means, sobel
from cogvla.routing.routers.vla_pruner import filled, smoothed, spread
from cogvla.routing.selection import best, unit
from cogvla.tests.support.router_contexts import context_for, everything, router_of, sizes_for, tokens_of

NOBODY = torch.zeros(1, 4)


def chosen(name: str, tokens: Tensor, budget: int, **items: Any) -> list[int]:
    router = router_of(name, budget, (1, tokens.shape[1]))
    return router(tokens, RouterContext(budget, **items)).index_Bn[0].tolist()


# --- VLA-Pruner ---


def test_vla_pruner_takes_candidates_of_both_and_then_the_most_different() -> None:
    x = torch.zeros(1, 4, 12)
    x[0, :, :2] = torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [-1, 0]])
    assert spread(unit(x), torch.ones(1, 4, dtype=torch.bool), 3).tolist() == [[3, 0, 2]]
    guide, now = torch.tensor([[0.1, 0.2, 0.7, 0.0]]), torch.tensor([[0.6, 0.3, 0.0, 0.1]])
    items = {"text_attention_BN": now, "past_attention_BON": guide[:, None].expand(-1, 3, -1)}
    assert chosen("vla_pruner", x, 2, age_B=torch.tensor([3]), **items) == [0, 2], "3 is no candidate"
    assert chosen("vla_pruner", x, 2, age_B=torch.tensor([2]), **items) == [0, 1], "only the words, until it is old"


def test_vla_pruner_may_take_a_token_again_that_the_remembered_layer_never_saw() -> None:
    x = torch.zeros(1, 4, 12)
    x[0, :, :2] = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, 1]])
    now, past = torch.tensor([[0.1, 0.05, 0.3, 0.02]]), torch.tensor([[0.4, 0.2, 0.0, 0.0]])
    torch.testing.assert_close(filled(past[:, None], now), torch.tensor([[[0.4, 0.2, 1.2, 0.08]]]))
    torch.testing.assert_close(filled(torch.zeros(1, 3, 4), now), now[:, None].expand(-1, 3, -1))
    seen = torch.rand(1, 3, 4) + 0.1
    assert torch.equal(filled(seen, now), seen)
    items = {"text_attention_BN": now, "past_attention_BON": past[:, None].expand(-1, 3, -1)}
    assert chosen("vla_pruner", x, 2, age_B=torch.tensor([3]), **items) == [0, 2], "the best two of both"


def test_vla_pruner_weighs_the_newest_most() -> None:
    maps = torch.eye(3)[None]
    torch.testing.assert_close(smoothed(maps, 0.8), torch.tensor([[0.64, 0.8, 1.0]]) / 2.44)
    assert smoothed(maps, 0.8)[0].tolist() == pytest.approx([0.262, 0.328, 0.410], abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), budget=st.integers(1, 16))
def test_vla_pruner_keeps_candidates_only(seed: int, budget: int) -> None:
    items = everything(1, budget, seed=seed)
    router, x = router_of("vla_pruner", budget), tokens_of(1, seed=seed)
    kept = set(router(x, context_for(router, **{**items, "age_B": torch.tensor([3])})).index_Bn[0].tolist())
    maps = (smoothed(items["past_attention_BON"][:, -3:], 0.8), items["text_attention_BN"])
    assert kept <= {i for one in maps for i in best(one, budget)[0].tolist()}


# --- SpecPrune-VLA ---


def test_spec_prune_drops_what_did_not_change_except_for_what_got_attention() -> None:
    alike = torch.tensor([[1.0, 1.0, 0.99, 0.99, 0.5, 0.5]])
    static = torch.tensor([[True, True, True, True, False, False]])
    past, now = torch.eye(6)[1:2], torch.eye(6)[3:4]
    score = tiers(alike, static, (past + now) > 0, past, now)
    assert best(score, 4).tolist() == [[1, 3, 4, 5]]
    assert best(score, 5).tolist() == [[1, 2, 3, 4, 5]], "then the static one that is least alike"
    items = {"alike_BON": alike[:, None], "past_attention_BON": past[:, None], "text_attention_BN": now}
    items |= {"motion_BOC": torch.ones(1, 4, 3)}
    x = torch.zeros(1, 6, 12)
    assert chosen("spec_prune", x, 4, age_B=torch.tensor([1]), **items) == [1, 3, 4, 5]
    assert chosen("spec_prune", x, 1, age_B=torch.tensor([0]), **items) == [3], "nothing is remembered"


def test_spec_prune_keeps_no_token_for_attention_that_it_never_got() -> None:
    alike, past, now = torch.ones(1, 32), torch.zeros(1, 32), torch.linspace(0.001, 0.003, 32)[None]
    alike[0, 10], past[0, 20] = 0.5, 1.0
    items = {"alike_BON": alike[:, None], "past_attention_BON": past[:, None], "text_attention_BN": now}
    slowly = items | {"motion_BOC": torch.full((1, 4, 3), 0.01), "age_B": torch.tensor([4])}
    assert chosen("spec_prune", torch.zeros(1, 32, 12), 5, **slowly) == [10, 20, 29, 30, 31]


def test_fine_motion_begins_and_ends_at_different_speeds() -> None:
    fast, slow, height, down = [1.0, 1, 0], [0.1, 0, 0], [0.5, 0, 0.15], [0.5, 0, -0.3]

    def fine(*steps: list[float], age: int = 0) -> bool:
        return bool(fine_motion(torch.tensor([steps]), torch.tensor([age or len(steps)])))

    assert not fine(fast)
    assert fine(slow)
    assert fine(fast, slow, height), "it goes on until the hand rises faster"
    assert not fine(fast, height)
    rest = [0.0, 0, 0]
    assert fine(rest, rest, fast)
    assert not fine(rest, rest, fast, age=1), "what is before the episode is no rest"
    assert not fine(slow, down), "down counts, too"
    assert fine([1.0, 1, 0, 0, 0, 0], [0.05, 0, 0.05, 0, 0.1, 0])
    assert not fine([0.0] * 6, [0.0, 0, 0, 0.4, 0, 0])


# --- ADP ---


def test_adp_scores_by_the_words_query() -> None:
    match = torch.tensor([[0.707, 0.354, 0.707, -0.354]])
    assert chosen("adp", torch.zeros(1, 4, 12), 1, text_match_BN=match) == [0]


def gate_over(distances: list[float], **options: Any) -> list[int]:
    """The decisions of a gate, the first three included, where the hand goes these distances."""
    router, run, found = ADP(sizes_for(4), **options), 0, []
    for decision in range(len(distances) + 1):
        past = ([0.0] * 3 + distances[:decision])[-3:]
        motion = torch.tensor([[[d, 0.0, 0.0] for d in past]])
        prunes = bool(router.prunes(motion, torch.tensor([min(decision, 3)]), torch.tensor([run])))
        run = run + 1 if prunes else 0
        found.append(int(prunes))
    return found


def test_adp_removes_tokens_while_the_hand_is_fast() -> None:
    assert gate_over([1, 2, 3, 1, 2, 0.5]) == [0, 0, 0, 1, 0, 1, 0]
    assert gate_over([1.0] * 9) == [0, 0, 0, 1, 1, 1, 0, 1, 1, 1], "never more than three in a row"
    assert gate_over([1.0] * 9, longest=1)[3:] == [1, 0, 1, 0, 1, 0, 1]
    assert gate_over([1, 1, 2, 1, 1.2], gate="average") == [0, 0, 0, 1, 0, 0]
    assert not ADP(sizes_for(4), gate="none").gated


def test_adp_around_another_router_gives_it_what_it_remembers() -> None:
    options: dict[str, Any] = {"base": "vla_pruner", "base_options": {"decisions": 2}}
    router, base = router_of("adp", 4, **options), router_of("vla_pruner", 4, decisions=2)
    assert (router.remembers, router.needs, router.stages) == (3, base.needs, base.stages)
    x = tokens_of()
    items = {**everything(), "age_B": torch.tensor([3, 3, 2])}
    expected = base(x, context_for(base, **items)).index_Bn
    assert torch.equal(router(x, context_for(router, **items)).index_Bn, expected)
    with pytest.raises(ValueError, match="needs a base without a gate"):
        router_of("adp", 4, base="adp")
    with pytest.raises(ValueError, match="base_options, but no base"):
        router_of("adp", 4, base_options={"decisions": 2})


# --- VLA-IAP ---


def test_vla_iap_measures_edges_and_overlap() -> None:
    picture = torch.zeros(1, 4, 4)
    picture[..., 3] = 1
    torch.testing.assert_close(patch_means(sobel(picture), (2, 2)), torch.tensor([[0.0, 4.0, 0.0, 4.0]]))
    one, other = torch.tensor([[True, True, True, False]]), torch.tensor([[False, False, True, True]])
    assert iou(one, other).tolist() == [0.25]
    assert iou(one, ~one).tolist() == iou(~one & one, ~one & one).tolist() == [0]
    core = torch.tensor([[True, False, False, False]])
    assert levels(one, core, other, 0.05).tolist() == [[2, 1, 2, 2]], "the hand is near: the best and what moves"
    assert levels(one, core, other, 0.25).tolist() == [[1, 1, 1, 1]], "it is far: what is weak in both goes"
    assert levels(core, core, ~one, 0.05).tolist() == [[1, 0, 0, 1]]


def test_vla_iap_sees_what_moves() -> None:
    still = torch.rand(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert moving(still, (4, 4)).abs().max() < 1e-5
    flash = still.clone()
    flash[:, -1, 4:8, 8:12] += 1  # patch (1, 2)
    assert moving(flash, (4, 4)).argmax().item() == 6


def test_vla_iap_reads_real_words_only() -> None:
    x = torch.eye(4)[None] * 5
    words, mask = torch.stack([x[:, 2], x[:, 0]], dim=1), torch.tensor([[True, False]])
    assert named(x, words, mask).argmax().item() == 2
    torch.testing.assert_close(named(x, words, mask).sum(1), torch.ones(1))


# --- all of them ---


def test_latest_shortens_all_that_is_past() -> None:
    items = {**everything(), "age_B": torch.tensor([0, 1, 4])}
    context = RouterContext(**items)
    short = latest(context, 2)
    assert short.age_B is not None
    assert short.age_B.tolist() == [0, 1, 2]
    for name in ("history_BOND", "past_pixels_BO3HW", "alike_BON", "motion_BOC", "past_attention_BON", "past_seen_BON"):
        assert torch.equal(getattr(short, name), items[name][:, 2:]), name
    assert short.text_attention_BN is context.text_attention_BN


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vla_pruner", {"decisions": 0}, "decisions of at least 1"),
        ("vla_pruner", {"decay": 1.5}, "decay in"),
        ("spec_prune", {"alike": 0}, "a cosine"),
        ("adp", {"gate": "open"}, "gate of window, average, none"),
        ("adp", {"longest": 0}, "longest of at least 1"),
        ("vla_iap", {"edges": -1}, "edges of at least 0"),
        ("progressive_video", {"frames": 0}, "at least one earlier frame"),
    ],
)
def test_mistakes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_of(name, 4, **options)


@pytest.mark.parametrize("name", ["token_pooling", "channel_attention"])
def test_a_wrapper_has_the_gate_and_the_memory_of_its_base(name: str) -> None:
    router = router_of(name, 4, base="adp", base_options={"base": "spatial_pool"})
    assert (router.gated, router.remembers, router.selects) == (True, 3, False)
    motion_BOC = torch.tensor([[[1.0], [2.0], [3.0]], [[3.0], [2.0], [1.0]]]).expand(-1, -1, 3)
    assert router.prunes(motion_BOC, torch.tensor([3, 3]), torch.tensor([0, 0])).tolist() == [True, False]
    guided = router_of(name, 4, base="learned_pruner", base_options={"guide": 1.0, "guide_layer": 2})
    assert guided.guide_layer == 2


def test_wrappers_refuse_what_they_would_not_change() -> None:
    with pytest.raises(ValueError, match="by this moment alone, not 'adp'"):
        router_of("damro", 4, base="adp", base_options={"base": "token_norm"})
    with pytest.raises(ValueError, match="would pass the policy's own, which is not trained; set gate=none"):
        router_of("adp", 4, base="flex_count", base_options={"variant": "projector"})
    for name, base, item in (
        ("token_pooling", "progressive_video", "history_BOND"),
        ("channel_attention", "vla_pruner", "past_attention_BON"),
        ("channel_attention", "spec_prune", "alike_BON, past_attention_BON"),
    ):
        with pytest.raises(ValueError, match=f"'{base}' reads {item}, and nothing is remembered of refined tokens"):
            router_of(name, 4, base=base)
