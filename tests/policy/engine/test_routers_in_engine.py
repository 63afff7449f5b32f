"""Token routers in the engine: every router runs there, recorded, and computes what the model computes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cogvla.tests.support.small_data as small
from cogvla.policy.cost.timing import _stages
from cogvla.policy.engine.engine import Engine, EngineConfig
from cogvla.policy.engine.recording import record
from cogvla.policy.model.vision import cut_patches
from cogvla.policy.policy import CogVLAPolicy
from cogvla.routing.registry import registered_routers
from cogvla.routing.router import RoutedTokens, RouterConfig, RouterContext, TokenRouter
from cogvla.routing.selection import best, kept
from cogvla.tests.policy.engine.test_engine import assert_same, observation, random_policy

PATCHES = {"efa": False, "film": True, "lfp": False}
TRACE = EngineConfig("trace", text_buckets=(6,))
ALONE = [
    (name, stage, other)
    for name, kind in registered_routers().items()
    for stage in kind.stages
    for other in ({}, {"position": "compact"}, {"mode": "bypass"})
    if name != "carried"  # it needs a router before it
    and (not other or (stage == "llm_layer" and (kind.selects or "mode" not in other)))
]
TOGETHER: dict[str, dict[str, Any]] = {
    "before and in the layers": {"name": "token_norm", "layers": [1, 2], "layer_budgets": [3, 2]},
    "scores carried into a layer": {"name": "token_norm", "layers": [1], "layer_router": "carried"},
    "scores carried past LFP": {"name": "token_norm", "layers": [3], "layer_router": "carried", "layer_budgets": [1]},
    "growth in two layers": {"name": "attention_growth", "stage": "llm_layer", "layers": [1, 2], "budget": 3},
    "growth past LFP": {"name": "attention_growth", "stage": "llm_layer", "layers": [3], "budget": 2},
    "patches seen again past LFP": {"name": "token_norm", "layers": [3], "layer_router": "vision_remember"},
    "hidden tokens, which LFP passes over": {"name": "core_neurons", "stage": "llm_layer", "budget": 8,
                                             "options": {"knee": True}},
    "a layer is skipped": {"name": "token_norm", "stage": "llm_layer", "mode": "bypass"},
    "positions without gaps": {"name": "coverage", "position": "compact"},
    "joint views": {"name": "coverage", "joint": True},
    "scaled positions": {"name": "spatial_pool", "position": "v2pe"},
    "the same draw always": {"name": "random", "resample": False},
    "a budget of each step in training": {"name": "token_norm", "train_budgets": [2, 4]},
}  # fmt: skip


def routed_policy(router: dict[str, Any], **routing: Any) -> CogVLAPolicy:
    layers = {"layers": [1]} if router.get("stage") == "llm_layer" else {}
    depth = max([1, *router.get("layers", [])]) + 2
    return random_policy(
        {"language": {"layers": depth}}, {**PATCHES, **routing, "router": {"budget": 4, **layers, **router}}
    )


@pytest.mark.parametrize(("name", "stage", "other"), ALONE)
def test_every_router_is_recorded_and_computes_what_the_model_computes(
    name: str, stage: str, other: dict[str, Any]
) -> None:
    policy = routed_policy({"name": name, "stage": stage, **other})
    engine = policy.with_engine(TRACE)
    engine.warm_up(2)
    assert engine.engine is not None
    assert list(engine.engine._recorded) == [(2, 6, False), *([(2, 6, True)] * (name == "adp"))]
    assert engine.engine._recorded[2, 6, False] is not engine.engine.network
    assert_same(policy, engine, 2)
    assert_same(policy, engine, 3)  # not recorded


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("routing", [{}, {"mode": "drop"}, {"lfp": True}, {"lfp": True, "mode": "drop"}])
def test_routers_together(name: str, routing: dict[str, Any]) -> None:
    if routing.get("lfp") and "bypass" in TOGETHER[name].values():
        pytest.skip("a router that skips layers replaces LFP")
    policy = routed_policy(TOGETHER[name], **routing)
    engine = policy.with_engine(TRACE)
    engine.warm_up(2)
    assert_same(policy, engine, 2)


def test_what_the_towers_saw_reaches_the_layers_of_the_engine() -> None:
    policy = routed_policy({"name": "spatial_pool", "layers": [1], "layer_router": "vision_remember"})
    assert policy.model.router is not None
    torch.nn.init.normal_(policy.model.router.layers["1"].out.weight)  # type: ignore[union-attr, arg-type]
    engine = policy.with_engine(TRACE)
    engine.warm_up(2)
    assert_same(policy, engine, 2)


@pytest.mark.parametrize(
    ("name", "efa"), [("token_norm", True), ("approx_error", True), ("text_guided", False), ("film_pruning", False)]
)
def test_released_weights_and_aggregation_tokens(name: str, efa: bool) -> None:
    """The engine may take the model's layers, and the language model's routers read what is copied of them."""
    router = {"name": name, "budget": 2, "layers": [1, 3], "layer_router": "attention_growth"}
    expected = routed_policy(router, efa=efa)
    policy = routed_policy(router, efa=efa).with_engine(TRACE, release=True)
    policy.warm_up(2)
    assert_same(expected, policy, 2)


def test_other_routers_share_the_engine_s_weights() -> None:
    plain = random_policy(routing=PATCHES)
    with torch.inference_mode():
        first = Engine(plain.model, TRACE)
        for router in (RouterConfig("token_norm", 4), RouterConfig("cls_attention", 4, "llm_layer", layers=(1,))):
            model = plain.model.with_router(router).eval()
            other = first.with_router(model)
            engine = CogVLAPolicy(model, small.small_preprocessor(), engine=other)
            engine.warm_up(2)
            assert_same(CogVLAPolicy(model, small.small_preprocessor()), engine, 2)
            old, new = (dict(each.network.named_buffers()) for each in (first, other))
            assert all(new[key] is value for key, value in old.items()), "nothing is copied"
    assert first.network.router is None
    assert not first._recorded


def test_a_router_of_an_engine_does_not_train() -> None:
    plain = random_policy(routing=PATCHES)
    with torch.inference_mode():
        first = Engine(plain.model, TRACE)
        other = first.with_router(plain.model.train().with_router(RouterConfig("lightvla", 4)))
    assert other.network.router is not None
    assert not any(module.training for module in other.network.router.modules())


@pytest.mark.parametrize("fusion", ["concat", "mix", "sum", "experts"])
def test_a_projector_in_half_precision_is_recorded_in_full(fusion: str) -> None:
    policy = routed_policy({"name": "zeroth_order"}, fusion=fusion)
    plain = copy.deepcopy(policy.model)
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16()
    engine = policy.with_engine(EngineConfig("trace", text_buckets=(6,), dtype="bfloat16"))
    engine.warm_up(2)
    assert_same(CogVLAPolicy(plain, small.small_preprocessor()), engine, 2, tolerance=2**-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_routers_need_the_model_s_precision(dtype: str) -> None:
    plain = random_policy(routing=PATCHES)
    engine = plain.with_engine(EngineConfig("trace", dtype=dtype, smallest=16)).engine
    assert engine is not None
    with pytest.raises(ValueError, match=rf"not {dtype}: give engine\.dtype=null"):
        engine.with_router(plain.model.with_router(RouterConfig("random", 4)))


@pytest.mark.parametrize("engine", [None, TRACE])
def test_a_policy_with_routers_is_timed_as_a_whole(engine: EngineConfig | None) -> None:
    policy = routed_policy({"name": "token_norm", "layers": [1], "layer_budgets": [2]})
    policy = policy if engine is None else policy.with_engine(engine)
    assert list(_stages(policy, observation(1), 1)) == ["prepare"]


class HostRouter(TokenRouter):
    """Decide on the host, so that a recording would repeat the decision of its example."""

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        scores_BN = tokens_BND.float().sum(-1)
        return kept(tokens_BND, best(scores_BN if float(scores_BN.sum()) > 0 else -scores_BN, context.budget))


class OddRouter(TokenRouter):
    """Keep tokens that a loop over the example's values chose."""

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        order = [sorted(range(len(row)), key=row.__getitem__) for row in tokens_BND[..., 0].tolist()]
        return kept(tokens_BND, torch.tensor(order)[:, : context.budget])


