"""What every router in the registry keeps to. A new one is tested by being registered."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import fields, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.routing import registry
from cogvla.routing.draws import child, children, normal, seeds_of, uniform
from cogvla.routing.registry import build_router, register_router, registered_routers
from cogvla.routing.router import (
    ITEMS,
    STAGES,
    RoutedTokens,
    RouterConfig,
    RouterContext,
    RouterSizes,
    TokenRouter,
    count_of,
)
from cogvla.routing.selection import best, kept
from cogvla.tests.support.paths import ROOT
from cogvla.tests.support.router_contexts import NAMES, context_for, everything, router_of, sample, sizes_for, tokens_of

ROUTERS = registered_routers()
SELECTING = [name for name in NAMES if ROUTERS[name].selects]
ALL = 16
WHOLE = ("identity", "vision_remember", "channel_attention", "token_pooling")
"""These keep all tokens, alone or with their default base."""


def equal(one: RoutedTokens, other: RoutedTokens) -> None:
    assert torch.equal(one.index_Bn, other.index_Bn)
    torch.testing.assert_close(one.place_Bn, other.place_Bn)
    torch.testing.assert_close(one.tokens_BnD, other.tokens_BnD, rtol=1e-4, atol=1e-5)
    if one.score_BN is not None:
        torch.testing.assert_close(one.score_BN, other.score_BN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [2, 4, 8, 16])
def test_exactly_k_tokens_in_order(name: str, budget: int) -> None:
    router, x = router_of(name, budget), tokens_of()
    routed = router(x, context_for(router, budget=budget))
    kept = router.leaves(budget)
    assert routed.mask_Bn is None or router.hides
    assert (routed.score_BN is not None) == router.scores
    assert kept == (ALL if name in WHOLE else 0 if name == "late_exit" else budget)
    assert routed.tokens_BnD.shape == (3, kept, x.shape[-1])
    assert routed.tokens_BnD.isfinite().all()
    assert ((routed.place_Bn >= 0) & (routed.place_Bn <= ALL - 1)).all()
    for row in range(3):
        chosen = routed.index_Bn[row] >= 0
        index = routed.index_Bn[row][chosen]
        assert (index.diff() > 0).all(), "in order, each once"
        assert torch.equal(routed.tokens_BnD[row][chosen], x[row][index]), "bit for bit"
        assert torch.equal(routed.place_Bn[row][chosen].long(), index)
    if router.selects:
        assert (routed.index_Bn >= 0).all()
    if routed.owner_BN is not None:
        assert routed.owner_BN.shape == (3, ALL)
        assert ((routed.owner_BN >= -1) & (routed.owner_BN < kept)).all()


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_under_a_generator(name: str) -> None:
    router, x = router_of(name, 4), tokens_of()
    first, again = (router(x, context_for(router, **everything(seed=5))) for _ in range(2))
    assert torch.equal(first.index_Bn, again.index_Bn)
    assert torch.equal(first.tokens_BnD, again.tokens_BnD)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_samples(name: str) -> None:
    router, x = router_of(name, 4), tokens_of()
    context = context_for(router)
    together = router(x, context)
    for row in range(3):
        alone = router(x[row : row + 1], sample(context, row))
        pick = slice(row, row + 1)
        score = None if together.score_BN is None else together.score_BN[pick]
        equal(replace(together, tokens_BnD=together.tokens_BnD[pick], index_Bn=together.index_Bn[pick],
                      place_Bn=together.place_Bn[pick], score_BN=score), alone)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_losses_do_not_depend_on_how_a_batch_is_divided(name: str) -> None:
    router, x = router_of(name, 4), tokens_of()
    context = context_for(router, training=True)
    alone = [router(x[row : row + 1], sample(context, row)).losses for row in range(3)]
    for loss, together in router(x, context).losses.items():
        torch.testing.assert_close(together, torch.stack([losses[loss] for losses in alone]).mean())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_comes_out_as_it_went_in_and_scores_are_float32(name: str) -> None:
    router, x = router_of(name, 4), tokens_of()
    context = context_for(router)
    whole, half = router(x, context), router(x.bfloat16(), context)
    assert half.tokens_BnD.dtype == torch.bfloat16
    for routed in (whole, half):
        assert routed.score_BN is None or routed.score_BN.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal(whole, router(x, context))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_tokens_and_weights(name: str) -> None:
    router, x = router_of(name, 4).train(), tokens_of().requires_grad_()
    routed = router(x, context_for(router, training=True))
    if not routed.tokens_BnD.numel():
        return
    total = (routed.tokens_BnD * torch.randn_like(routed.tokens_BnD)).sum() + sum(routed.losses.values())
    total.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    for weight, parameter in router.named_parameters():
        assert parameter.grad is not None, weight
        assert parameter.grad.abs().sum() > 0, weight


@pytest.mark.parametrize("name", SELECTING)
def test_a_budget_of_everything_keeps_everything(name: str) -> None:
    if name == "late_exit":
        return
    router, x = router_of(name, ALL), tokens_of()
    assert torch.equal(router(x, context_for(router, budget=ALL)).tokens_BnD, x)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(2, 5), columns=st.integers(2, 5), batch=st.integers(1, 3), data=st.data())
def test_any_size_and_budget(name: str, rows: int, columns: int, batch: int, data: st.DataObject) -> None:
    grid, seed = (rows, columns), data.draw(st.integers(0, 99))
    budget = data.draw(st.integers(1, rows * columns))
    router = None
    with contextlib.suppress(ValueError):  # a budget that is no grid; what it says is tested below
        router = router_of(name, budget, grid)
    if router is None:
        return
    routed = router(tokens_of(batch, grid, seed), context_for(router, **everything(batch, budget, grid, seed)))
    kept = router.leaves(budget)
    assert routed.index_Bn.shape == (batch, kept)
    for index in routed.index_Bn:
        assert (index[index >= 0].diff() > 0).all()


UNEVEN = ("debias", "core_neurons")  # which reads places, and whose whole numbers tie
PLAIN = [n for n in SELECTING if not ROUTERS[n].needs & {"grid", "draw_B", "pixels_B3HW"} and n not in UNEVEN]


@pytest.mark.parametrize("name", PLAIN)
def test_the_order_of_tokens_does_not_matter_where_places_are_not_read(name: str) -> None:
    router, x, order = router_of(name, 4), tokens_of(1), torch.randperm(ALL, generator=torch.Generator().manual_seed(3))
    items = everything(1)
    moved = dict(items)
    of_tokens = (
        "encoder_BNF",
        "received_BN",
        "keys_BNC",
        "score_BN",
        "growth_BN",
        "text_attention_BN",
        "text_match_BN",
    )
    for item in (*of_tokens, "attention_LBN", "alike_BON", "past_attention_BON", "past_seen_BON"):
        dim = 1 if item in of_tokens else 2
        moved[item] = items[item].index_select(dim, order)
    moved["attention_BNN"] = items["attention_BNN"][:, order][:, :, order]
    before = router(x, context_for(router, **items)).index_Bn[0].tolist()
    after = router(x[:, order], context_for(router, **moved)).index_Bn[0]
    assert sorted(order[after].tolist()) == before


@pytest.mark.parametrize("name", NAMES)
def test_what_a_router_says_of_itself(name: str) -> None:
    kind, router = ROUTERS[name], router_of(name, 4)
    assert router.needs <= ITEMS
    assert router.stage in router.stages
    assert set(router.stages) <= set(STAGES)
    assert inspect.getmodule(kind).__doc__, "its source"
    options = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        assert f"{option}:" in (inspect.getdoc(kind) or ""), f"{option} is documented"


def test_every_item_is_documented_and_tested() -> None:
    text = inspect.getdoc(RouterContext) or ""
    assert not [f.name for f in fields(RouterContext) if f"{f.name}:" not in text]
    assert everything().keys() >= ITEMS
    text = inspect.getdoc(RouterConfig) or ""
    assert not [f.name for f in fields(RouterConfig) if f"{f.name}:" not in text]


def test_the_router_of_the_documentation_is_one() -> None:
    page = (ROOT / "docs" / "routers.md").read_text()
    code = page[page.index("class MostDifferent") :]
    names = {"TokenRouter": TokenRouter, "kept": kept, "best": best}
    exec("from __future__ import annotations\n" + code[: code.index("```")], names)
    router, x = names["MostDifferent"](sizes_for(2)), tokens_of() * 0.01  # type: ignore[operator]
    x[:, [3, 9]] += 5
    assert router(x, RouterContext(2)).index_Bn.tolist() == [[3, 9]] * 3


def test_the_documentation_lists_every_router() -> None:
    page = (ROOT / "docs" / "routers.md").read_text()
    assert not [name for name in NAMES if f"\n| `{name}` | " not in page]


@pytest.mark.parametrize("name", NAMES)
def test_options_of_a_wrong_kind_or_size_are_refused(name: str) -> None:
    """Every value is a ValueError, or of a kind that the option allows."""
    parameters = inspect.signature(type(router_of(name, 4))).parameters.values()
    for option in (p.name for p in parameters if p.kind is p.KEYWORD_ONLY):
        for value in (
            "x",
            float("nan"),
            float("inf"),
            1.5,
            2,
            0,
            -1,
            -2.0,
            True,
            None,
            [1],
            {"a": 1},
            {1: 2},
            object(),
        ):
            with contextlib.suppress(ValueError):
                build_router(name, sizes_for(4), {option: value})
    with pytest.raises(ValueError, match="has no option 1, x; it has"):
        build_router(name, sizes_for(4), {"x": 1, 1: 2})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("approx_error", {"basis": "x"}, "option basis of router 'approx_error' must be a whole number, got 'x'"),
        ("approx_error", {"basis": 1.5}, "must be a whole number, got 1.5"),
        ("approx_error", {"basis": True}, "must be a whole number, got True"),
        ("global_attention", {"entropy": float("nan")}, "option entropy .* must be a number, got nan"),
        ("late_exit", {"threshold": "1"}, "must be a number or null, got '1'"),
        ("diversity", {"variant": 1}, "must be text, got 1"),
        ("token_pooling", {"base": None}, "must be text, got None"),
        ("token_pooling", {"base_options": [1]}, r"must be names and values or null, got \[1\]"),
        ("asked", {"way": "c"}, "must be one of a, b or null, got 'c'"),
        ("asked", {"sizes_of": 2}, "must be a list, got 2"),
    ],
)
def test_what_an_option_must_be_is_said(
    name: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(TokenRouter):
        def __init__(
            self, sizes: RouterSizes, *, way: Literal["a", "b"] | None = None, sizes_of: tuple[int, ...] = ()
        ) -> None: ...

    monkeypatch.setitem(registry._ROUTERS, "asked", Asked)
    with pytest.raises(ValueError, match=message):
        build_router(name, sizes_for(4), options)


def test_mistakes_say_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"unknown router 'randm'; one of .*random, .*token_norm"):
        build_router("randm", sizes_for(4))
    with pytest.raises(ValueError, match=r"name 'random': .*routers\.random\.Random and .*test_routers_contract.*Mine"):

        @register_router("random")
        class Mine(TokenRouter): ...

    with pytest.raises(ValueError, match="option rescale of router 'frequency' must be true or false, got 'no'"):
        build_router("token_pooling", sizes_for(4), {"base": "frequency", "base_options": {"rescale": "no"}})
    with pytest.raises(ValueError, match="has no option speed; it has variant, pivot"):
        build_router("diversity", sizes_for(4), {"speed": 1})
    with pytest.raises(ValueError, match="cannot have 0 heads; choose a divisor"):
        build_router("causal_queries", sizes_for(4), {"heads": 0})
    with pytest.raises(ValueError, match=r"5 tokens do not form a grid .* possible budgets: 1, 2, 4, 6, 8, 9, 12, 16"):
        build_router("grid_stride", sizes_for(5))
    with pytest.raises(ValueError, match=r"needs tokens that are patches of a grid.*or use one of .*random"):
        build_router("spatial_pool", RouterSizes(16, 12, 10, None, 4))
    with pytest.raises(ValueError, match="is 17, but there are only 16 tokens; choose 1 to 16"):
        count_of(17, 16)
    for wrong in (0, -1, 1.5, 0.0, True, float("nan"), "all"):
        with pytest.raises(ValueError, match="is a number of tokens or a share"):
            count_of(wrong, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be one of null, encoder_block, encoder_out"):
        RouterConfig(stage="somewhere")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs router\.layers"):
        RouterConfig(name="random", stage="llm_layer")


@pytest.mark.parametrize(("budget", "count"), [(1, 1), (16, 16), (1.0, 16), (0.5, 8), (0.0625, 1), (0.01, 1)])
def test_budgets(budget: float, count: int) -> None:
    assert count_of(budget, 16) == count


def test_draws_are_uniform_and_a_function_of_the_seed() -> None:
    seeds = torch.arange(2000)
    x = uniform(seeds, 4, 8)
    assert x.shape == (2000, 4, 8)
    assert ((x >= 0) & (x < 1)).all()
    assert x.mean().item() == pytest.approx(0.5, abs=0.005)
    assert torch.corrcoef(x.flatten(1).T).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(uniform(seeds[5:6], 4, 8), x[5:6])
    z = normal(seeds, 32)
    assert z.isfinite().all()
    assert (z.mean().item(), z.std().item()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))
    assert children(seeds, 3).unique().numel() == 6000
    assert torch.equal(child(seeds, 2), children(seeds, 3)[:, 1])
    assert torch.cat([children(seeds, 3).flatten(), child(seeds, -1), child(seeds, -30)]).unique().numel() == 10000
    states = torch.randn(1000, 8)
    assert seeds_of(states, 0).unique().numel() == 1000
    assert torch.equal(seeds_of(states[3:4], 1), seeds_of(states, 1)[3:4])
    assert not torch.equal(seeds_of(states, 1), seeds_of(states, 2))
