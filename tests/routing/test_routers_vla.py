"""Routers made for action models, and what goes with them: known answers, what holds for any input, what is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvla.policy.model.routers.layer_router import renumbered
from cogvla.routing.draws import uniform
from cogvla.routing.registry import build_router
from cogvla.routing.router import RouterContext, RouterSizes
from cogvla.routing.routers.channel_attention import over_channels
from cogvla.routing.routers.compressor_vla import windows_of
from cogvla.routing.routers.grids import bilinear
from cogvla.routing.routers.lightvla import votes, wishes
from cogvla.routing.routers.team_vla import density, seeds
from cogvla.routing.routers.token_pooling import around
from cogvla.tests.support.router_contexts import WIDTH, context_for, router_of, tokens_of

ONE_WORD = torch.tensor([[True]])


def sizes(budget: int, width: int = WIDTH, grid: tuple[int, int] = (4, 4)) -> RouterSizes:
    return RouterSizes(grid[0] * grid[1], width, width, grid, budget)


# --- LightVLA ---

FOUR = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.9, 0.1]]])


@pytest.mark.parametrize(("budget", "kept"), [(1, [3]), (2, [1, 3]), (3, [0, 1, 3])])
def test_tokens_vote_and_the_largest_wish_decides_where_votes_do_not(budget: int, kept: list[int]) -> None:
    words, mask = torch.eye(2)[None], torch.ones(1, 2, dtype=torch.bool)
    wish = wishes(FOUR, words, mask)
    assert wish.argmax(-1).tolist() == [[3, 1, 1, 3]]
    router = build_router("lightvla", sizes(budget, 2, (2, 2)), {"noise": 0.0})
    routed = router(FOUR, RouterContext(budget, text_BTE=words, text_mask_BT=mask))
    if budget > 1:  # with one, 1 and 3 have two votes each, and the wish decides
        assert routed.index_Bn.tolist() == [kept]
    assert routed.score_BN is not None
    assert routed.score_BN.floor().tolist() == [[0, 2, 0, 2]]


def test_wishes_by_hand() -> None:
    x, words = tokens_of(2).double(), torch.randn(2, 3, WIDTH).double()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = wishes(x, words, mask)
    for row, count in enumerate((2, 3)):
        p, t = (v / v.pow(2).mean(-1, keepdim=True).sqrt() for v in (x[row], words[row, :count]))
        q = (p @ t.T / WIDTH**0.5).softmax(-1) @ t
        q = q / q.pow(2).mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(found[row], q @ p.T / WIDTH**0.5, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_every_token_has_one_vote_and_more_votes_always_win(tokens: int, seed: int) -> None:
    wish = torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    score = votes(wish)
    count = torch.stack([torch.bincount(row, minlength=tokens) for row in wish.argmax(-1)])
    assert torch.equal(score.floor().long(), count)
    assert (score.floor().sum(1) == tokens).all()


def test_training_changes_no_value_but_gives_the_wishes_a_gradient() -> None:
    x = tokens_of().requires_grad_()
    router = router_of("lightvla", 4, noise=0.0)
    context = context_for(router, training=True)
    trained, plain = router(x, context), router(x, context_for(router))
    assert torch.equal(trained.tokens_BnD, plain.tokens_BnD)
    (through,) = torch.autograd.grad(trained.tokens_BnD.square().sum(), x, retain_graph=True)
    (kept_only,) = torch.autograd.grad(plain.tokens_BnD.square().sum(), x)
    dropped = torch.ones(3, 16, dtype=torch.bool).scatter_(1, plain.index_Bn, False)
    assert (kept_only[dropped] == 0).all()
    assert (through[dropped] != 0).any(-1).all(), "dropped tokens learn to be kept"
    noisy = router_of("lightvla", 4, noise=50.0)
    drawn = [noisy(x, context_for(noisy, training=True, draw_B=torch.full((3,), seed))).index_Bn for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(noisy(x, context_for(noisy)).index_Bn, plain.index_Bn), "no noise outside of training"


def test_the_wishes_learn_to_keep_what_the_loss_asks_for() -> None:
    """One token holds the target; nothing but the straight-through gradient can move the choice towards it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 9, WIDTH, generator=generator)
    target = torch.arange(16) % 9
    x[torch.arange(16), target] += 2.0
    x[torch.arange(16), target, 0] += 3.0
    words, mask = torch.nn.Parameter(0.1 * torch.randn(1, 2, WIDTH, generator=generator)), torch.ones(16, 2).bool()
    router = build_router("lightvla", RouterSizes(9, WIDTH, WIDTH, (3, 3), 1), {"noise": 0.0})
    optimiser = torch.optim.Adam([words], 3e-2)

    def hits(training: bool) -> tuple[Tensor, float]:
        given = RouterContext(1, training, text_BTE=words.expand(16, -1, -1), text_mask_BT=mask)
        routed = router(x, given)
        return routed.tokens_BnD[..., 0].mean(), (routed.index_Bn[:, 0] == target).float().mean().item()

    before = hits(False)[1]
    for _ in range(60):
        optimiser.zero_grad()
        (-hits(True)[0]).backward()
        optimiser.step()
    assert before < 0.7 < 0.9 < hits(False)[1]


