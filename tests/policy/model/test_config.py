from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from cogvla.configs.build import build
from cogvla.configs.load import load, names
from cogvla.policy.model.config import CogVLAConfig, RoutingConfig, TowerConfig
from cogvla.tests.support.tiny_model import MODEL, tiny_config


@pytest.mark.parametrize("routing", names("routing"))
@pytest.mark.parametrize("policy", names("policy"))
def test_every_preset_composes_and_survives_a_round_trip(policy: str, routing: str) -> None:
    config = CogVLAConfig.from_dict({**load("policy", policy), "routing": load("routing", routing)})
    assert CogVLAConfig.from_dict(config.to_dict()) == config


def test_faithful_is_the_published_behaviour() -> None:
    config = CogVLAConfig.from_dict({**MODEL, "routing": load("routing", "faithful")}).routing
    assert (config.period, config.position_policy, config.scale, config.summary) == (31, "renumber", "all", "faithful")


def test_ablations_switch_off_one_stage_each() -> None:
    full = build(RoutingConfig, load("routing", "cogvla"), "routing")
    for name, changed in {"no_efa": "efa", "no_lfp": "lfp", "no_catten": "attention", "cogvla_drop": "mode"}.items():
        routing = build(RoutingConfig, load("routing", name), "routing")
        assert [f.name for f in fields(full) if getattr(routing, f.name) != getattr(full, f.name)] == [changed]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rooting": {}}, r"unknown key rooting in model; valid keys are vision, language, head, routing"),
        ({"routing": {"keep": 1}}, r"unknown key keep in model\.routing; valid keys are efa, film, fusion"),
        ({"vision": {**MODEL["vision"], "dinov2": {"patch": 4}}}, r"model\.vision\.dinov2; valid keys are patch_size"),
        ({"language": {"width": 8}}, r"model\.language: .*missing.*vocab_size"),
        ({"head": 3}, r"model\.head must be a mapping"),
        ({"routing": {"mode": "skip"}}, r"routing\.mode is 'skip'; it must be one of bypass, drop"),
        ({"routing": {"schedule": "half"}}, r"unknown keep schedule"),
        ({"language": {**MODEL["language"], "heads": 5}}, r"divisible by heads"),
        ({"language": {**MODEL["language"], "stop_token": 50}}, r"below vocab_size 50"),
    ],
)
def test_mistakes_name_the_key_and_what_is_valid(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CogVLAConfig.from_dict({**MODEL, **change})


def test_a_tower_is_named_or_sized_not_both() -> None:
    with pytest.raises(ValueError, match="leave out width"):
        TowerConfig(patch_size=16, timm="vit_tiny_patch16_224", width=3)
    with pytest.raises(ValueError, match="either a timm name or"):
        TowerConfig(patch_size=16)
    assert tiny_config().vision.dinov2.mean == pytest.approx((0.485, 0.456, 0.406))