class FailingRouter(TokenRouter):
    """Refuse to be recorded."""

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        if torch.jit.is_tracing():
            raise RuntimeError("not while it is recorded")
        return kept(tokens_BND, best(tokens_BND[..., 0], context.budget))


class WordCounter(TokenRouter):
    """Rank by the number of words, counted on the host, where the recording does not see it."""

    needs = frozenset({"text_BTE"})

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_mask_BT is not None
        sign_B = torch.tensor([1.0 if words > 3 else -1.0 for words in context.text_mask_BT.sum(1).tolist()])
        return kept(tokens_BND, best(tokens_BND[..., 0] * sign_B[:, None], context.budget))


class WordReader(TokenRouter):
    """Rank by the embedding of the first word, which numpy reads."""

    needs = frozenset({"text_BTE"})

    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        assert context.text_BTE is not None
        first_B1E = torch.from_numpy(context.text_BTE[:, :1].detach().float().numpy().copy())
        return kept(tokens_BND, best((tokens_BND[..., :8] * first_B1E[..., :8]).sum(-1), context.budget))


@pytest.mark.parametrize("kind", [HostRouter, OddRouter, FailingRouter, WordCounter, WordReader])
def test_a_router_that_cannot_be_recorded_runs_without_a_recording_and_says_so(
    kind: type[TokenRouter], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cogvla.routing import registry

    monkeypatch.setitem(registry._ROUTERS, "mine", kind)
    policy = routed_policy({"name": "mine"})
    with pytest.raises(ValueError, match=r"'mine' cannot be recorded, give engine\.kind=auto or eager: .+") as error:
        policy.with_engine(TRACE).warm_up(2)
    assert "\n" not in str(error.value)
    engine = policy.with_engine(EngineConfig(text_buckets=(6,)))
    engine.warm_up(2)
    assert "router 'mine' cannot be recorded" in capsys.readouterr().out
    assert engine.describe()["engine"] == "eager"
    for seed in range(3):
        seen = observation(2, seed)
        np.testing.assert_allclose(engine.act(seen).actions, policy.act(seen).actions, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 2, 3, 16, 16), (2, 1, 3, 32, 16)])
def test_pictures_that_lie_in_one_piece_are_recorded(shape: tuple[int, ...]) -> None:
    """Patches are cut eight bytes at a time there, which torch.jit cannot record."""
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert pixels.is_contiguous()
    run = record("trace", lambda given: cut_patches(given["pixels"], 8, torch.float32), {"pixels": pixels})
    assert torch.equal(run({"pixels": pixels.flip(0)}), cut_patches(pixels.flip(0), 8, torch.float32))
