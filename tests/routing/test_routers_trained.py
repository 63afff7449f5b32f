"""The routers that are trained, and the search for a schedule: they learn what can be learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cogvla.routing.registry import build_router
from cogvla.routing.router import RouterConfig, RouterContext, RouterSizes, count_of
from cogvla.routing.schedule_search import Schedule, expected_improvement, search
from cogvla.tests.support.extras import needs
from cogvla.tests.support.router_contexts import WIDTH, context_for, router_of, tokens_of


def matching(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of which four resemble the one word, that word, and which ones [B,16]."""
    generator = torch.Generator().manual_seed(seed)
    word = torch.randn(batch, 1, WIDTH, generator=generator)
    chosen = torch.rand(batch, 16, generator=generator).argsort(1) < 4
    x = torch.randn(batch, 16, WIDTH, generator=generator)
    return torch.where(chosen[..., None], word + 0.3 * x, x), word, chosen


def test_the_learned_pruner_finds_the_tokens_that_the_word_asks_for() -> None:
    torch.manual_seed(0)
    router = build_router("learned_pruner", RouterSizes(16, WIDTH, WIDTH, None, 4), {"guide": 1.0, "hidden": 32})
    optimiser = torch.optim.Adam(router.parameters(), 1e-2)
    mask = torch.ones(32, 1, dtype=torch.bool)
    for step in range(120):
        x, word, chosen = matching(32, step)
        target = chosen.float()[None]
        context = RouterContext(4, training=True, text_BTE=word, text_mask_BT=mask, attention_LBN=target)
        loss = torch.stack(list(router(x, context).losses.values())).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, word, chosen = matching(32, 10_000)
    context = RouterContext(4, text_BTE=word, text_mask_BT=mask, attention_LBN=chosen.float()[None])
    recall = chosen.gather(1, router.eval()(x, context).index_Bn).float().mean()
    assert recall > 0.95


def test_kept_tokens_teach_the_learned_pruner_though_they_are_not_changed() -> None:
    x = tokens_of()
    router: Any = router_of("learned_pruner", 4)
    trained, plain = (router(x, context_for(router, training=training)) for training in (True, False))
    assert torch.equal(trained.tokens_BnD, plain.tokens_BnD)
    trained.tokens_BnD.sum().backward()
    assert router.logit.weight.grad is not None
    assert router.logit.weight.grad.abs().sum() > 0
    assert plain.losses == {}
    assert trained.losses.keys() == {"budget"}


def test_film_pruning_is_lfps_score_of_the_words() -> None:
    x, router = tokens_of(), router_of("film_pruning", 4)
    context = context_for(router)
    assert context.text_BTE is not None
    assert context.text_mask_BT is not None
    scorer: Any = router.scorer
    for row in range(3):
        summary = context.text_BTE[row][context.text_mask_BT[row]].mean(0)
        p = scorer.logits(x[row] * (1 + scorer.scale(summary)) + scorer.shift(summary)).softmax(-1)[:, 1]
        assert router(x, context).index_Bn[row].tolist() == p.topk(4).indices.sort().values.tolist()


def test_aggregation_depends_on_the_instruction_through_film_only() -> None:
    x = tokens_of(1)
    router: Any = router_of("film_aggregation", 4)
    mask = torch.tensor([[True]])
    words = [torch.randn(1, 1, WIDTH) for _ in range(2)]
    asked = [router(x, context_for(router, text_BTE=word, text_mask_BT=mask)).tokens_BnD for word in words]
    assert not torch.allclose(*asked)
    with torch.no_grad():
        router.film.project.weight.zero_()
    deaf = [router(x, context_for(router, text_BTE=word, text_mask_BT=mask)).tokens_BnD for word in words]
    torch.testing.assert_close(*deaf)


