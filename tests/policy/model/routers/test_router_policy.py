"""Token routers inside the policy: what they get, where their tokens go, and that nothing changes without them."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvla.policy.cost.flops import TOTAL, count_flops
from cogvla.policy.engine.engine import starting
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.language_layer import attention_rows, normed
from cogvla.policy.model.routers import layer_router
from cogvla.policy.model.routers.policy_router import PolicyRouter
from cogvla.policy.model.routers.schedule_objective import schedule_objective
from cogvla.policy.model.vision import cut_patches
from cogvla.routing import registry
from cogvla.routing.draws import uniform
from cogvla.routing.registry import registered_routers
from cogvla.routing.router import RoutedTokens, RouterConfig, RouterContext, TokenRouter
from cogvla.routing.schedule_search import search
from cogvla.routing.selection import best
from cogvla.tests.support.tiny_model import alone, tiny_config, tiny_input, tiny_model

PATCHES, VIEWS = 16, 2
NAN = float("nan")
WHOLE = ("identity", "channel_attention", "token_pooling")
EVERYWHERE = [
    (name, stage)
    for name, kind in registered_routers().items()
    for stage in kind.stages
    if name != "carried" and not (stage == "llm_layer" and name == "debias")
]


def routed(router: RouterConfig, **routing: Any) -> CogVLA:
    return tiny_model(**{"efa": False, "lfp": False, **routing}, router=asdict(router)).eval()


def config(name: str, stage: str | None = None, **options: Any) -> RouterConfig:
    layers = {"layers": (1, 2), "layer_budgets": (6, 3)} if stage == "llm_layer" else {}
    return RouterConfig(**{"name": name, "budget": 4, "stage": stage, **layers, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize(("name", "stage"), EVERYWHERE)
@torch.inference_mode()
def test_every_router_at_every_stage_leaves_the_tokens_it_says_alone_and_in_a_batch(
    name: str, stage: str, film: bool
) -> None:
    model = routed(config(name, stage), film=film)
    inputs = starting(model, tiny_input())
    output = model(inputs, debug=True)
    assert output.actions.isfinite().all()
    assert output.vision.shape[1] == model.vision_tokens
    if stage == "llm_layer":
        left = [32, 32] if name in (*WHOLE, "vision_remember") else [0, 0] if name == "late_exit" else [12, 6]
        assert [kept.shape[1] for kept in output.debug["kept"].values()] == left
    else:
        assert model.vision_tokens == (32 if name in WHOLE else VIEWS * 4)
    torch.testing.assert_close(model(inputs).actions, output.actions, rtol=1e-4, atol=1e-5)
    first = starting(model, alone(inputs, 1))
    torch.testing.assert_close(model(first).actions, output.actions[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vision", [{"efa": True}, {"efa": False}, {"efa": False, "film": True}])
@pytest.mark.parametrize("lfp", [True, False])
@torch.inference_mode()
def test_keeping_everything_changes_no_bit(vision: dict[str, Any], lfp: bool) -> None:
    inputs, plain = tiny_input(), tiny_model(**vision, lfp=lfp).eval()
    expected = plain(inputs).actions
    for router in (config("identity"), config("identity", position="compact"), config("random", budget=1.0)):
        assert torch.equal(plain.with_router(router)(inputs).actions, expected)


@torch.inference_mode()
def test_tokens_that_skip_a_layer_are_there_in_the_next_whatever_lfp_does() -> None:
    router = config("token_norm", "llm_layer", mode="bypass")
    skipped, dropped = (routed(router, mode=mode)(tiny_input(), debug=True) for mode in ("bypass", "drop"))
    assert torch.equal(skipped.actions, dropped.actions), "routing.mode is that of LFP, which is off"
    assert [choice.gone for choice in dropped.debug["choices"]] == [False, False]


def test_another_router_shares_the_weights_and_leaves_the_model_as_it_was() -> None:
    plain = tiny_model(efa=False)
    other = plain.with_router(config("random"))
    assert plain.router is None
    assert plain.config.routing.router.name is None
    assert other.router is not None
    assert all(a is b for a, b in zip(plain.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["lightvla", "selector_merger", "learned_pruner"])
@torch.inference_mode()
def test_another_router_trains_if_the_model_does(name: str) -> None:
    model = tiny_model(efa=False).eval().with_router(config(name))
    output = model(tiny_input())
    assert not output.losses
    assert torch.equal(output.actions, model.eval()(tiny_input()).actions)
    trained = model.train().with_router(config(name)).router
    assert trained is not None
    assert trained.training


def test_configurations_from_before_there_were_routers_have_none() -> None:
    body = tiny_config().to_dict()
    del body["routing"]["router"]
    built = CogVLAConfig.from_dict(body)
    assert built == tiny_config()
    assert CogVLA(built, tiny_model().embodiment).router is None
    with_router = tiny_config(router=asdict(config("diversity", options={"variant": "maxsum"}, layers=(1,))))
    assert CogVLAConfig.from_dict(with_router.to_dict()) == with_router


@torch.inference_mode()
def test_tokens_of_views_stay_apart_and_keep_their_places() -> None:
    inputs = tiny_input()
    model = routed(config("token_norm"))
    answer = model(inputs, debug=True).debug["routed"]
    assert ((answer.index_Bn // PATCHES) == torch.arange(VIEWS).repeat_interleave(4)).all()
    assert model.router is not None
    gap = model.router.gap(8)
    assert gap == 32 - 8
    context = model.encode_text(inputs.text_ids, inputs.text_mask).context
    layout = context.layout
    assert torch.equal(context.position_BS[0, layout.rest][:2], torch.tensor([33, 34]))
    frame = context.placed(1 + answer.place_Bn)
    assert torch.equal(frame.turn_BSU[0, layout.visual], context.turn_SU[1 + answer.place_Bn[0]])
    joint = routed(config("token_norm", joint=True))
    assert joint.vision_tokens == VIEWS * 4
    joint_index = joint(inputs, debug=True).debug["routed"].index_Bn
    assert joint_index.shape == (3, VIEWS * 4)
    assert not torch.equal(joint_index, answer.index_Bn), "views may have unequal shares"


@torch.inference_mode()
def test_positions() -> None:
    inputs, kinds = tiny_input(), ("keep", "compact", "v2pe")
    actions = [routed(config("token_norm", position=kind))(inputs).actions for kind in kinds]
    assert not torch.allclose(actions[0], actions[1])
    assert not torch.allclose(actions[0], actions[2])
    whole = routed(config("identity", position="v2pe", position_step=1.0))(inputs).actions
    torch.testing.assert_close(whole, routed(config("identity"))(inputs).actions)
    v2pe = routed(config("token_norm", position="v2pe"))
    assert v2pe.router is not None
    assert v2pe.router.gap(8) == 8 - 8, "32 tokens in steps of a quarter"
    text = v2pe.encode_text(inputs.text_ids, inputs.text_mask).context
    fractions = text.placed(1 + 0.25 * torch.arange(0, 32, 4).expand(3, -1)).turn_BSU[0, 1:9]
    torch.testing.assert_close(fractions, text.turn_SU[1:9])


@torch.inference_mode()
def test_both_towers_lose_the_same_patches() -> None:
    model, inputs = routed(config("token_norm")), tiny_input()
    output = model(inputs, debug=True)
    index = output.debug["routed"].index_Bn[..., None]
    picked = [stream.gather(1, index.expand(-1, -1, stream.shape[-1])) for stream in output.debug["streams"]]
    torch.testing.assert_close(output.vision, model.vision.fusion(picked, None))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the error. Rounding may exchange two tokens of equal worth, which one action may feel more."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["zeroth_order", "text_guided", "coverage", "learned_pruner", "film_aggregation"])
@torch.inference_mode()
def test_half_precision(name: str) -> None:
    inputs, model = tiny_input(), routed(config(name))
    expected = model(inputs).actions
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(inputs).actions, expected) < 0.3
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    assert relative_error(rounded(inputs).actions, expected) < 0.3


# --- what routers are given ---


@pytest.mark.parametrize("cls", [True, False])
@torch.inference_mode()
def test_attention_of_the_tower_is_that_of_its_block(cls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    body = tiny_config(efa=False, router=asdict(config("cls_attention", options={"layers": 2}))).to_dict()
    body["vision"]["dinov2"]["class_token"] = cls
    torch.manual_seed(0)
    model = CogVLA(CogVLAConfig.from_dict(body), tiny_model().embodiment).eval()
    seen: dict[str, Any] = {}
    assert model.router is not None
    before = model.router.before
    assert before is not None
    before.register_forward_pre_hook(lambda module, args: seen.update(context=args[1]))
    inputs = tiny_input()
    model(inputs)
    attention = seen["context"].attention_LBN
    assert attention.shape == (2, 6, PATCHES)
    tower = model.vision.named_towers()[0][1]
    inside: list[torch.Tensor] = []
    block = tower.vit.blocks[1]
    block.attn.register_forward_pre_hook(lambda module, args: inside.append(args[0]))
    model(inputs)
    attn, h = block.attn, inside[0]
    q, k, _ = attn.qkv(h).reshape(6, h.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
    whole = (q @ k.mT * attn.scale).softmax(-1).mean(1)
    prefix = 3 if cls else 2
    expected = whole[:, 0, prefix:] if cls else whole[:, prefix:, prefix:].mean(1)
    torch.testing.assert_close(attention[1], expected)


def test_attention_is_computed_for_those_who_ask_only(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny_input()
    monkeypatch.setattr(layer_router, "attention_rows", lambda *_: pytest.fail("not asked for"))
    for name in ("random", "token_norm", "approx_error", "late_exit"):
        routed(config(name, "llm_layer"))(inputs)
    for name, kind in registered_routers().items():
        if "encoder_out" in kind.stages:
            router = routed(config(name, "encoder_out")).router
            assert router is not None
            assert router.before is not None
            asks = any("attention" in item or item in ("received_BN", "keys_BNC") for item in router.before.needs)
            assert (router.probe() is not None) == asks, name


@torch.inference_mode()
def test_attention_rows_are_those_of_the_layer() -> None:
    model, inputs = tiny_model(efa=False, lfp=False).eval(), tiny_input()
    text = model.encode_text(inputs.text_ids, inputs.text_mask)
    output = model(inputs, text, debug=True)
    frame, layer = text.context.whole, model.decoder.llm.layers[1]
    h = normed(layer.input_layernorm, output.debug["hidden"][0])
    rows = attention_rows(layer, h, frame, frame.layout.actions)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
    layer.self_attn.config._attn_implementation = "eager"
    turn = frame.turn_BSU.unflatten(-1, (2, -1))
    cos, sin = turn[:, :, 0], turn[:, :, 1].clone()
    sin[..., : sin.shape[-1] // 2] *= -1  # transformers' sign
    weights = layer.self_attn(h, position_embeddings=(cos, sin), attention_mask=frame.mask_B1SS)[1]
    torch.testing.assert_close(rows, weights.mean(1)[:, frame.layout.actions])


# --- in the language model ---


@torch.inference_mode()
def test_a_layer_that_keeps_everything_changes_nothing_and_bypassed_tokens_pass_bit_for_bit() -> None:
    inputs, plain = tiny_input(), tiny_model(efa=False, lfp=False).eval()
    for mode in ("drop", "bypass"):
        same = plain.with_router(RouterConfig("token_norm", 1.0, "llm_layer", layers=(1, 2), mode=mode))  # type: ignore[arg-type]
        torch.testing.assert_close(same(inputs).actions, plain(inputs).actions)
    model = plain.with_router(RouterConfig("token_norm", 4, "llm_layer", layers=(1,), mode="bypass"))
    inside = model(inputs, debug=True).debug
    kept, visual = inside["kept"][1], inside["layout"].visual
    before, after = (inside["hidden"][i][:, visual] for i in (0, 1))
    skipped = torch.ones(3, 32, dtype=torch.bool).scatter_(1, kept, False)
    assert torch.equal(before[skipped], after[skipped])
    assert not torch.isclose(before[~skipped], after[~skipped]).all(-1).any()
    assert inside["hidden"][2].shape == inside["hidden"][0].shape


@pytest.mark.parametrize("name", ["token_norm", "core_neurons", "film_pruning", "learned_pruner"])
def test_a_router_chooses_and_learns_alike_whether_the_others_are_gone_or_skip_the_layer(name: str) -> None:
    plain, kept = tiny_model(efa=False, lfp=False), []
    for mode in ("drop", "bypass"):
        torch.manual_seed(0)
        model = plain.with_router(RouterConfig(name, 4, "llm_layer", layers=(1,), mode=mode)).train()  # type: ignore[arg-type]
        output = model(tiny_input(), debug=True, decode=False)
        output.states.square().mean().backward()
        assert model.router is not None
        assert all(parameter.grad is not None for parameter in model.router.parameters())
        kept.append(output.debug["kept"][1])
    assert torch.equal(*kept)


@torch.inference_mode()
def test_hidden_tokens_are_as_good_as_gone() -> None:
    """A threshold that all samples are below hides what the unconditional exit drops."""
    inputs, plain = tiny_input(), tiny_model(efa=False, lfp=False).eval()
    exits = [
        RouterConfig("late_exit", 1.0, layers=(2,), stage="llm_layer", options=o) for o in (None, {"threshold": 9.0})
    ]
    gone, hidden = (plain.with_router(router)(inputs).actions for router in exits)
    torch.testing.assert_close(gone, hidden, rtol=1e-4, atol=1e-5)
    stays = replace(exits[1], options={"threshold": 0.0})
    torch.testing.assert_close(plain.with_router(stays)(inputs).actions, plain(inputs).actions)
    assert not torch.allclose(gone, plain(inputs).actions)


@torch.inference_mode()
def test_an_exit_does_not_depend_on_the_padding_of_the_instruction() -> None:
    seen: list[RouterContext] = []
    router = RouterConfig("late_exit", 1.0, "llm_layer", layers=(2,), options={"threshold": 0.5})
    model, inputs = tiny_model(efa=False, lfp=False).eval().with_router(router), tiny_input()
    assert model.router is not None
    model.router.layers["2"].register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    for some in (inputs, alone(inputs, 0)):
        model(some)
    together, single = (context.share_B2 for context in seen)
    assert together is not None
    assert single is not None
    torch.testing.assert_close(together[:1], single)


class Quarter(TokenRouter):
    """Hide the first quarter of the tokens."""

    stages, hides = ("llm_layer",), True

    def route(self, tokens_BND: torch.Tensor, context: RouterContext) -> RoutedTokens:
        all_BN = torch.arange(32).expand(len(tokens_BND), -1)
        return RoutedTokens(tokens_BND, all_BN, all_BN, mask_Bn=all_BN >= 8)


@torch.inference_mode()
def test_a_token_that_one_layer_hid_is_hidden_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._ROUTERS, "quarter", Quarter)
    router = RouterConfig("quarter", 1.0, "llm_layer", layers=(1,))
    seen = routed(router)(tiny_input(), debug=True).debug["attention"]
    for layer in range(4):
        assert ((seen[layer][:, :8] == 0) == (layer > 0)).all()
        assert (seen[layer][:, 8:] > 0).all()
    with pytest.raises(ValueError, match=r"'quarter' hides tokens, and would choose among them again: give one router"):
        routed(replace(router, layers=(1, 2)))


@pytest.mark.parametrize("mode", ["drop", "bypass"])
@torch.inference_mode()
def test_lfp_passes_over_hidden_tokens(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._ROUTERS, "quarter", Quarter)
    router = RouterConfig("quarter", 1.0, "llm_layer", layers=(1,))
    inside = routed(router, lfp=True, mode=mode)(tiny_input(), debug=True).debug
    chosen = [choice for choice in inside["choices"] if choice.by == "LFP" and choice.layer]
    assert chosen
    assert all((choice.kept_Bn >= 8).all() for choice in chosen), "no layer keeps more than the 24 others"


@torch.inference_mode()
def test_carried_scores_prune_in_the_language_model() -> None:
    router = RouterConfig("token_norm", 8, layers=(1, 2), layer_router="carried", layer_budgets=(5, 2))
    inside = routed(router)(tiny_input(), debug=True).debug
    score, index = inside["routed"].score_BN, inside["routed"].index_Bn
    for layer, count in ((1, 10), (2, 4)):
        found = index.gather(1, inside["kept"][layer])
        expected = score.gather(1, index).topk(count, dim=1).indices.sort(1).values
        assert torch.equal(found, index.gather(1, expected))


@torch.inference_mode()
def test_random_draws_follow_the_observation() -> None:
    inputs = tiny_input()
    other = replace(inputs, state=inputs.state + 1)

    def chosen(model: CogVLA, given: Any) -> torch.Tensor:
        return model(given, debug=True).debug["routed"].index_Bn

    fresh, fixed = routed(config("random")), routed(config("random", resample=False))
    assert torch.equal(chosen(fresh, inputs), chosen(fresh, inputs))
    assert not torch.equal(chosen(fresh, inputs), chosen(fresh, other))
    assert torch.equal(chosen(fixed, inputs), chosen(fixed, other))
    assert not torch.equal(chosen(fixed, inputs), chosen(routed(config("random", resample=False, seed=1)), inputs))


@torch.inference_mode()
def test_every_layer_draws_anew_and_the_first_one_as_ever() -> None:
    """Of 32 tokens 16 and then 8 are left; with one draw for both layers, the first token stayed twice as often."""
    model, one = routed(config("random", "llm_layer", layer_budgets=(8, 4))), tiny_input((3,))
    many = 400
    states = torch.randn(many, 5, generator=torch.Generator().manual_seed(1))
    inputs = replace(
        one, pixels=one.pixels.expand(many, -1, -1, -1, -1), text_ids=one.text_ids.expand(many, -1),
        text_mask=one.text_mask.expand(many, -1), state=states,
    )  # fmt: skip
    kept = model(inputs, debug=True).debug["kept"]
    assert model.router is not None
    assert torch.equal(kept[1], best(uniform(model.router.draws(states), 32), 16)), "as with one layer"
    for token in (0, 16, 31):
        assert (kept[2] == token).any(1).float().mean().item() == pytest.approx(0.25, abs=0.09)


def test_training_draws_as_the_configuration_says() -> None:
    inputs = tiny_input()
    draws = [torch.tensor([[5, 0]] * 3), torch.tensor([[6, 0]] * 3)]
    other = config("random", "llm_layer", resample=False, seed=1)
    for router, same in ((config("random"), False), (config("random", resample=False), True), (other, True)):
        model = routed(router).train()
        tokens = [model(replace(inputs, draw=draw), decode=False, debug=True).debug for draw in draws]
        kept = [inside["routed"].index_Bn if inside["routed"] else inside["kept"][1] for inside in tokens]
        assert torch.equal(*kept) == same
        seen = model.eval()(inputs, debug=True).debug
        assert torch.equal(kept[0], seen["routed"].index_Bn if seen["routed"] else seen["kept"][1]) == same


def test_training_draws_budgets_and_router_losses_reach_the_output() -> None:
    model = routed(config("learned_pruner", train_budgets=(2, 8))).train()
    counts = set()
    for step in range(4):
        output = model(replace(tiny_input(), draw=torch.tensor([[5, step]] * 3)), decode=False)
        counts.add(output.vision.shape[1])
        assert output.losses.keys() == {"budget"}
    assert counts == {4, 16}
    assert model.eval()(tiny_input()).losses == {}


def test_a_schedule_is_found_for_a_policy() -> None:
    model = tiny_model(efa=False, lfp=False)
    objective = schedule_objective(model, tiny_input(), RouterConfig("token_norm", layer_router="carried"))
    schedule, value = search(objective, (1, 3), 4, 0.5, evaluations=6)
    assert -1 <= value <= 1
    assert schedule.mean(4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "router",
    [
        config("random"),
        config("random", "projector_out"),
        config("random", "llm_layer"),
        config("random", "llm_layer", mode="bypass"),
        config("random", layers=(2,), layer_router="late_exit"),
        config("spatial_pool", "encoder_block", block=1),
        config("spatial_pool", "encoder_block", block=0, layers=(2,), layer_router="random"),
    ],
    ids=lambda r: f"{r.stage}-{r.block}-{r.mode}-{r.layer_router}",
)
def test_flops_of_what_is_left_are_what_torch_counts(router: RouterConfig) -> None:
    model, inputs = routed(router), alone(tiny_input(), 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)
    costs = count_flops(model.config, model.embodiment, text_length=7)
    total = next(cost for cost in costs if cost.stage == TOTAL)
    assert total.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


# --- what the towers saw, in the language model ---


def remembering(name: str, **router: Any) -> CogVLA:
    return routed(config(name, layers=(1,), layer_budgets=(), layer_router="vision_remember", **router))


@torch.inference_mode()
def test_pooled_tokens_remember_the_patches_of_their_cell() -> None:
    inputs, seen = tiny_input(), []
    for name in ("spatial_pool", "grid_stride", "token_norm"):
        model = remembering(name)
        assert model.router is not None
        model.router.layers["1"].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        inside = model(inputs, debug=True).debug
        assert inside["present"][1] is None or inside["present"][1].shape[1] == 8
        torch.testing.assert_close(seen[-1].patches_BPF, torch.cat(inside["streams"], -1))
        plain = routed(config(name))
        assert torch.equal(model(inputs).actions, plain(inputs).actions), "weights of the start change nothing"
    cells = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    pooled, strided, chosen = seen[0].owner_BP, seen[2].owner_BP, seen[4].owner_BP
    assert torch.equal(pooled[0], torch.cat((cells, cells + 4)))
    for owner in (strided, chosen):
        assert (owner[:, :16] < 4).all()
        assert (owner[:, 16:] >= 4).all(), "views stay apart"
    kept = remembering("token_norm")(inputs, debug=True).debug["routed"].index_Bn
    assert torch.equal(chosen.gather(1, kept), torch.arange(8).expand(3, -1)), "a kept patch is its own"


@torch.inference_mode()
def test_with_joint_views_a_patch_belongs_to_the_nearest_kept_patch_of_its_own_picture() -> None:
    router = routed(config("token_norm", joint=True)).router
    assert router is not None
    for kept, expected in ([3, 8, 20], {4: 8, 7: 3, 16: 20, 31: 20}), ([3, 8, 9], {4: 8, 7: 3, 16: None, 31: None}):
        index_Bn = torch.tensor([kept])
        owner_P = router._owners(RoutedTokens(torch.zeros(1, 3, 1), index_Bn, index_Bn), torch.zeros(1))[0]
        found = {patch: None if owner_P[patch] < 0 else kept[owner_P[patch]] for patch in expected}
        assert found == expected


@torch.inference_mode()
def test_a_patch_that_went_into_no_token_belongs_to_the_nearest_one() -> None:
    router = routed(config("token_norm")).router
    assert router is not None
    place_Bn, owner_BN = torch.tensor([[5, 16]]), torch.full((1, 32), -1)
    owner_BN[0, [15, 31]] = torch.tensor([0, 1])
    owner_BN[0, 2] = 1
    merged = RoutedTokens(torch.zeros(1, 2, 1), torch.full_like(place_Bn, -1), place_Bn, owner_BN=owner_BN)
    assert router._owners(merged, torch.zeros(1))[0].tolist() == [0, 0, 1] + 13 * [0] + 16 * [1]
    seen: list[RouterContext] = []
    for name, options in (("token_pooling", {"base": "token_norm"}), ("visual_attention_merge", {"contextual": 0})):
        model = remembering(name, options=options)
        assert model.router is not None
        model.router.layers["1"].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        model(tiny_input())
        owner_BP = seen[-1].owner_BP
        assert owner_BP is not None
        assert (owner_BP >= 0).all(), name
        assert (owner_BP[:, :16] < 4).all()
        assert (owner_BP[:, 16:] >= 4).all(), "views stay apart"


def test_a_router_of_joint_views_knows_how_many_pictures_a_row_holds() -> None:
    for joint, views in ((True, 2), (False, 1)):
        router = routed(config("debias", joint=joint)).router
        assert router is not None
        assert router.before is not None
        assert router.before.sizes.views == views


def behind_lfp(router: RouterConfig) -> tuple[torch.Tensor, RouterContext, dict[str, Any]]:
    """Return what the router at layer 3 got after LFP removed tokens in layers 1 and 2, and the inside of the pass."""
    model, seen = routed(router, lfp=True, mode="drop"), []
    assert model.router is not None
    model.router.layers["3"].register_forward_pre_hook(lambda module, args: seen.append(args))
    inside = model(tiny_input(), debug=True).debug
    assert inside is not None
    return *seen[0], inside


@torch.inference_mode()
def test_what_is_known_of_tokens_follows_those_that_lfp_leaves() -> None:
    carried = RouterConfig("token_norm", 8, layers=(3,), layer_router="carried", layer_budgets=(1,))
    tokens, context, inside = behind_lfp(carried)
    left, routed = inside["kept"][2], inside["routed"]
    assert tokens.shape[1] == left.shape[1] == 4
    assert context.score_BN is not None
    assert torch.equal(context.score_BN, routed.score_BN.gather(1, routed.index_Bn).gather(1, left))

    tokens, context, inside = behind_lfp(RouterConfig("attention_growth", 4, stage="llm_layer", layers=(3,)))
    left, before = inside["kept"][2], inside["present"][2]
    earlier = inside["attention"][2].gather(1, (before[:, None] == left[..., None]).int().argmax(-1))
    torch.testing.assert_close(context.growth_BN, inside["attention"][3] - earlier)

    tokens, context, inside = behind_lfp(
        RouterConfig("token_norm", 8, layers=(3,), layer_budgets=(1,), layer_router="vision_remember")
    )
    kept = inside["routed"].index_Bn.gather(1, inside["kept"][2])
    assert context.owner_BP is not None
    assert torch.equal(context.owner_BP.gather(1, kept), torch.arange(4).expand(3, -1)), "a kept patch is its own"
    assert (context.owner_BP < 0).any()


@pytest.mark.parametrize("efa", [False, True])
@pytest.mark.parametrize("name", [name for name, stage in EVERYWHERE if stage == "llm_layer"] + ["carried"])
@torch.inference_mode()
def test_no_router_is_asked_for_more_tokens_than_lfp_left(name: str, efa: bool) -> None:
    if efa and name == "spec_prune":
        pytest.skip("it reads patches")
    for budget in (1, 1.0):
        router = RouterConfig("token_norm", 1.0, layers=(3,), layer_router=name, layer_budgets=(budget,))
        model = routed(router, efa=efa, lfp=True, mode="drop")
        inside, last = model(starting(model, tiny_input()), debug=True).debug, model.plan()[3]
        (kept,) = (choice.kept_Bn for choice in inside["choices"] if choice.by == "router")
        assert kept.shape[1] == last.enter <= last.arrive == inside["kept"][2].shape[1]
        assert all(row.unique().numel() == last.enter for row in kept), "each once"
        vision = inside["hidden"][3].shape[1] - inside["layout"].length + inside["layout"].vision
        assert vision == last.leave


@torch.inference_mode()
def test_lfp_may_leave_nothing_for_a_router() -> None:
    few = {"efa": True, "lfp": True, "mode": "drop", "schedule": "shiftedlinear_decay", "period": 2}
    for name in ("random", "diversity", "team_merge", "late_exit", "vision_remember"):
        model = routed(config(name, "llm_layer", layers=(3,), layer_budgets=(2,)), **few)
        assert [tokens.enter for tokens in model.plan()][3] == 0
        assert model(tiny_input()).actions.isfinite().all()


@pytest.mark.parametrize("mode", ["drop", "bypass"])
def test_a_budget_that_is_drawn_in_training_may_be_less_than_a_layer_keeps(mode: Any) -> None:
    for name in ("diversity", "film_pruning", "random"):
        router = RouterConfig(
            "token_norm", 8, layers=(1, 2), layer_router=name, layer_budgets=(6, 3), train_budgets=(2, 8), mode=mode
        )
        model, plans = routed(router).train(), []
        for step in range(2):
            inside = model(replace(tiny_input(), draw=torch.tensor([[5, step]] * 3)), debug=True, decode=False).debug
            plans.append([inside["kept"][layer].shape[1] for layer in (1, 2)])
        assert plans == [[4, 4], [12, 6]]
    fixed = replace(router, layer_router="film_aggregation", mode="drop")
    with pytest.raises(ValueError, match="learns 12 tokens; the budget cannot be 4"):
        routed(fixed)


@pytest.mark.parametrize("name", ["identity", "token_norm", "vision_remember"])
def test_a_layer_that_keeps_everything_keeps_all_of_a_larger_budget_that_is_drawn(name: str) -> None:
    router = RouterConfig("token_norm", 2, layers=(1,), layer_router=name, layer_budgets=(1.0,), train_budgets=(2, 8))
    model, lfp = routed(router).train(), {"lfp": True, "mode": "drop", "schedule": "deep_all"}
    for step, left in ((0, 4), (1, 16)):
        drawn = replace(tiny_input(), draw=torch.tensor([[5, step]] * 3))
        assert model(drawn, debug=True, decode=False).debug["kept"][1].shape[1] == left
        assert routed(router, **lfp)(drawn, debug=True, decode=False).debug["kept"][2].shape[1] == left // 2


def test_what_remembers_needs_tokens_that_were_reduced_and_not_skipped() -> None:
    with pytest.raises(ValueError, match="cannot bypass a layer"):
        routed(config("spatial_pool", layers=(1,), layer_router="vision_remember", mode="bypass"))
    with pytest.raises(ValueError, match=r"which router.stage=encoder_block has reduced"):
        routed(config("spatial_pool", "encoder_block", layers=(1,), layer_router="vision_remember"))


def test_a_router_that_is_the_projector_is_counted_instead_of_it() -> None:
    model = routed(config("flex_count", options={"variant": "projector"}))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(alone(tiny_input(), 1))
    assert output.vision.shape[1:] == (8, 32)
    total = next(cost for cost in count_flops(model.config, model.embodiment, 7) if cost.stage == TOTAL)
    assert total.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


# --- inside of the towers, and guided from below ---


@torch.inference_mode()
def test_pooling_before_the_first_block_is_pooling_the_embedded_patches() -> None:
    """Beside them the tower computes [CLS] and registers, as ever."""
    inputs, model = tiny_input(), routed(config("spatial_pool", "encoder_block", block=0))
    text = model.encode_text(inputs.text_ids, inputs.text_mask)
    assert model.router is not None
    streams = model.vision.streams(inputs.pixels, text.vision, reducer=model.router.reducer())
    for (_, tower), stream in zip(model.vision.named_towers(), streams, strict=True):
        patches = cut_patches(inputs.pixels, tower.patch_size, torch.float32)
        vit, grid = tower.vit, (F.linear(patches, *tower.embedding()) + tower.vit.pos_embed).unflatten(1, (4, 4))
        few = F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), (2, 2)).flatten(2).mT
        prefix = [token.expand(len(few), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        x = torch.cat((*prefix, few), dim=1)
        for block in vit.blocks[: tower.computed]:
            x = block(x)
        expected = x[:, vit.num_prefix_tokens :].unflatten(0, (-1, VIEWS)).flatten(1, 2)
        torch.testing.assert_close(stream, expected)


@torch.inference_mode()
def test_tokens_reduced_inside_of_the_towers_keep_their_places_and_go_on() -> None:
    inputs = tiny_input()
    for router in (config("semantic_tokens", "encoder_block"), config("spatial_pool", "encoder_block", block=1)):
        model = routed(replace(router, layers=(2,), layer_router="token_norm", layer_budgets=(2,)))
        output = model(inputs, debug=True)
        found = output.debug["routed"]
        assert output.vision.shape[1] == model.vision_tokens == VIEWS * 4
        middles = [5, 7, 13, 15]
        assert found.place_Bn[0].tolist() == middles + [16 + i for i in middles]
        assert output.debug["kept"][2].shape[1] == VIEWS * 2
        torch.testing.assert_close(model(alone(inputs, 1)).actions, output.actions[1:2], rtol=1e-4, atol=1e-5)
    whole = routed(RouterConfig("spatial_pool", 16, "encoder_block"))(inputs).actions
    plain = tiny_model(efa=False, lfp=False).eval()(inputs).actions
    torch.testing.assert_close(whole, plain)


def test_semantic_tokens_in_the_middle_of_the_towers_save_there_and_learn() -> None:
    model = routed(config("semantic_tokens", "encoder_block")).train()
    model(tiny_input()).actions.sum().backward()
    assert model.router is not None
    weights = dict(model.router.named_parameters())
    assert {name.split(".")[1] for name in weights} == {"0", "1"}, "one for each tower"
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights.values())
    models = [routed(config("semantic_tokens", stage)) for stage in ("encoder_block", "encoder_out")]
    middle, behind = (count_flops(one.config, one.embodiment, 7) for one in models)
    for one, other in zip(middle, behind, strict=True):
        assert (one.flops < other.flops) == (one.stage.startswith("tower") or one.stage.startswith("total"))


@torch.no_grad()
@pytest.mark.parametrize("router", [
    config("learned_pruner", options={"guide": 1.0, "guide_layer": 2}),
    config("learned_pruner", joint=True, options={"guide": 1.0, "guide_layer": 2}),
    RouterConfig("learned_pruner", 4, "llm_layer", layers=(1,), options={"guide": 1.0, "guide_layer": 2}),
    config("damro", options={"base": "learned_pruner", "base_options": {"guide": 1.0, "guide_layer": 2}}),
], ids=["views", "joint", "layer", "outliers"])  # fmt: skip
def test_a_router_is_guided_by_the_attention_to_all_tokens_in_a_deeper_layer(router: RouterConfig) -> None:
    inputs = tiny_input()
    model = routed(router)
    seen: list[RouterContext] = []
    assert model.router is not None
    one = model.router.before or model.router.layers["1"]
    one.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    model(inputs)
    assert seen[0].guide_BN is None, "not at inference"
    assert "guide" in " ".join(model.train()(inputs).losses)
    expected = model.with_router(RouterConfig()).eval()(inputs, debug=True).debug["attention"][2]
    assert seen[1].guide_BN is not None
    torch.testing.assert_close(seen[1].guide_BN.reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)


# --- mistakes ---


def test_mistakes_say_what_is_possible() -> None:
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"name": "randm"}, {}, "unknown router 'randm'; one of"),
        ({"name": "random", "budget": 17}, {}, "only 16 tokens; choose 1 to 16"),
        ({"name": "spatial_pool", "budget": 5}, {}, "possible budgets: 1, 2, 4"),
        ({"name": "spatial_pool"}, {"efa": True}, "set routing.efa=false .patches"),
        ({"name": "spatial_pool", "joint": True}, {}, "router.joint=false .views apart"),
        ({"name": "cls_attention"}, {"efa": True}, "does not provide at encoder_out .*possible routers are .*random"),
        ({"name": "debias"}, {"efa": True}, "possible routers are (?!.*(debias|damro)).*channel_attention"),
        ({"name": "progressive_video", "joint": True}, {}, "router.joint=false .views apart"),
        ({"name": "cls_attention", "options": {"layers": 9}}, {}, "layers is 9, the tower computes 2 layers"),
        ({"name": "vla_pruner"}, {}, "works at language layers: give router.layers"),
        (
            {"name": "token_norm", "layer_router": "carried"},
            {},
            "layer_router=carried changes nothing without router.layers",
        ),
        (
            {"name": "random", "block": 1},
            {},
            "router.block is for .*encoder_block, not encoder_out",
        ),
        ({"name": "random", "stage": "llm_layer", "layers": (1,), "joint": True}, {}, "joint changes nothing with"),
        ({"name": "random", "mode": "bypass"}, {}, "mode=bypass changes nothing without router.layers"),
        (
            {"name": "random", "stage": "llm_layer", "layers": (1,), "layer_router": "token_norm"},
            {},
            "layer_router=token_norm works at all router.layers, so that nothing is left to router.name=random",
        ),
        ({"name": "token_norm", "resample": False}, {}, "resample=False changes nothing .*draws no random numbers"),
        ({"name": "token_norm", "seed": 1}, {}, "seed=1 changes nothing .*draws no random numbers"),
        ({"name": "random", "decision_steps": 4}, {}, "decision_steps=4 changes nothing .*remembers no earlier"),
        ({"name": "random", "hand": (0, 1, 3)}, {}, "hand=.* changes nothing .*not read the motion of the hand"),
        *(
            ({"name": "random", **keys}, {}, r"budget is a number of tokens or a share in \(0, 1\].* got nan$")
            for keys in (
                {"budget": NAN},
                {"layers": (1,), "layer_budgets": (NAN,)},
                {"train_budgets": (4, NAN)},
            )
        ),
        *(
            ({"name": "random", "position": "v2pe", "position_step": step}, {}, "position_step must be a positive num")
            for step in (NAN, float("inf"), 0.0)
        ),
        ({"name": "random", "position_step": 0.5}, {}, "position_step=0.5 changes nothing .*no router.position=v2pe"),
        ({"name": "random", "layers": (1, 2, 1)}, {}, "router.layers names a layer twice"),
        ({"name": "coverage", "stage": "encoder_out"}, {}, "works at projector_out, not at encoder_out"),
        (
            {"name": "random", "stage": "encoder_block"},
            {},
            "works at encoder_out, projector_out, llm_layer, not at encoder_bl",
        ),
        ({"name": "spatial_pool", "stage": "encoder_block", "block": 2}, {}, "compute 2 blocks: choose 0 to 1"),
        (
            {"name": "spatial_pool", "stage": "encoder_block"},
            {"efa": True},
            "set routing.efa=false and router.joint=false",
        ),
        (
            {"name": "flex_count", "stage": "projector_out", "options": {"variant": "projector"}},
            {},
            "works at encoder_out, ",
        ),
        (
            {"name": "learned_pruner", "options": {"guide": 1.0, "guide_layer": 4}},
            {},
            "deeper than the router, 0 to 3 here",
        ),
        (
            {
                "name": "learned_pruner",
                "stage": "llm_layer",
                "layers": (2,),
                "options": {"guide": 1.0, "guide_layer": 2},
            },
            {},
            "3 to 3",
        ),
        (
            {"name": "learned_pruner", "options": {"guide": 1.0, "guide_layer": 3}},
            {"lfp": True, "mode": "drop"},
            "in which only this",
        ),
        ({"name": "random", "stage": "llm_layer", "layers": (9,)}, {}, "has layers 0 to 3"),
        ({"name": "carried", "stage": "llm_layer", "layers": (1,)}, {}, "needs score_BN"),
        *(
            (
                {"name": name, "stage": stage, "layers": (1,), "layer_router": layer_router},
                {},
                "needs .*past_attention_BON, .*makes new tokens, of which nothing is remembered: .*"
                "possible routers are (?!.*(vla_pruner|spec_prune)).*adp",
            )
            for name, stage, layer_router in (
                ("spatial_pool", "encoder_out", "vla_pruner"),
                ("spatial_pool", "encoder_block", "vla_pruner"),
                ("channel_attention", "encoder_out", "spec_prune"),
            )
        ),
        ({"name": "approx_error", "stage": "llm_layer", "layers": (1,), "mode": "bypass"}, {}, "cannot bypass a layer"),
        ({"name": "random", "layers": (1,), "mode": "bypass"}, {"lfp": True}, "set routing.lfp=false"),
        *(
            (
                {"name": name, "stage": "llm_layer", "layers": (1,), "mode": "bypass", "options": options},
                {},
                "hides tokens, which cannot bypass a layer; set router.mode=drop",
            )
            for name, options in (
                ("core_neurons", {"knee": True}),
                ("late_exit", {"threshold": 0.5}),
                ("adp", {"base": "core_neurons", "base_options": {"knee": True}}),
            )
        ),
        (
            {"name": "random", "stage": "llm_layer", "layers": (1,), "train_budgets": (2, 8)},
            {},
            r"set train_budgets=\[\], or another router.stage",
        ),
        ({"name": "vla_pruner", "layers": (1,), "position": "v2pe"}, {}, "set router.position=keep"),
        (
            {"name": "random", "stage": "llm_layer", "layers": (1,), "mode": "bypass", "position": "compact"},
            {},
            "compact changes nothing .*set router.position=keep",
        ),
        ({"name": "random"}, {"position_policy": "renumber"}, "set router.position=compact"),
        ({"name": "random", "options": {"x": 1}}, {}, "no option x; it has none"),
    ]
    for router, routing, message in wrong:
        values = {"efa": False, "lfp": False, **routing, "router": {"budget": 4, **router}}
        with pytest.raises(ValueError, match=message):
            tiny_model(**values)


def test_scores_are_carried_from_those_that_have_some() -> None:
    without = [name for name, kind in registered_routers().items() if not kind.scores and kind.stages != ("llm_layer",)]
    assert {"identity", "spatial_pool", "causal_queries"} < {*without}
    pooled: dict[str, Any] = {"options": {"base": "spatial_pool"}}
    for name, more in [*((name, {}) for name in without), ("channel_attention", pooled), ("token_pooling", pooled)]:
        with pytest.raises(ValueError, match="'carried' needs score_BN, which this policy does not provide"):
            routed(config(name, layers=(1,), layer_router="carried", **more))


def test_no_context_is_given_that_was_not_asked_for() -> None:
    model = routed(config("random"))
    assert isinstance(model.router, PolicyRouter)
    seen: list[RouterContext] = []
    assert model.router.before is not None
    model.router.before.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(tiny_input())
    empty = {"text_BTE", "attention_LBN", "received_BN", "attention_BNN", "keys_BNC", "pixels_B3HW"}
    assert all(getattr(seen[0], name) is None for name in empty)
