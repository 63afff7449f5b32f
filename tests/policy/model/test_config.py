from __future__ import annotations

from typing import Any

import pytest
import yaml

from cogvla.policy.model.config import CogVLAConfig, TowerConfig
from cogvla.tests.support.paths import CONFIGS
from cogvla.tests.support.tiny_model import MODEL, tiny_config


def routing_yaml(name: str) -> dict[str, Any]:
    body = yaml.safe_load((CONFIGS / "routing" / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for base in body.pop("defaults", []):
        merged |= routing_yaml(base)
    return merged | body


@pytest.mark.parametrize("routing", sorted(p.stem for p in (CONFIGS / "routing").glob("*.yaml")))
@pytest.mark.parametrize("policy", sorted(p.stem for p in (CONFIGS / "policy").glob("*.yaml")))
def test_every_preset_composes_and_survives_a_round_trip(policy: str, routing: str) -> None:
    body = yaml.safe_load((CONFIGS / "policy" / f"{policy}.yaml").read_text())
    config = CogVLAConfig.from_dict({**body, "routing": routing_yaml(routing)})
    assert CogVLAConfig.from_dict(config.to_dict()) == config


def test_faithful_is_the_published_behaviour() -> None:
    config = CogVLAConfig.from_dict({**MODEL, "routing": routing_yaml("faithful")}).routing
    assert (config.period, config.position_policy, config.scale, config.summary) == (31, "renumber", "all", "faithful")


def test_ablations_switch_off_one_stage_each() -> None:
    full = routing_yaml("cogvla")
    for name, changed in {"no_efa": "efa", "no_lfp": "lfp", "no_catten": "attention", "cogvla_drop": "mode"}.items():
        assert {key for key, value in routing_yaml(name).items() if value != full[key]} == {changed}


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