# --- GridS ---


@pytest.mark.parametrize(("point", "value"), [((0.5, 0.5), 1.5), ((0.25, 0.0), 0.25), ((1.0, 1.0), 3.0), ((0, 1), 2.0)])
def test_bilinear_samples(point: tuple[float, float], value: float) -> None:
    weight = bilinear(torch.tensor([[point]], dtype=torch.float32), (2, 2))
    assert (weight @ torch.tensor([0.0, 1, 2, 3])).item() == value


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_bilinear_is_torchs_with_aligned_corners(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, x = torch.rand(2, 5, 2, generator=generator), torch.randn(2, rows * columns, 3, generator=generator)
    weight = bilinear(points, (rows, columns))
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 5))
    picture = rearrange(x, "b (h w) d -> b d h w", h=rows)
    expected = F.grid_sample(picture, 2 * points[:, None] - 1, align_corners=True, padding_mode="border")[:, :, 0].mT
    torch.testing.assert_close(weight @ x, expected, rtol=1e-4, atol=1e-5)


def test_points_start_evenly_and_as_plain_samples() -> None:
    torch.manual_seed(0)
    router: Any = build_router("grids", sizes(9, grid=(12, 12)))
    x = torch.randn(2, 144, WIDTH)
    routed = router(x, RouterContext(9, grid=(12, 12)))
    points = router.points(x)
    apart = torch.cdist(points[0], points[0]) + torch.eye(9)
    assert apart.min() > 0.15, "nine points in a unit square"
    assert (routed.place_Bn.diff(dim=1) >= 0).all()
    order = (routed.score_BN.sum(1) - 9).abs()
    assert order.max() < 1e-4
    first = router(x, RouterContext(4, grid=(12, 12)))
    assert first.tokens_BnD.shape == (2, 4, WIDTH)
    weight = bilinear(points[:, :4], (12, 12)) @ x
    assert torch.allclose(first.tokens_BnD.sum(1), weight.sum(1), atol=1e-5)
    with pytest.raises(ValueError, match="learns 9 points"):
        router.leaves(10)


