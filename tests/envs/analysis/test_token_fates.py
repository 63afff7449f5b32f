"""Where each token leaves a policy and by which score: known answers, and every kind of choice in real passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cogvla.envs.analysis.routing_recording import look
from cogvla.envs.analysis.token_fates import NotKept, TokenChoice, fates
from cogvla.tests.envs.analysis.test_router_comparison import point_policy
from cogvla.tests.support.point_suite import EMBODIMENT

PLAIN = {"efa": False, "lfp": False}


def test_known_answers() -> None:
    first = TokenChoice(
        "router", torch.arange(4), torch.tensor([0, 1, 3]), torch.tensor([3.0, 2.0, 1.0, 4.0]), gone=True
    )
    skips = TokenChoice(
        "layer 1, LFP", torch.tensor([0, 1, 3]), torch.tensor([3]), torch.tensor([0.5, 0.625, 0.75]), False
    )
    last = TokenChoice("layer 2, router", torch.tensor([0, 1, 3]), torch.tensor([0]), None, gone=True)
    skip, gone = "layer 1, LFP", NotKept("layer 2, router", True, False, None, None, None)
    assert fates([first, skips, last], 4) == [
        (NotKept(skip, False, False, 0.5, 0.75, 0.625),),
        (NotKept(skip, False, False, 0.625, 0.75, 0.625), gone),
        (NotKept("router", True, False, 1.0, 2.0, 1.0),),
        (gone,),
    ]
    assert fates([], 2) == [(), ()]


def test_known_answers_of_merged_and_hidden_tokens() -> None:
    scores = torch.tensor([3.0, 2.0, 1.0])
    none, all_3 = torch.tensor([], dtype=torch.int64), torch.arange(3)
    new = TokenChoice("router", all_3, none, scores, True, merged=torch.tensor([True, True, False]))
    merged, lost = (NotKept("router", True, each, None, None, None) for each in (True, False))
    told = zip((merged, merged, lost), scores.tolist(), strict=True)
    assert fates([new], 3) == [(replace(one, score=score),) for one, score in told]
    hides = TokenChoice("layer 1, router", all_3, torch.tensor([0]), scores, True, hidden=torch.tensor([1]))
    later = TokenChoice("layer 2, LFP", torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([5.0, -torch.inf]), True)
    stage = "layer 1, router"
    assert fates([hides, later], 3) == [
        (),
        (NotKept(stage, True, False, 2.0, 3.0, 2.0, hidden=True),),
        (NotKept(stage, True, False, 1.0, 3.0, 2.0),),
    ]


@pytest.mark.parametrize(
    ("routing", "left", "scored"),
    [
        ({**PLAIN, "router": {"name": "token_norm", "budget": 4}}, {"router": 24}, True),
        ({**PLAIN, "router": {"name": "spatial_pool", "budget": 4}}, {"router": 32}, False),
        ({**PLAIN, "router": {"name": "token_norm", "budget": 4, "layers": [1], "layer_budgets": [1]}},
         {"router": 24, "layer 1, router": 6}, True),
        ({**PLAIN, "router": {"name": "attention_growth", "stage": "llm_layer", "layers": [1], "budget": 3}},
         {"layer 1, router": 26}, True),
        ({"efa": False, "mode": "drop"}, {"layer 1, LFP": None}, True),
        ({"efa": False}, {}, True),
    ],
)  # fmt: skip
def test_every_token_leaves_once_where_it_was_dropped(
    routing: dict[str, Any], left: dict[str, int | None], scored: bool
) -> None:
    policy = point_policy(**routing)
    moment = look(policy, EMBODIMENT.fake_observation(1))
    found = fates(moment.choices, len(moment.tokens_ND))
    assert len(found) == 32
    removed = {token: fate[-1] for token, fate in enumerate(found) if fate and fate[-1].gone}
    assert {one.stage for one in removed.values()} == set(left)
    for stage, count in left.items():
        assert count is None or sum(one.stage == stage for one in removed.values()) == count
    assert not any(one.gone for fate in found for one in fate[:-1]), "a token leaves once"
    assert left or any(found)
    for one in (one for fate in found for one in fate):
        assert (one.score is not None) == scored
        if one.score is not None and one.lowest is not None and one.highest is not None:
            assert one.score <= one.highest <= one.lowest, "these methods rank"
    stay = set(range(32)) - set(removed)
    assert "router" not in left or stay <= set(moment.kept["router"].tolist())


def test_merged_tokens_are_told() -> None:
    policy = point_policy(**PLAIN, router={"name": "spatial_pool", "budget": 4})
    moment = look(policy, EMBODIMENT.fake_observation(1))
    assert {(one.stage, one.merged) for fate in fates(moment.choices, 32) for one in fate} == {("router", True)}


def at_layer(name: str, **router: Any) -> dict[str, Any]:
    return {**PLAIN, "router": {"name": name, "stage": "llm_layer", "layers": [1], "budget": 4, **router}}


@pytest.mark.parametrize(
    ("routing", "stage"),
    [
        (at_layer("team_merge"), "layer 1"),
        (at_layer("causal_queries"), "layer 1"),
        (at_layer("flash_pooling"), "layer 1"),
        (at_layer("selector_merger"), "layer 1"),
        ({**PLAIN, "router": {"name": "selector_merger", "budget": 4}}, "router"),
        ({**PLAIN, "router": {"name": "causal_queries", "budget": 4}}, "router"),
    ],
)
def test_a_router_that_makes_all_its_tokens_keeps_none_and_merges_all(routing: dict[str, Any], stage: str) -> None:
    moment = look(point_policy(**routing), EMBODIMENT.fake_observation(1))
    assert not len(moment.kept[stage])
    found = fates(moment.choices, 32)
    told = {(len(fate), one.stage.partition(",")[0], one.merged, one.gone) for fate in found for one in fate}
    assert told == {(1, stage, True, True)}
    assert all(one.lowest is one.highest is None for fate in found for one in fate), "no score was kept or not"


def test_a_token_that_a_router_keeps_of_a_merged_rest_is_kept() -> None:
    moment = look(point_policy(**at_layer("approx_error")), EMBODIMENT.fake_observation(1))
    found = fates(moment.choices, 32)
    assert 0 < len(moment.kept["layer 1"]) < 8, "some of the 8 tokens are new"
    assert moment.kept["layer 1"].tolist() == [token for token, fate in enumerate(found) if not fate]
    assert all(one.merged for fate in found for one in fate)


@pytest.mark.parametrize("mode", ["drop", "bypass"])
@pytest.mark.parametrize(
    "router",
    [
        {"name": "spatial_pool", "budget": 4},
        {"name": "team_merge", "stage": "llm_layer", "layers": [1], "budget": 4},
        {"name": "approx_error", "stage": "llm_layer", "layers": [1], "budget": 4},
    ],
)
def test_new_tokens_that_lfp_keeps_are_not_the_tokens_at_their_places(router: dict[str, Any], mode: str) -> None:
    policy = point_policy(efa=False, mode=mode, schedule="interleave", mean_keep=0.125, router=router)
    moment = look(policy, EMBODIMENT.fake_observation(1))
    made = moment.choices[-2]
    assert (moment.choices[-1].stage, made.stage.partition(",")[0]) == (
        "layer 1, LFP", "router" if router["name"] == "spatial_pool" else "layer 1",
    )  # fmt: skip
    old = set(made.kept.tolist())
    assert set(moment.kept["layer 1"].tolist()) <= old, "the others are new"
    assert router["name"] == "approx_error" or not old
    last = [fate[-1].stage for token, fate in enumerate(fates(moment.choices, 32)) if token not in old]
    assert "layer 1, LFP" not in last, "these were gone before"
    assert moment.used[1].sum() == (1 if router["name"] == "spatial_pool" else 4), "an eighth of what enters"
    assert len(moment.used[1]) == len(moment.after[1])


def test_the_scores_of_new_tokens_that_stay_are_those_of_tokens_that_stay() -> None:
    among, score = torch.tensor([0, -2, 1, -4]), torch.tensor([1.0, 3, 2, 0])
    choice = TokenChoice("layer 1, LFP", among, torch.tensor([-2]), score, True)
    first, second = (NotKept("layer 1, LFP", True, False, score, 3.0, 2.0) for score in (1.0, 2.0))
    assert fates([choice], 2) == [(first,), (second,)]


@pytest.mark.parametrize(
    ("router", "seen"),
    [
        ({"name": "late_exit", "options": {"threshold": 1.0}}, 0),
        ({"name": "late_exit", "options": {"threshold": 0.0}}, 32),
        ({"name": "core_neurons", "budget": 8, "options": {"knee": True}}, None),
    ],
)
@pytest.mark.parametrize("lfp", [False, True])
def test_hidden_tokens_are_told(router: dict[str, Any], seen: int | None, lfp: bool) -> None:
    routing = {**at_layer(**router), "lfp": lfp, "mode": "drop"}
    policy = point_policy(**routing)
    moment = look(policy, EMBODIMENT.fake_observation(1))
    visible = set(moment.present[1][moment.attention[1] > 0].tolist())
    assert seen is None or len(visible) == seen
    found = fates(moment.choices, 32)
    at_router = next(choice for choice in moment.choices if choice.stage == "layer 1, router")
    assert set(at_router.kept.tolist()) == visible
    hidden = {token for token, fate in enumerate(found) if any(one.hidden for one in fate)}
    assert hidden == set(moment.present[1].tolist()) - visible
    assert all(found[token][-1].gone and found[token][-1].stage == "layer 1, router" for token in hidden)
    assert not any(set(kept.tolist()) & hidden for stage, kept in moment.kept.items() if stage != "layer 0")
    scores = [value for fate in found for one in fate for value in (one.score, one.lowest, one.highest) if value]
    assert torch.tensor(scores).isfinite().all()