def test_semantic_tokens_start_at_the_maximum_of_each_cell() -> None:
    x = tokens_of()
    torch.manual_seed(0)
    router = build_router("semantic_tokens", RouterSizes(16, WIDTH, WIDTH, (4, 4), 4))
    routed = router(x, context_for(router))
    corner = x[:, [0, 1, 4, 5]].amax(1)
    torch.testing.assert_close(routed.tokens_BnD[:, 0], corner, rtol=0, atol=1e-3)  # LayerScale is 1e-5
    moved = x.clone()
    moved[:, [0, 5]] = x[:, [5, 0]]  # within a cell
    torch.testing.assert_close(router(moved, context_for(router)).tokens_BnD, routed.tokens_BnD)
    free = build_router("semantic_tokens", RouterSizes(16, WIDTH, WIDTH, (4, 4), 4), {"variant": "free"})
    assert not list(free.parameters())
    torch.testing.assert_close(
        free(torch.ones(1, 16, 3), RouterContext(4, grid=(4, 4))).tokens_BnD, torch.ones(1, 4, 3)
    )


def test_flex_count_starts_as_pooling_and_learns_all_sizes_together() -> None:
    x, sizes = tokens_of(64), RouterSizes(16, WIDTH, WIDTH, (4, 4), 16)
    torch.manual_seed(0)
    pool = build_router("spatial_pool", sizes)(x, RouterContext(4, grid=(4, 4)))
    target = {budget: torch.randn(WIDTH, WIDTH) for budget in (1, 4, 16)}[4]  # one map for all sizes

    def error(router: torch.nn.Module, budget: int) -> torch.Tensor:
        pooled = build_router("spatial_pool", sizes)(x, RouterContext(budget, grid=(4, 4))).tokens_BnD
        answer = router(x, RouterContext(budget, grid=(4, 4), training=True)).tokens_BnD
        scale = pooled.std()  # pooled tokens are shorter
        return F.mse_loss(answer / scale, (pooled @ target).tanh() / scale)

    def trained(budgets: tuple[int, ...]) -> torch.nn.Module:
        torch.manual_seed(1)
        router = build_router("flex_count", sizes, {"growth": 4.0})
        torch.testing.assert_close(router(x, RouterContext(4, grid=(4, 4))).tokens_BnD, pool.tokens_BnD)
        optimiser = torch.optim.Adam(router.parameters(), 1e-2)
        for step in range(90):
            optimiser.zero_grad()
            error(router, budgets[step % len(budgets)]).backward()
            optimiser.step()
        return router

    joint, fixed = trained((1, 4, 16)), trained((1,))
    for budget in (4, 16):
        assert error(joint, budget) < error(fixed, budget)


def test_flex_count_as_published_is_the_projector() -> None:
    sizes = RouterSizes(16, WIDTH, 20, (4, 4), 16)
    torch.manual_seed(0)
    router: Any = build_router("flex_count", sizes, {"variant": "projector", "growth": 2.0})
    assert router.projects
    assert router.stages == ("encoder_out",)
    x = tokens_of()
    pool = build_router("spatial_pool", sizes)(x, RouterContext(4, grid=(4, 4))).tokens_BnD
    gate, up, down = router.gate.weight, router.up.weight, router.down.weight
    hidden = F.silu(pool @ gate.T + router.gate.bias) * (pool @ up.T + router.up.bias)
    assert (gate.shape, down.shape) == ((24, WIDTH), (20, 24))
    found = router(x, RouterContext(4, grid=(4, 4))).tokens_BnD
    torch.testing.assert_close(found, hidden @ down.T + router.down.bias)
    with pytest.raises(ValueError, match="flex_count needs variant of added, projector"):
        build_router("flex_count", sizes, {"variant": "swiglu"})


