"""Where each token leaves a policy and by which score: known answers, and every kind of choice in real passes."""

from __future__ import annotations

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