def test_points_move_to_what_is_asked_for() -> None:
    """A bright patch on a smooth slope, elsewhere in every picture: the sample has to find it."""
    generator = torch.Generator().manual_seed(0)
    where = torch.rand(64, 2, generator=generator)
    grid = torch.stack(torch.meshgrid(torch.linspace(0, 1, 6), torch.linspace(0, 1, 6), indexing="xy"), -1).flatten(
        0, 1
    )
    height = 1 - torch.cdist(where, grid)  # [64,36]
    x = torch.cat((height[..., None], where[:, None].expand(-1, 36, -1)), dim=-1)  # the picture says where
    torch.manual_seed(0)
    router: Any = build_router("grids", RouterSizes(36, 3, 3, (6, 6), 1), {"norm": False})
    optimiser = torch.optim.Adam(router.parameters(), 1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        (bilinear(router.points(x), (6, 6)) @ x)[..., 0].mean().neg().backward()
        optimiser.step()
    assert (router.points(x)[:, 0] - where).norm(dim=1).mean() < 0.12


# --- FLASH, TEAM-VLA, Compressor-VLA ---


def test_flash_pooling_by_hand() -> None:
    router: Any = build_router("flash_pooling", sizes(1, 2, (1, 2)))
    with torch.no_grad():
        router.queries.copy_(torch.tensor([[1.0, 0.0]]))
    routed = router(torch.tensor([[[0.0, 0.0], [1.0, 2.0]]]), RouterContext(1))
    torch.testing.assert_close(routed.tokens_BnD, torch.tensor([[[0.7311, 1.4621]]]), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="learns 1 queries"):
        router.leaves(2)


def test_seeds_and_their_neighbours() -> None:
    seed = torch.zeros(1, 25)
    seed[0, [6, 8]] = 1  # (1,1) and (1,3)
    around = density(seed, (5, 5))
    assert (around > 0).sum() == 15
    assert (around[0] > 1).nonzero().flatten().tolist() == [2, 7, 12]
    similar = torch.tensor([[[0.1, 0.9, 0.0], [0.2, 0.8, 0.3], [0.9, 0.0, 0.0]]])
    assert seeds(similar, torch.tensor([[True, True, False]])).tolist() == [[0, 1, 0]]
    assert seeds(similar, torch.tensor([[True, True, True]])).tolist() == [[1, 1, 0]]


def test_team_vla_keeps_the_neighbourhood_of_the_words() -> None:
    x = torch.eye(25)[None]
    words, mask = x[:, [6, 8]], torch.ones(1, 2, dtype=torch.bool)
    items: dict[str, Any] = {"text_BTE": words, "text_mask_BT": mask, "grid": (5, 5), "draw_B": torch.tensor([3])}
    sizes_25 = RouterSizes(25, 25, 25, (5, 5), 5)
    routed = build_router("team_vla", sizes_25, {"context": 0.0})(x, RouterContext(5, **items))
    assert routed.index_Bn.tolist() == [[2, 6, 7, 8, 12]], "where both meet, then the seeds themselves"
    mixed = build_router("team_vla", sizes_25, {"context": 0.4})(x, RouterContext(5, **items)).index_Bn[0].tolist()
    assert {2, 7, 12} <= set(mixed), "three by their score"
    others = [i for i in range(25) if i not in (2, 7, 12)]
    drawn = uniform(torch.tensor([3]), 25)[0][others].topk(2).indices
    assert set(mixed) - {2, 7, 12} == {others[i] for i in drawn}


def test_team_merge_is_the_mean_of_the_members() -> None:
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.3], [0.0, 1.0], [0.1, 5.0], [0.0, 2.0]]])
    routed = router_of("team_merge", 2)(x, RouterContext(2, attention_LBN=torch.tensor([[[0.9, 0.1, 0.1, 0.5, 0.2]]])))
    assert routed.place_Bn.tolist() == [[0, 3]]
    assert routed.owner_BN is not None
    assert routed.owner_BN.tolist() == [[0, 0, 1, 1, 1]]
    torch.testing.assert_close(routed.tokens_BnD, torch.tensor([[[2.0, 0.15], [0.1 / 3, 8 / 3]]]))


def test_compressor_starts_with_the_means_of_windows() -> None:
    torch.manual_seed(0)
    x = tokens_of()
    router: Any = build_router("compressor_vla", sizes(5))
    assert router.windows == (2, 2)
    with torch.no_grad():
        router.semantic.zero_()
    routed = router(x, context_for(router))
    pooled = build_router("spatial_pool", sizes(4))(x, RouterContext(4, grid=(4, 4)))
    assert routed.place_Bn[0].tolist() == [5, 7, 8, 13, 15], "four windows and one in the middle"
    torch.testing.assert_close(routed.tokens_BnD[:, [0, 1, 3, 4]], pooled.tokens_BnD)
    torch.testing.assert_close(routed.tokens_BnD[:, 2], x.mean(1))


