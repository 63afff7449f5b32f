"""Each training-free router on inputs whose answer is known, and numbers of its paper where there are any."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cogvla.routing.registry import build_router
from cogvla.routing.router import Calibrated, RoutedTokens, RouterContext, RouterSizes
from cogvla.routing.routers.approx_error import approximation_error, sample_far
from cogvla.routing.routers.core_neurons import bend
from cogvla.routing.routers.coverage import cover
from cogvla.routing.routers.debias import fit_rate
from cogvla.routing.routers.diversity import farthest
from cogvla.routing.routers.frequency import Frequency, dct
from cogvla.routing.routers.global_attention import patch_entropy
from cogvla.routing.routers.late_exit import fit_threshold
from cogvla.routing.routers.text_guided import diverse, relevance
from cogvla.routing.routers.zeroth_order import ZerothOrder
from cogvla.routing.selection import best, effective_rank, grid_shape, part_of, ranked, unit
from cogvla.tests.support.router_contexts import WIDTH, context_for, everything, router_of, tokens_of


def attention(*values: float, batch: int = 3, layers: int = 1) -> torch.Tensor:
    return torch.tensor(values).expand(layers, batch, -1).clone()


def planted(*where: int, tokens: int = 16, batch: int = 3) -> torch.Tensor:
    row = torch.full((tokens,), 0.01)
    row[list(where)] = torch.linspace(0.3, 0.1, len(where))
    return row.expand(1, batch, -1).clone()


def route(name: str, x: torch.Tensor, budget: int, options: dict | None = None, **items: object) -> RoutedTokens:
    router = build_router(name, RouterSizes(x.shape[1], x.shape[2], WIDTH, items.get("grid", (4, 4)), budget), options)  # type: ignore[arg-type]
    return router.eval()(x, context_for(router, budget=budget, **items))


# --- controls ---


def test_random_keeps_every_token_equally_often() -> None:
    x = torch.zeros(4000, 16, 2)
    index = route("random", x, 4, draw_B=torch.arange(4000)).index_Bn
    share = torch.bincount(index.flatten(), minlength=16) / 4000
    assert (share - 4 / 16).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_grid_stride_takes_the_middle_of_each_cell() -> None:
    x = tokens_of()
    assert route("grid_stride", x, 4).index_Bn[0].tolist() == [5, 7, 13, 15]
    assert route("grid_stride", x, 1).index_Bn[0].tolist() == [10]
    assert route("grid_stride", x, 16).index_Bn[0].tolist() == list(range(16))


def test_spatial_pool_is_the_mean_of_blocks() -> None:
    ramp = torch.arange(16.0)[None, :, None]
    assert route("spatial_pool", ramp, 4).tokens_BnD[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert (route("spatial_pool", torch.ones(1, 16, 3), 8).tokens_BnD == 1).all()


def test_token_norm_keeps_the_longest() -> None:
    x = tokens_of() * 0.01
    x[:, [3, 9]] += 5
    assert route("token_norm", x, 2).index_Bn[1].tolist() == [3, 9]


def test_small_grids() -> None:
    assert grid_shape((4, 4), 8) in ((2, 4), (4, 2))
    assert grid_shape((24, 24), 144) == (12, 12)
    assert grid_shape((4, 8), 8) == (2, 4)
    for count in (3, 5, 7, 17):
        with pytest.raises(ValueError, match="possible budgets"):
            grid_shape((4, 4), count)


# --- attention ---


def test_cls_attention_keeps_a_planted_row() -> None:
    x = tokens_of()
    assert route("cls_attention", x, 3, attention_LBN=planted(1, 7, 12)).index_Bn[0].tolist() == [1, 7, 12]
    several = planted(1, 7, 12).expand(5, -1, -1)
    assert route("cls_attention", x, 3, {"layers": 5}, attention_LBN=several).index_Bn[0].tolist() == [1, 7, 12]


def test_outliers_are_not_kept_first() -> None:
    x = tokens_of()
    x[:, 7] *= 50
    assert route("cls_attention", x, 2, {"outliers": 5.0}, attention_LBN=planted(1, 7, 12)).index_Bn[0].tolist() == [
        1,
        12,
    ]
    more = planted(1, 7, 12) * torch.tensor([1.0, 1.0, 9.0])[:, None]
    together, single = (
        route("cls_attention", x[rows], 2, {"outliers": 5.0}, attention_LBN=more[:, rows]).score_BN
        for rows in (slice(3), slice(1))
    )
    assert together is not None
    assert single is not None
    assert torch.equal(together[:1], single), "whatever else is in the batch"


def test_text_guided_without_text_is_attention_and_diversity() -> None:
    x, seen = tokens_of(), torch.rand(1, 3, 16, generator=torch.Generator().manual_seed(3))
    found = route("text_guided", x, 6, {"text": 0.0}, attention_LBN=seen).index_Bn
    order = ranked(seen[0])
    expected = torch.cat((order[:, :3], diverse(unit(x), order[:, 3:], 3)), dim=1).sort(1).values
    assert torch.equal(found, expected)


def test_text_guided_by_importance_alone_keeps_the_best() -> None:
    x, seen = tokens_of(), attention(*range(16))
    found = route("text_guided", x, 4, {"text": 0.0, "important": 1.0}, attention_LBN=seen).index_Bn
    assert found.tolist() == [[12, 13, 14, 15]] * 3
    assert diverse(unit(x), torch.arange(16).expand(3, -1), 0).shape == (3, 0)


def test_text_guided_by_text_alone_keeps_the_token_that_is_a_word() -> None:
    x = tokens_of()
    words = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    words[:, 2] = x[:, 11]
    mask = torch.tensor([True, True, True, False, False]).expand(3, -1)
    context = RouterContext(2, attention_LBN=planted(1), text_BTE=words, text_mask_BT=mask, projector=lambda t: t)
    assert (relevance(x, context).argmax(1) == 11).all()
    router = build_router("text_guided", RouterSizes(16, WIDTH, WIDTH, None, 2), {"text": 1.0})
    assert (router(x, context).index_Bn == 11).any(1).all()


def test_diverse_removes_doubles_first() -> None:
    x = torch.eye(4).repeat_interleave(2, dim=0)[None]  # tokens 2i and 2i+1 are the same
    kept = diverse(x, torch.arange(8)[None], 4)[0]
    assert sorted((kept // 2).tolist()) == [0, 1, 2, 3]


def test_visual_attention_without_merging_is_the_best() -> None:
    x, received = tokens_of(), planted(0, 5, 9)[0]
    keys = torch.randn(3, 16, 6)
    routed = route("visual_attention_merge", x, 3, {"contextual": 0.0}, received_BN=received, keys_BNC=keys)
    assert routed.index_Bn[0].tolist() == [0, 5, 9]


@pytest.mark.parametrize(("norm", "length"), [("sum_mean", 2.0), ("mean", 1.0)])
def test_merged_tokens_of_equal_ones(norm: str, length: float) -> None:
    x = torch.ones(1, 16, 4)
    routed = route("visual_attention_merge", x, 8, {"contextual": 0.25, "norm": norm},
                   received_BN=planted(2, 3, 4, 5, 6, 7, batch=1)[0], keys_BNC=torch.ones(1, 16, 6))  # fmt: skip
    assert routed.index_Bn[0].tolist() == [2, 3, 4, 5, 6, 7, -1, -1]
    assert (routed.tokens_BnD[0, :6] == 1).all()
    torch.testing.assert_close(routed.tokens_BnD[0, 6], torch.full((4,), length))  # all others joined the first target
    assert (routed.tokens_BnD[0, 7] == 1).all()
    assert routed.owner_BN is not None
    assert (routed.owner_BN >= 0).all(), "nothing is lost"


@pytest.mark.parametrize(("budget", "merged"), [(1, 0), (2, 1), (4, 1), (12, 2)])
def test_a_small_budget_merges_too(budget: int, merged: int) -> None:
    items = {"received_BN": planted(2, batch=1)[0], "keys_BNC": torch.randn(1, 16, 6)}
    routed = route("visual_attention_merge", torch.randn(1, 16, 4), budget, {}, **items)
    assert (routed.index_Bn == -1).sum() == merged, "an eighth, but not nothing"


@pytest.mark.parametrize(
    ("budget", "share", "part"), [(1, 0.5, 0), (1, 1.0, 1), (4, 0.1, 1), (4, 0.0, 0), (8, 0.25, 2), (3, 1.0, 3)]
)
def test_part_of_a_budget(budget: int, share: float, part: int) -> None:
    assert part_of(budget, share) == part


def test_debias_takes_the_trend_out() -> None:
    trend = torch.exp(0.3 * torch.arange(16.0))
    profile = trend.clone()
    profile[4] *= 1.5
    x, rate = tokens_of(), 0.3 * 16 / 576
    biased = route("cls_attention", x, 1, attention_LBN=profile.expand(1, 3, -1)).index_Bn
    freed = route("debias", x, 1, {"rate": rate}, attention_LBN=profile.expand(1, 3, -1)).index_Bn
    assert (biased[0].item(), freed[0].item()) == (15, 4)
    noisy = torch.exp(0.002 * torch.arange(576.0)) * (
        1 + 0.01 * torch.randn(576, generator=torch.Generator().manual_seed(0))
    )
    assert fit_rate(noisy) == pytest.approx(0.002, rel=0.01)
    with pytest.raises(ValueError, match="does not"):
        router_of("debias", 4, base="random")
    for shares, said in (([0.5], "1 of 1 get some"), ([0.5, 0.0, 0.5], "2 of 3"), ([0.5, math.nan], "1 of 2")):
        with pytest.raises(ValueError, match=f"two or more, all with attention, and {said}"):
            fit_rate(torch.tensor(shares))


def test_debias_of_several_pictures_in_a_row_begins_anew_with_each() -> None:
    trend = torch.exp(0.3 * torch.arange(8.0)).repeat(2)
    profile = trend.clone()
    profile[9] *= 1.5
    profile[12] *= 1.4
    options = {"rate": 0.3 * 8 / 576}
    router = build_router("debias", RouterSizes(16, WIDTH, WIDTH, None, 2, views=2), options)
    context = RouterContext(2, attention_LBN=profile.expand(1, 3, -1))
    assert router(tokens_of(), context).index_Bn[0].tolist() == [9, 12]
    assert isinstance(router, Calibrated)
    measured = router.observed(tokens_of(), replace(context, attention_LBN=trend.expand(1, 3, -1)))
    assert router.fitted(measured.mean(0)) == {"rate": pytest.approx(options["rate"], rel=1e-3)}


# --- diversity and coverage ---


def clusters(count: int = 4, each: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    centres = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:count]
    noise = 0.02 * torch.randn(count * each, WIDTH, generator=generator)
    return (centres.repeat_interleave(each, dim=0) + noise)[None]


def test_kcenter_takes_one_token_of_every_cluster_and_the_pivot() -> None:
    routed = route("diversity", clusters(), 4, attention_LBN=planted(6, batch=1))
    assert (routed.index_Bn[0] // 4).tolist() == [0, 1, 2, 3]
    assert 6 in routed.index_Bn[0].tolist()


def test_the_two_variants_by_hand() -> None:
    x = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0))
    similarity = (unit(x) @ unit(x).mT)[0]
    for summed in (False, True):
        taken = [3]
        while len(taken) < 6:
            others = [i for i in range(12) if i not in taken]
            near = {i: (similarity[i, taken].sum() if summed else similarity[i, taken].max()).item() for i in others}
            taken.append(min(near, key=near.__getitem__))
        assert farthest(unit(x), torch.tensor([3]), 6, summed)[0].tolist() == taken


def test_coverage_is_greedy_and_near_the_best() -> None:
    utility = torch.rand(1, 20, 9, generator=torch.Generator().manual_seed(1))
    index, gain = cover(utility, 4)
    assert len(set(index[0].tolist())) == 4
    assert (gain[0].diff() <= 1e-6).all()
    value = utility[0][:, index[0]].amax(1).sum()
    optimum = max(utility[0][:, list(some)].amax(1).sum() for some in itertools.combinations(range(9), 4))
    assert value >= (1 - 1 / math.e) * optimum
    assert gain.sum().item() == pytest.approx(value.item(), rel=1e-5)


def test_coverage_without_the_picture_starts_at_the_word() -> None:
    x = tokens_of(1)
    words, mask = x[:, 11:12].clone(), torch.tensor([[True]])
    routed = route("coverage", x, 1, {"alpha": 0.0}, text_BTE=words, text_mask_BT=mask, encoder_BNF=x)
    assert routed.index_Bn.tolist() == [[11]]


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(8)[None]).item() == pytest.approx(8)
    assert effective_rank(torch.ones(1, 8, 3)).item() == pytest.approx(1, abs=1e-3)


def test_adaptive_erank_without_a_limit_is_attention_and_with_one_keeps_no_doubles() -> None:
    x, seen = tokens_of(), torch.rand(1, 3, 16, generator=torch.Generator().manual_seed(4))
    x[:, 5], x[:, 8] = x[:, 2], x[:, 2]
    plain = route("adaptive_erank", x, 5, {"limit": 0.0}, attention_LBN=seen).index_Bn
    assert torch.equal(plain, best(seen[0], 5))
    seen[:, :, [2, 5, 8]] = torch.tensor([0.9, 0.8, 0.7]) + 1
    kept = route("adaptive_erank", x, 5, {"limit": 0.1}, attention_LBN=seen).index_Bn
    assert ((kept == 2) | (kept == 5) | (kept == 8)).sum(1).tolist() == [1, 1, 1]
    everything = route("adaptive_erank", torch.ones(1, 16, 4), 3, attention_LBN=planted(2, 9, 4, batch=1)).index_Bn
    assert everything[0].tolist() == [2, 4, 9], "doubles fill the budget in order of attention"


def test_adaptive_erank_says_where_its_candidates_run_out() -> None:
    """With a small mean, thresholds are large, and tokens that were removed must fill the budget."""
    x = torch.cat((torch.ones(1, 16, WIDTH), tokens_of(1)))
    seen = attention(*range(16, 0, -1), batch=2)
    generous, strict = (router_of("adaptive_erank", 5, mean_erank=mean, limit=2.0) for mean in (1000.0, 0.01))
    for router, expected in ((generous, [True, False]), (strict, [True, True])):
        assert isinstance(router, Calibrated)
        troubled = router.troubled(x, context_for(router, budget=5, attention_LBN=seen))
        assert troubled is not None
        assert troubled.tolist() == expected


# --- what cannot be expressed, frequencies, sensitivity ---


def test_approximation_error_finds_the_outlier() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(1, 16, 2, generator=generator) @ torch.randn(1, 2, WIDTH, generator=generator)
    x = plane.clone()
    x[0, 9] += 0.5 * torch.randn(WIDTH, generator=generator)
    basis = sample_far(plane, torch.tensor([0]), 2)
    error = approximation_error(x, plane.gather(1, basis[..., None].expand(-1, -1, WIDTH)))
    assert error.argmax().item() == 9
    assert error.topk(2).values[0, 1] < 1e-3 * error.max()
    routed = route("approx_error", x, 4, {"basis": 2}, draw_B=torch.tensor([0]))
    assert 9 in routed.place_Bn[0].tolist()
    assert (routed.index_Bn >= 0).sum() == 2, "two of the basis, as they were"
    assert routed.score_BN is not None
    assert set(best(routed.score_BN, 2)[0].tolist()) == set(basis[0].tolist()), "`carried` keeps the basis longest"
    assert routed.owner_BN is not None
    assert (routed.owner_BN >= 0).all(), "nothing is lost"
    grams = approximation_error(x, x.gather(1, basis[..., None].expand(-1, -1, WIDTH))).gather(1, basis)
    assert grams.max() < 1e-3


def test_approximation_error_of_long_tokens_and_of_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1.0, 20.0, 1e4):
        x = length * unit(torch.randn(2, 16, 32, generator=generator))
        basis = x[:, :4].clone()
        found = approximation_error(x, basis)
        for row in range(2):
            q_Dn = torch.linalg.qr(basis[row].double().mT).Q
            left = x[row].double() - x[row].double() @ q_Dn @ q_Dn.mT
            torch.testing.assert_close(found[row].double(), left.norm(dim=-1), rtol=1e-5, atol=1e-4 * length)
        equal = x[:, :1].expand(-1, 16, -1)
        assert approximation_error(equal, equal[:, :8]).max() < 1e-3 * length
        assert approximation_error(x, equal[:, :8])[:, 1:].min() > 0.5 * length, "one token cannot stand for others"
        route("approx_error", equal, 8, draw_B=torch.tensor([0, 3]))


def test_frequency() -> None:
    matrix = dct(7, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(7), rtol=0, atol=1e-5)
    x = tokens_of()
    torch.testing.assert_close(route("frequency", x, 16).tokens_BnD, x, rtol=1e-4, atol=1e-5)
    flat = torch.full((1, 16, 3), 1.7)
    torch.testing.assert_close(route("frequency", flat, 4).tokens_BnD, torch.full((1, 4, 3), 1.7))
    large = Frequency(RouterSizes(576, 3, 3, (24, 24), 144), rescale=False)
    doubled = large(torch.ones(1, 576, 3), RouterContext(144, grid=(24, 24))).tokens_BnD
    torch.testing.assert_close(doubled, torch.full((1, 144, 3), 2.0), rtol=1e-4, atol=1e-4)


def test_zeroth_order_sensitivity_is_that_of_the_jacobian() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(WIDTH, 20, generator=generator), torch.randn(20, WIDTH, generator=generator)
    x, draw = tokens_of(1), torch.tensor([5])
    router = ZerothOrder(RouterSizes(16, WIDTH, WIDTH, None, 4), directions=512, step=1e-3)
    linear = router.sensitivity(x, RouterContext(4, draw_B=draw, projector=lambda t: t @ first @ second))
    assert ((linear - linear.mean()).abs() < 1e-2 * linear.mean()).all()
    found = router.sensitivity(x, RouterContext(4, draw_B=draw, projector=lambda t: (t @ first).relu() @ second))
    active = (x @ first > 0).float()[0]
    jacobian = torch.einsum("ih,nh,ho->nio", first, active, second)
    # The mean length of J'u over unit directions lies near the root mean square, |J| / sqrt(D).
    expected = jacobian.flatten(1).norm(dim=1) / math.sqrt(WIDTH)
    assert torch.corrcoef(torch.stack((found[0], expected)))[0, 1] > 0.98
    assert ((found[0] / expected - 0.95).abs() < 0.1).all()


def test_zeroth_order_with_a_linear_projector_is_diversity() -> None:
    x = 100 * tokens_of(2)
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    router = ZerothOrder(RouterSizes(16, WIDTH, WIDTH, None, 5))
    found, score = router.choose(x, RouterContext(5, draw_B=torch.tensor([3, 4]), projector=lambda t: t @ weight))
    assert score.unique().tolist() == [1]
    for row in range(2):
        cosine, expected = unit(x[row]) @ unit(x[row]).T, [0]
        for _ in range(4):
            nearest = cosine[:, expected].amax(1)
            nearest[expected] = 2
            expected.append(int(nearest.argmin()))
        assert found[row].tolist() == expected


def recycled_by_hand(
    x: torch.Tensor, score: list[float], grid: tuple[int, int], cell: float, n: int
) -> tuple[list[int], list[int], torch.Tensor]:
    """Places, indices and tokens: as many whole ones as fit beside one recycled token for each cell of the others."""
    while math.ceil(grid[0] / cell) * math.ceil(grid[1] / cell) > n // 2:
        cell += 1
    cells = [(int(i // grid[1] / cell), int(i % grid[1] / cell)) for i in range(len(score))]
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    whole = next(w for w in range(len(score), -1, -1) if w + len({cells[i] for i in order[w:]}) == n)
    found = {i: (i, x[i]) for i in order[:whole]}
    for one in {cells[i] for i in order[whole:]}:
        inside = [i for i in order[whole:] if cells[i] == one]
        weight = torch.tensor([score[i] for i in inside])
        found[inside[0]] = (-1, weight @ x[inside] / weight.sum())
    places = sorted(found)
    return places, [found[i][0] for i in places], torch.stack([found[i][1] for i in places])


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (6, 6)])
@pytest.mark.parametrize("cell", [2.0, 2.5, 4.0])
@pytest.mark.parametrize("n", [2, 4, 8, 12])
def test_global_attention_recycles_by_cell(grid: tuple[int, int], cell: float, n: int) -> None:
    router: Any = router_of("global_attention", n, grid, cell=cell)
    x, context = tokens_of(3, grid), context_for(router, **everything(budget=n, grid=grid))
    routed, score = router(x, context), router.importance(context)
    for row in range(3):
        places, indices, tokens = recycled_by_hand(x[row], score[row].tolist(), grid, cell, n)
        assert routed.place_Bn[row].tolist() == places
        assert routed.index_Bn[row].tolist() == indices
        torch.testing.assert_close(routed.tokens_BnD[row], tokens)
        whole = [i for i in indices if i >= 0]
        assert [places[i] for i in routed.owner_BN[row][whole].tolist()] == whole
    assert (routed.owner_BN >= 0).all()


def test_global_attention_follows_the_global_token_and_recycles_the_rest() -> None:
    x, spread = tokens_of(1), torch.full((1, 16, 16), 1e-3)
    spread[:, :, 3] = 0.5  # everyone looks at 3
    spread[:, 3, 8], spread[:, 3, 14] = 0.9, 0.8  # which looks at 8 and 14
    routed = route("global_attention", x, 3, {"cell": 0}, attention_BNN=spread, grid=(4, 4))
    assert routed.index_Bn[0].tolist() == [3, 8, 14]
    recycled = route("global_attention", x, 4, {"cell": 4.0}, attention_BNN=spread, grid=(4, 4))
    assert (recycled.index_Bn < 0).sum() == 1
    assert recycled.owner_BN is not None
    assert (recycled.owner_BN >= 0).all(), "nothing is lost"


def test_patch_entropy() -> None:
    pixels = torch.zeros(1, 3, 8, 16)
    pixels[..., 8:] = torch.arange(64.0).reshape(8, 8)
    entropy = patch_entropy(pixels, (1, 2))
    torch.testing.assert_close(entropy, torch.tensor([[0.0, 6.0]]))


# --- in the language model ---


def test_late_exit() -> None:
    x = tokens_of(2)
    assert route("late_exit", x, 4).tokens_BnD.shape == (2, 0, WIDTH)
    share = torch.tensor([[0.01, 0.02], [0.3, 0.0]])
    mask = route("late_exit", x, 4, {"threshold": 0.1}, share_B2=share).mask_Bn
    assert mask is not None
    assert mask.all(1).tolist() == [False, True]
    assert mask.any(1).tolist() == [False, True]


def test_the_threshold_of_an_exit_lets_no_large_change_through() -> None:
    share = torch.tensor([[0.1, 0.0], [0.2, 0.5], [0.3, 0.0], [0.4, 0.0]])
    change = torch.tensor([0.001, 0.002, 0.02, 0.001])
    assert fit_threshold(share, change, 0.01) == pytest.approx(0.3)
    assert fit_threshold(share, change, 0.0015) == pytest.approx(0.3), "both shares must be below it"
    assert fit_threshold(share, change, 0.0005) == pytest.approx(0.1)
    assert fit_threshold(share, change, 0.1) is None


def test_core_neurons_keep_what_the_words_switch_on_and_cut_at_the_knee() -> None:
    x, neurons = tokens_of(1), torch.zeros(1, 16, 20, dtype=torch.bool)
    words = torch.zeros(1, 3, 20, dtype=torch.bool)
    words[:, :2, :10], words[:, 2] = True, True  # the third is padding
    mask = torch.tensor([[True, True, False]])
    neurons[:, [4, 6], :9], neurons[:, 1, 10:] = True, True
    items: dict[str, Any] = {
        "neurons_BNI": neurons,
        "text_neurons_BTI": words,
        "text_BTE": torch.zeros(1, 3, WIDTH),
        "text_mask_BT": mask,
    }
    assert route("core_neurons", x, 2, **items).index_Bn[0].tolist() == [4, 6]
    cut = route("core_neurons", x, 8, {"knee": True}, **items)
    assert cut.mask_Bn is not None
    assert cut.index_Bn[0][cut.mask_Bn[0]].tolist() == [4, 6]
    assert bend(torch.tensor([[10.0, 9.0, 1.0, 0.5, 0.0]])).item() == 1.0
    generator = torch.Generator().manual_seed(0)
    for tokens in range(4, 64):
        score = torch.randint(0, 12, (9, tokens), generator=generator).sort(descending=True).values
        for row, found in zip(score.tolist(), bend(score.float())[:, 0].tolist(), strict=True):
            far = [abs((v - row[0]) * (tokens - 1) - (row[-1] - row[0]) * i) for i, v in enumerate(row)]
            assert found == row[far.index(max(far))], "of equal distances the first"


def test_attention_growth_counts_growth_only() -> None:
    x, growth = tokens_of(1), torch.full((1, 16), -5.0)
    growth[0, [2, 13]] = 0.1
    mask = torch.tensor([[True]])
    found = route("attention_growth", x, 2, {"text": 0.0}, growth_BN=growth, text_BTE=x[:, :1], text_mask_BT=mask)
    assert found.index_Bn[0].tolist() == [2, 13]


def test_facility_location_takes_representatives_and_listens_to_the_words() -> None:
    x, mask = clusters(), torch.tensor([[True]])
    plain = route("facility_location", x, 4, {"text": 0.0}, text_BTE=x[:, :1], text_mask_BT=mask)
    assert (plain.index_Bn[0] // 4).tolist() == [0, 1, 2, 3]
    asked = route("facility_location", x, 1, {"text": 100.0}, text_BTE=x[:, 9:10], text_mask_BT=mask)
    assert asked.index_Bn.tolist() == [[9]]


def test_carried_scores_decide() -> None:
    assert route("carried", tokens_of(1), 2, score_BN=planted(3, 11, batch=1)[0]).index_Bn[0].tolist() == [3, 11]