def test_the_learned_pruner_learns_from_a_deeper_layer() -> None:
    with pytest.raises(ValueError, match="above 0 for a guide_layer"):
        router_of("learned_pruner", 4, guide_layer=2)
    router, x = router_of("learned_pruner", 4, guide=1.0, guide_layer=2), tokens_of()
    assert router.needs == {"text_BTE"}, "nothing else is computed at inference"
    context = context_for(router, training=True)
    plain = router(x, replace(context, training=False))
    seen = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    guided = router(x, replace(context, guide_BN=seen))
    assert plain.score_BN is not None
    target = seen / seen.sum(1, keepdim=True)
    expected = (target * (target.log() - plain.score_BN.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(guided.losses["guide"], expected)


def test_the_first_causal_queries_do_not_see_the_others() -> None:
    x, router = tokens_of(), router_of("causal_queries", 8)
    whole = router(x, context_for(router, budget=8)).tokens_BnD
    torch.testing.assert_close(router(x, context_for(router, budget=3)).tokens_BnD, whole[:, :3])
    with pytest.raises(ValueError, match="has 8 queries"):
        router.leaves(9)


def test_slots_compete_for_tokens() -> None:
    """Every token's attention is shared out among the slots: with one slot, it takes the mean of all."""
    router, x = router_of("slot_attention", 1), tokens_of()
    order = torch.randperm(16)
    torch.testing.assert_close(router(x, context_for(router, budget=1)).tokens_BnD,
                               router(x[:, order], context_for(router, budget=1)).tokens_BnD)  # fmt: skip
    with pytest.raises(ValueError, match="learns 4 slots"):
        router_of("slot_attention", 4).leaves(5)


def test_the_merger_hands_dropped_tokens_on() -> None:
    router, x = router_of("selector_merger", 4), tokens_of(1)
    before = router(x, context_for(router, draw_B=torch.tensor([1])))
    dropped = next(i for i in range(16) if i not in before.place_Bn[0].tolist())
    changed = x.clone()
    changed[0, dropped] = changed[0, dropped] * 1.01
    after = router(changed, context_for(router, draw_B=torch.tensor([1])))
    assert torch.equal(before.place_Bn, after.place_Bn)
    assert not torch.equal(before.tokens_BnD, after.tokens_BnD)


def test_a_still_video_holds_nothing_new_for_an_open_gate() -> None:
    router: Any = router_of("progressive_video", 4)
    x = tokens_of(2)
    still, moving = (x[:, None].expand(-1, 3, -1, -1), torch.randn(2, 3, 16, WIDTH))
    answers = [router(x, context_for(router, history_BOND=history)).tokens_BnD for history in (still, moving)]
    assert not torch.allclose(*answers)
    with torch.no_grad():
        router.gate.fill_(-100.0)
    pool = router_of("spatial_pool", 4)
    torch.testing.assert_close(
        router(x, context_for(router, history_BOND=moving)).tokens_BnD, pool(x, context_for(pool)).tokens_BnD
    )


# --- schedules ---


@pytest.mark.parametrize(
    ("ratios", "mean"),
    [((0.723, 0.749, 0.487), 0.501), ((0.265, 0.983, 0.877), 0.251), ((0.117, 1.0, 0.601), 0.100)],
)
def test_the_published_schedules_have_the_budgets_they_claim(ratios: tuple[float, float, float], mean: float) -> None:
    shares = (ratios[0], ratios[0] * ratios[1], ratios[0] * ratios[1] * ratios[2])
    assert Schedule((9, 18), shares).mean(28) == pytest.approx(mean, abs=1e-3)


def test_the_search_moves_tokens_to_where_they_are_read() -> None:
    """A model that has read all it needs by layer 3: what is left later does not matter."""
    schedule, value = search(lambda s: s.shares[0], (3, 8), 12, 0.25, evaluations=200)
    assert schedule.shares[0] > 0.8
    assert value == schedule.shares[0]
    assert schedule.mean(12) == pytest.approx(0.25)
    assert list(schedule.shares) == sorted(schedule.shares, reverse=True)
    again, _ = search(lambda s: s.shares[0], (3, 8), 12, 0.25, evaluations=200)
    assert again == schedule


def test_the_search_does_not_gain_tokens_by_rounding() -> None:
    def kept(schedule: Schedule) -> float:
        """The mean share that a policy of 8 tokens in each view keeps."""
        return replace(schedule, shares=tuple(count_of(share, 8) / 8 for share in schedule.shares)).mean(3)

    assert kept(search(kept, (1, 2), 3, 0.25, evaluations=60)[0]) > 0.3, "with any shares it does"
    schedule, value = search(kept, (1, 2), 3, 0.25, evaluations=60, tokens=8)
    assert value == schedule.mean(3) <= 0.25
    assert search(kept, (1, 2), 3, 0.125, evaluations=5, tokens=8)[0].shares == (0.125,) * 3
    with pytest.raises(ValueError, match=r"a mean of 0\.1 of 8 tokens is less than one token: give 0\.125 or more"):
        search(kept, (1, 2), 3, 0.1, tokens=8)


@pytest.mark.parametrize("tokens", [None, 256, 8])
@pytest.mark.parametrize(
    ("layers", "depth", "budget"),
    [
        ((4, 8, 12, 16, 20, 24, 28), 32, 0.125),
        ((8, 16, 24), 32, 0.02),
        ((1, 2, 3, 4, 5, 6, 7), 8, 0.95),
        ((9,), 10, 5.4 / 8),
        ((1,), 2, 0.99),
    ],
)
def test_every_budget_has_schedules(layers: tuple[int, ...], depth: int, budget: float, tokens: int | None) -> None:
    budget, seen = max(budget, 1 / (tokens or 256)), []

    def objective(schedule: Schedule) -> float:
        seen.append(schedule.shares)
        assert list(schedule.shares) == sorted(schedule.shares, reverse=True)
        assert schedule.shares[0] <= 1
        if tokens is None:
            assert schedule.shares[-1] >= 0.01 - 1e-9
            assert schedule.mean(depth) == pytest.approx(budget)
        else:
            assert all(float(share * tokens).is_integer() for share in schedule.shares)
            assert schedule.shares[-1] * tokens >= 1
            assert schedule.mean(depth) <= budget + 1e-9
        return -schedule.shares[-1]

    search(objective, layers, depth, budget, evaluations=60, tokens=tokens)
    if tokens is None:
        assert len(set(seen)) == 60


def test_expected_improvement_is_the_mean_of_what_exceeds_the_best() -> None:
    mean, deviation = torch.tensor([0.0, 1.0, -2.0, 0.5]), torch.tensor([1.0, 0.1, 3.0, 0.0])
    drawn = mean + deviation * torch.randn(400_000, 4, generator=torch.Generator().manual_seed(0))
    expected = (drawn - 0.4).clamp_min(0).mean(0)
    found = expected_improvement(mean.double(), deviation.double(), 0.4)
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=2e-3)


def test_a_gaussian_process_finds_a_narrow_optimum() -> None:
    pytest.importorskip("sklearn", reason=needs("search"))

    def objective(schedule: Schedule) -> float:
        return -((schedule.shares[0] - 0.71) ** 2) - 0.01 * (schedule.options["threshold"] - 12) ** 2

    ranges = {"threshold": (0.0, 50.0)}
    schedule, value = search(objective, (3, 8), 12, 0.4, ranges, evaluations=45, method="gaussian")
    assert schedule.mean(12) == pytest.approx(0.4)
    assert value > -0.02
    assert value == objective(schedule)
    assert search(objective, (3, 8), 12, 0.4, ranges, evaluations=45, method="gaussian")[0] == schedule


def test_the_search_finds_numbers_of_the_router_too() -> None:
    schedule, _ = search(lambda s: -abs(s.options["threshold"] - 3), (2,), 4, 0.5, {"threshold": (0, 50)})
    assert schedule.options["threshold"] == pytest.approx(3, abs=0.5)
    applied = schedule.applied(RouterConfig("global_attention", layer_router="carried"))
    assert (applied.layers, applied.layer_budgets) == ((2,), schedule.shares[1:])
    assert applied.options is not None
    assert applied.options["threshold"] == schedule.options["threshold"]


def test_impossible_searches() -> None:
    for layers in ((), (3, 3), (0, 2), (2, 9)):
        with pytest.raises(ValueError, match="must increase, from 1 to at most 3"):
            search(lambda s: 0.0, layers, 4, 0.5)
    with pytest.raises(ValueError, match="budget must be between"):
        search(lambda s: 0.0, (1,), 4, 1.5)