def test_compressor_windows() -> None:
    assert windows_of((16, 16), 80, None) == (8, 8), "the paper's 64 windows and 16 queries"
    assert windows_of((16, 16), 80, 16) == (8, 8)
    assert windows_of((4, 4), 1, None) == (1, 1)
    assert windows_of((5, 7), 9, None) == (1, 1), "primes"
    assert windows_of((2, 7), 8, None) == (1, 7)
    with pytest.raises(ValueError, match=r"at least 7 windows of 2 x 7 patches, .* a budget of 8 or more instead of 7"):
        windows_of((2, 7), 7, None)
    with pytest.raises(ValueError, match=r"2 queries has no 3 windows .* possible budgets: 3, 4, 6, 10, 18"):
        router_of("compressor_vla", 5, queries=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lightvla", {"noise": -1}, "needs noise >= 0"),
        ("grids", {"hidden": 0}, "needs hidden >= 1"),
        ("team_vla", {"context": 2}, r"needs context in \[0, 1\]"),
        ("compressor_vla", {"width": 0}, "needs width >= 1"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_of(name, 4, **options)


# --- Vision Remember ---


def test_remembering_starts_as_nothing_and_looks_at_own_patches_only() -> None:
    torch.manual_seed(0)
    router: Any = build_router("vision_remember", RouterSizes(4, WIDTH, WIDTH, None, 4, 6))
    x, patches = torch.randn(2, 4, WIDTH), torch.randn(2, 8, 6)
    owner = torch.tensor([[0, 0, 1, 1, 1, 3, 3, -1], [2, 2, 2, 2, 2, 2, 2, 2]])
    assert torch.equal(router(x, RouterContext(4, patches_BPF=patches, owner_BP=owner)).tokens_BnD, x)
    with torch.no_grad():
        router.out.weight.normal_()
    before = router(x, RouterContext(4, patches_BPF=patches, owner_BP=owner)).tokens_BnD
    assert ((before - x).abs().sum(-1) > 1e-3).tolist() == [[True, True, False, True], [False, False, True, False]]
    changed = patches.clone()
    changed[0, 3] += 1
    after = router(x, RouterContext(4, patches_BPF=changed, owner_BP=owner)).tokens_BnD
    assert (before != after).any(-1).tolist() == [[False, True, False, False], [False] * 4]
    alone = router(x, RouterContext(4, patches_BPF=patches[:, :1], owner_BP=owner[:, :1])).tokens_BnD[0, 0]
    value = router.kv(router.patch_norm(patches[0, 0]))[64:]
    torch.testing.assert_close(alone, x[0, 0] + router.out(value))


def test_owners_after_tokens_are_removed() -> None:
    owner, stayed = torch.tensor([[0, 2, 1, 2, -1]]), torch.tensor([[0, 2]])
    assert renumbered(owner, stayed, 3).tolist() == [[0, 1, -1, 1, -1]]


# --- refined tokens, and outliers ---


def test_channels_attend_to_channels() -> None:
    q, k, v = torch.eye(2), torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 2], [3, 4]])
    expected = torch.tensor([[0.1956, 0.5], [0.8044, 0.5]])
    torch.testing.assert_close(over_channels(q, k, v, mean=False), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        over_channels(q, torch.cat((k, k)), torch.cat((v, v)), True), over_channels(q, k, v, True)
    )
    with pytest.raises(ValueError, match="cannot cut width 12 into 5 groups"):
        router_of("channel_attention", 4, groups=5)


def test_means_of_the_surroundings() -> None:
    ramp = torch.arange(25.0)[None, :, None]
    near, far = around(ramp, (5, 5), 1)[0, :, 0], around(ramp, (5, 5), 2)[0, :, 0]
    assert near[12].item() == far[12].item() == 12
    assert near[0].item() == (0 + 1 + 5 + 6) / 4, "only what is inside counts"
    assert far[0].item() == (0 + 2 + 10 + 12) / 4
    router: Any = build_router("token_pooling", RouterSizes(25, 1, 1, (5, 5), 25))
    with torch.no_grad():
        router.weigh.bias.copy_(torch.tensor([0.0, 100, 0, 0]))
    context = RouterContext(25, grid=(5, 5))
    torch.testing.assert_close(router(ramp, context).tokens_BnD[0, :, 0], near)
    with torch.no_grad():
        router.weigh.bias.copy_(torch.tensor([0.0, -100, -100, -100]))
    torch.testing.assert_close(router(ramp, context).tokens_BnD, ramp)


