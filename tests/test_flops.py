from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvla.policy.config import CogVLAConfig
from cogvla.policy.flops import StageCost, build_on_meta, count_flops, format_table
from cogvla.policy.interface import Camera, Embodiment
from cogvla.tests.test_model_config import CONFIGS, routing_yaml
from cogvla.tests.tiny_model import ROBOT, alone, tiny_config, tiny_input, tiny_model

LIBERO = Embodiment("libero", (Camera("agentview", 224, 224), Camera("wrist", 224, 224)), 8, 7, 8, 20.0)
PAPER_HEAD = {"tokens_per_step": "action_dim", "placeholder": "zero", "shifted": True}


@pytest.mark.parametrize("head", [{}, PAPER_HEAD], ids=["new", "paper"])
@pytest.mark.parametrize(
    "routing",
    [{}, {"mode": "drop"}, {"scale": "all"}, {"efa": False}, {"lfp": False}, {"fusion": "sum"}, {"fusion": "concat"}],
    ids=str,
)
def test_the_count_is_what_torch_counts(routing: dict[str, Any], head: dict[str, Any]) -> None:
    model = tiny_model(head, **routing).eval()
    inputs = alone(tiny_input(), 1)
    # The fused CPU attention is not in torch's table; the unfused one is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)
    total = count_flops(tiny_config(head, **routing), ROBOT, text_length=7)[-1]
    assert total.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert total.parameters == sum(p.numel() for p in model.parameters())


def paper(routing: str) -> dict[str, StageCost]:
    body = yaml.safe_load((CONFIGS / "policy" / "cogvla_7b.yaml").read_text())
    config = CogVLAConfig.from_dict({**body, "routing": routing_yaml(routing)})
    return {cost.stage: cost for cost in count_flops(config, LIBERO, text_length=30)}


def test_the_7b_preset_without_a_single_weight() -> None:
    """The paper reports 2.72 TFLOP, and 8.45 for OpenVLA-OFT, which routes nothing."""
    routed, plain = paper("faithful"), paper("none")
    assert routed["total"].flops == pytest.approx(2.72e12, rel=0.15)
    assert plain["total"].flops == pytest.approx(8.45e12, rel=0.05)
    assert plain["total"].parameters == pytest.approx(7.5e9, rel=0.02)
    table = format_table(list(routed.values()))
    assert "total" in table
    assert len(table.splitlines()) == len(routed) + 1


def test_the_small_preset_is_half_a_billion() -> None:
    body = yaml.safe_load((CONFIGS / "policy" / "small.yaml").read_text())
    model = build_on_meta(CogVLAConfig.from_dict({**body, "routing": routing_yaml("cogvla")}), LIBERO)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.6e9, rel=0.05)
    assert all(p.is_meta for p in model.parameters())


def test_routing_saves() -> None:
    cost = {
        name: count_flops(tiny_config(**r), ROBOT, 7)[-1].flops
        for name, r in {"full": {}, "no_efa": {"efa": False}, "no_lfp": {"lfp": False}}.items()
    }
    assert cost["full"] < cost["no_lfp"] < cost["no_efa"]
