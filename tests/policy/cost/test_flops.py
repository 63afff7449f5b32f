"""FLOPs against torch's counter, bytes against sums by hand, the 7B presets against the paper."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvla.configs.load import load
from cogvla.policy.cost.flops import REPEATED, TOTAL, Counting, StageCost, Work, build_on_meta, count_flops
from cogvla.policy.cost.roofline import GPUS, find_gpu, floors, format_table
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.heads.committed import none_committed
from cogvla.tests.support.tiny_model import ROBOT, alone, tiny_config, tiny_input, tiny_model

LIBERO = Embodiment("libero", (Camera("agentview", 224, 224), Camera("wrist", 224, 224)), 8, 7, 8, 20.0)
PAPER_HEAD = {"tokens_per_step": "action_dim", "placeholder": "zero", "shifted": True}
ROUTINGS: list[dict[str, Any]] = [
    {},
    {"mode": "drop"},
    {"scale": "all"},
    {"efa": False},
    {"efa": False, "film": True},
    {"lfp": False},
    {"fusion": "sum"},
    {"fusion": "concat"},
    {"efa": False, "lfp": False, "attention": "bidirectional"},
]


def by_stage(costs: list[StageCost]) -> dict[str, StageCost]:
    return {cost.stage: cost for cost in costs}


def tiny(text: int = 7, batch: int = 1, counting: Counting | None = None, **routing: Any) -> dict[str, StageCost]:
    return by_stage(count_flops(tiny_config(**routing), ROBOT, text, batch, counting))


@pytest.mark.parametrize("head", [{}, PAPER_HEAD], ids=["new", "paper"])
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_the_count_is_what_torch_counts(routing: dict[str, Any], head: dict[str, Any]) -> None:
    model = tiny_model(head, **routing).eval()
    inputs = alone(tiny_input(), 1)
    # The fused CPU attention is not in torch's table; the unfused one is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)
    total = by_stage(count_flops(tiny_config(head, **routing), ROBOT, text_length=7))[TOTAL]
    assert total.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert total.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tokens_per_step", ["one", "action_dim"])
def test_committed_actions_as_an_input_are_counted(tokens_per_step: str) -> None:
    head = {"prefix": 2, "tokens_per_step": tokens_per_step}
    model = tiny_model(head)
    assert model.committed is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.committed(none_committed(1, ROBOT.chunk, ROBOT.action_dim, "cpu"), torch.zeros(1, 20, 32))
    costs = by_stage(count_flops(tiny_config(head), ROBOT, text_length=7))
    assert costs["committed actions"].flops == counter.get_total_flops() > 0
    assert costs["committed actions"].weight_bytes == 2 * model.committed.matrix.numel()
    assert costs[TOTAL].parameters == sum(p.numel() for p in model.parameters())
    assert costs[TOTAL].flops == sum(cost.flops for name, cost in costs.items() if name not in (TOTAL, REPEATED))


def test_an_instruction_seen_before_costs_what_torch_counts() -> None:
    model, inputs = tiny_model().eval(), alone(tiny_input(), 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        text = model.encode_text(inputs.text_ids, inputs.text_mask)
        with FlopCounterMode(display=False) as counter:
            model(inputs, text)
    assert tiny()[REPEATED].flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_bytes_of_the_state_token_by_hand() -> None:
    """Linear(5,32) and Linear(32,32) on one row, two bytes each number."""
    state = tiny()["state"]
    assert state.weight_bytes == 2 * (5 * 32 + 32 + 32 * 32 + 32)
    assert state.activation_bytes == 2 * (5 + 32 + 32 + 32)
    assert state.flops == 2 * (5 * 32 + 32 * 32)
    assert state.intensity == state.flops / (state.weight_bytes + state.activation_bytes)


def test_bytes_of_the_language_model_by_hand() -> None:
    """Width 32, four heads of which two hold keys, MLP 48; bos, 12 vision tokens, state, 7 words, 4 actions, stop."""
    layers, length, read = 4, 26, 5  # the last layer computes the actions and stop only
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    keys_values = 2 * (32 + 16)
    rest = 2 * (32 + 32) + 3 * (32 + 48)  # queries and output; gate, up and down
    attention = (layers - 1) * 2 * (length + length) * 32 + 2 * (read + length) * 32
    cost = tiny(lfp=False)["language, dense layers"]
    assert cost.weight_bytes == 2 * layers * weights
    rows = (layers - 1) * length + read
    assert cost.activation_bytes == 2 * (layers * length * keys_values + rows * rest + attention)


def test_bytes_of_a_tower_by_hand() -> None:
    """SigLIP: two blocks of width 24 and MLP 48 on 16 patches of 8x8x3 and 6 aggregation tokens, for two views."""
    width, patches, tokens, asking, views = 24, 16, 22, 6, 2
    block = (3 * width * width + 3 * width) + (width * width + width) + (width * 48 + 48) + (48 * width + width)
    embed = patches * (192 + width)
    mlp = 2 * (width + 48)
    first = tokens * (width + 3 * width) + 4 * tokens * width + tokens * (width + width) + tokens * mlp
    queries, keys_values = asking * (width + width), tokens * (width + 2 * width)
    last = queries + keys_values + 2 * (asking + tokens) * width + asking * (width + width) + asking * mlp
    cost = tiny()["tower siglip"]
    assert cost.weight_bytes == 2 * (192 * width + width + 2 * block)
    assert cost.activation_bytes == 2 * views * (embed + first + last)


def test_a_batch_reads_the_weights_once() -> None:
    one, eight = tiny(), tiny(batch=8)
    for stage, cost in one.items():
        assert eight[stage].weight_bytes == cost.weight_bytes
        assert eight[stage].parameters == cost.parameters
    for stage in ("tower dinov2", "fusion", "state", "language, dense layers", "language, routed layers", "head"):
        assert eight[stage].flops == 8 * one[stage].flops
        assert eight[stage].activation_bytes == 8 * one[stage].activation_bytes


def test_what_is_counted_can_be_chosen() -> None:
    usual = tiny()[TOTAL].flops
    assert tiny(counting=Counting(attention=False))[TOTAL].flops < usual
    more = [Counting(every_row=True), Counting(last_block=True), Counting(lm_head=True)]
    assert all(tiny(counting=counting)[TOTAL].flops > usual for counting in more)
    vocabulary = tiny(counting=Counting(lm_head=True))["output vocabulary"]
    assert vocabulary.flops == 2 * 26 * 32 * 50  # 26 tokens, width 32, 50 words
    with pytest.raises(ValueError, match="at least 1"):
        tiny(text=0)


def test_routing_saves() -> None:
    assert tiny()[TOTAL].flops < tiny(lfp=False)[TOTAL].flops < tiny(efa=False)[TOTAL].flops


def paper(text: int = 30, counting: Counting | None = None, **changes: Any) -> dict[str, StageCost]:
    body = load("policy", "cogvla_7b")
    config = CogVLAConfig.from_dict({**body, "routing": {**load("routing", "faithful"), **changes}})
    return by_stage(count_flops(config, LIBERO, text, counting=counting))


PAPER = [({}, 2.72), ({"efa": False}, 5.38), ({"lfp": False}, 3.52), ({"efa": False, "lfp": False}, 8.45)]


@pytest.mark.parametrize(("changes", "reported"), PAPER, ids=["full", "no_efa", "no_lfp", "neither"])
def test_the_papers_numbers_come_out(changes: dict[str, Any], reported: float) -> None:
    """Within 10 % of what this model computes, and within 1 % of what a counter of linear layers would have seen."""
    assert paper(**changes)[TOTAL].flops == pytest.approx(reported * 1e12, rel=0.1)
    as_counted = Counting(**load("counting", "published") | {"attention": False})
    assert paper(7, as_counted, **changes)[TOTAL].flops == pytest.approx(reported * 1e12, rel=0.01)


def test_the_7b_preset_without_a_single_weight() -> None:
    routed = paper()
    assert routed[TOTAL].parameters == pytest.approx(8.77e9, rel=0.01)
    # All of Llama's layers are read whatever is pruned: 6.476 B numbers of two bytes, norms apart.
    layers = routed["language, dense layers"].weight_bytes + routed["language, routed layers"].weight_bytes
    assert layers == 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def test_the_small_preset_is_half_a_billion() -> None:
    body = load("policy", "small")
    model = build_on_meta(CogVLAConfig.from_dict({**body, "routing": load("routing", "cogvla")}), LIBERO)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.537e9, rel=0.01)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", GPUS)
def test_the_floor_is_the_roof(name: str) -> None:
    gpu = find_gpu(name)
    assert 0.1e15 < gpu.flops < 1e15, "dense bfloat16"
    computing = StageCost("x", 0, Work(macs=10**15, weights=1))
    reading = StageCost("y", 0, Work(macs=1, weights=10**12, activations=10**12))
    assert gpu.floor(computing) == 2e15 / gpu.flops
    assert gpu.floor(reading) == 4e12 / gpu.bandwidth
    stages = floors([computing, reading, StageCost(TOTAL, 0, Work()), StageCost(REPEATED, 0, Work())], gpu)
    assert stages[2] == stages[0] + stages[1]
    assert stages[3] == stages[1], "all but the first, which depends on the instruction"


def test_known_floor() -> None:
    """0.9 PFLOP/s of 989.5 TFLOP/s, and 4.8 GB of 4.8 TB/s."""
    assert find_gpu("H200").floor(StageCost("x", 0, Work(macs=494_750_000_000))) == pytest.approx(1e-3)
    assert find_gpu("h200").floor(StageCost("x", 0, Work(weights=2_400_000_000))) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx_4090", "RTX 4090"),
        ("RTX-4090", "RTX 4090"),
        ("Jetson Thor", "Jetson Thor"),
        ("jetsonthor", "Jetson Thor"),
        ("a800", "A800"),
    ],
)
def test_gpus_may_be_spelt_as_they_are_written(spelt: str, name: str) -> None:
    assert find_gpu(spelt).name == name


def test_an_unknown_gpu_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=re.escape("unknown GPU 'h2000'; one of h200, a800, rtx4090, jetson_thor")):
        find_gpu("h2000")
    with pytest.raises(ValueError, match="unknown GPU 4090; one of"):
        find_gpu(4090)


def test_the_table_has_a_line_per_stage() -> None:
    costs = list(tiny(lfp=False).values())
    lines = format_table(costs, [find_gpu("h200")]).splitlines()
    assert "H200" in lines[0]
    present = [cost.stage for cost in costs if cost.parameters or cost.flops]
    assert [line[:26].strip() for line in lines[1:]] == present
    assert "language, routed layers" not in present