@pytest.mark.parametrize("name", ["channel_attention", "token_pooling"])
def test_a_refined_base_is_the_base_on_other_tokens(name: str) -> None:
    x, router = tokens_of(), router_of(name, 4, base="token_norm")
    routed: Any = router(x, context_for(router))
    refined = router.refine(x, context_for(router))  # type: ignore[operator]
    assert not torch.allclose(refined, x)
    expected = build_router("token_norm", sizes(4))(refined, RouterContext(4))
    torch.testing.assert_close(routed.tokens_BnD, expected.tokens_BnD)
    assert torch.equal(routed.place_Bn, expected.place_Bn)
    assert (routed.index_Bn == -1).all(), "none of them is a token of the input"
    assert torch.equal(routed.owner_BN.gather(1, routed.place_Bn), torch.arange(4).expand(3, -1))
    assert (routed.owner_BN >= 0).sum() == 12
    pooled = router_of(name, 4, base="spatial_pool")
    assert pooled.leaves(4) == 4
    with pytest.raises(ValueError, match="possible budgets"):
        pooled.leaves(5)


def test_a_base_for_other_stages_is_explained() -> None:
    with pytest.raises(ValueError, match="base 'late_exit' works at llm_layer only: choose one for encoder_out, proj"):
        router_of("token_pooling", 4, base="late_exit")


@pytest.mark.parametrize("base", ["cls_attention", "token_norm", "diversity", "visual_attention_merge", "identity"])
def test_outliers_are_taken_away_before_the_base_chooses(base: str) -> None:
    if base in ("visual_attention_merge", "identity"):
        with pytest.raises(ValueError, match=f"needs a base that chooses tokens .* not '{base}'"):
            router_of("damro", 4, base=base)
        return
    x = tokens_of()
    attention = torch.rand(1, 3, 16, generator=torch.Generator().manual_seed(3))
    attention[..., [2, 9]] += 1
    router = router_of("damro", 4, base=base, count=2)
    routed = router(x, context_for(router, attention_LBN=attention))
    others = [i for i in range(16) if i not in (2, 9)]
    plain = build_router(base, RouterSizes(14, WIDTH, WIDTH, None, 4)).eval()
    alone = plain(x[:, others], context_for(plain, attention_LBN=attention[..., others]))
    assert torch.equal(routed.index_Bn, torch.tensor(others)[alone.index_Bn])
    assert routed.score_BN is not None
    assert (routed.score_BN[:, [2, 9]] <= routed.score_BN.amin(1, keepdim=True)).all()
    everything = router(x, context_for(router, attention_LBN=attention, budget=15)).index_Bn
    assert not (everything == 9).logical_or(everything == 2).all()
    assert everything.shape == (3, 15), "as many outliers are taken as the budget allows"


def test_the_trend_is_taken_out_of_the_attention_before_the_outliers() -> None:
    """Of two pictures in a row; the other way round, `debias` would not know which tokens are left."""
    for base in ({"base": "debias"}, {"base": "adp", "base_options": {"base": "debias", "gate": "none"}}):
        with pytest.raises(ValueError, match=r"damro needs a base without debias.*: put debias around damro"):
            router_of("damro", 4, **base)
    trend = torch.exp(0.3 * torch.arange(8.0)).repeat(2)
    profile = trend.clone()
    for token, factor in ((2, 3.0), (9, 2.0), (12, 1.5)):
        profile[token] *= factor
    options = {"rate": 0.3 * 8 / 576, "base": "damro", "base_options": {"count": 1}}
    router = build_router("debias", RouterSizes(16, WIDTH, WIDTH, None, 2, views=2), options)
    routed = router(tokens_of(), RouterContext(2, attention_LBN=profile.expand(1, 3, -1)))
    assert routed.index_Bn[0].tolist() == [9, 12], "2 is the outlier"
    assert routed.score_BN is not None
    torch.testing.assert_close(routed.score_BN[0, [9, 12, 15]], torch.tensor([2.0, 1.5, 1.0]))
