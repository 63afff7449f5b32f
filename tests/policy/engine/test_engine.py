"""The engine computes what the model computes, in every configuration, batch and length of instruction."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

import cogvla.tests.support.small_data as small
from cogvla.configs.build import build
from cogvla.policy.checkpoint import load_policy, open_policy
from cogvla.policy.engine.engine import Engine, EngineConfig
from cogvla.policy.engine.float8 import Float8Linear
from cogvla.policy.engine.int8 import Int8Linear
from cogvla.policy.engine.linear import FusedLinear
from cogvla.policy.engine.network import FusedNetwork
from cogvla.policy.engine.recording import record
from cogvla.policy.interface import Observation
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.tests.support.paths import SHIPPED

FAITHFUL = {
    "summary": "faithful",
    "film_init": None,
    "position_policy": "renumber",
    "scale": "all",
    "schedule": "shiftedcos_decay_0.85_0.15",
}
ROUTINGS: dict[str, dict[str, Any]] = {
    "cogvla": {},
    "faithful": FAITHFUL,
    "drop": {"mode": "drop"},
    "drop, renumbered": {"mode": "drop", "position_policy": "renumber"},
    "bypass, renumbered": {"position_policy": "renumber"},
    "visual only": {"scale": "visual_only"},
    "interleaved": {"schedule": "interleave"},
    "without EFA": {"efa": False},
    "FiLM on patches": {"efa": False, "film": True},
    "sum": {"fusion": "sum"},
    "concat": {"fusion": "concat"},
    "without LFP": {"lfp": False},
    "without CAtten": {"attention": "causal"},
    "all off": {"efa": False, "lfp": False, "attention": "bidirectional"},
}
OTHER_TOWER = {"patch_size": 8, "width": 24, "depth": 3, "heads": 3, "class_token": True, "registers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "four layers": {"language": {"layers": 4}},
    "grouped heads": {"language": {"heads": 4, "kv_heads": 2}},
    "qwen2": {"language": {"architecture": "qwen2"}},
    "towers of two shapes": {"vision": {"dinov2": {**OTHER_TOWER, "layer_scale": 0.5}}},
    "other patches": {"vision": {"siglip": {**small.TOWER, "patch_size": 16}}},
    "last block kept": {"vision": {"drop_last_block": False}},
    "shifted": {"head": {"shifted": True}},
    "placeholder per dimension": {"head": {"tokens_per_step": "action_dim", "placeholder": "zero"}},
    "diffusion": {"head": {"kind": "diffusion"}},
    "flow": {"head": {"kind": "flow"}},
    "discrete": {"head": {"kind": "discrete"}},
}


def random_policy(model: dict[str, Any] | None = None, routing: dict[str, Any] | None = None) -> CogVLAPolicy:
    """Random in everything: norms, biases and scales too, which start at one and zero."""
    parts = {key: {**small.MODEL.get(key, {}), **value} for key, value in (model or {}).items()}
    config = CogVLAConfig.from_dict({**small.MODEL, **parts, "routing": {"film_init": 1.0, **(routing or {})}})
    torch.manual_seed(1)
    network = CogVLA(config, small.ROBOT)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return CogVLAPolicy(network, small.small_preprocessor())


def observation(batch: int, seed: int = 0) -> Observation:
    """Instructions of different lengths."""
    return replace(
        small.ROBOT.fake_observation(batch, seed), instruction=[small.INSTRUCTIONS[i % 3] for i in range(batch)]
    )


def assert_same(policy: CogVLAPolicy, engine: CogVLAPolicy, batch: int, tolerance: float = 2e-5) -> None:
    seen = observation(batch)
    for each in (policy, engine):
        each.reset()  # token routers that remember begin an episode
    expected, found = (each.act(seen).actions for each in (policy, engine))
    scale = np.abs(expected).max()
    assert scale > 1e-3, "there is something to compare"
    np.testing.assert_allclose(found, expected, atol=tolerance * max(scale, 1.0))


BFLOAT16, FLOAT8 = 2.0**-9, 2.0**-4
"""Largest relative error of a number in bfloat16 and in float8_e4m3fn."""
INT8_ROUNDING = 3 * 2.0**-8
"""The same of a number of usual size in int8, if the largest is three times as large."""


def assert_near(found: np.ndarray, expected: np.ndarray, rounding: float, layers: int) -> None:
    """Check that actions differ by what rounding explains.

    Rounding the weights and the inputs of a layer is an error that is uniform up to `rounding`, relative. Over the
    layers it grows as a random walk; a network of random weights amplifies it, here by at most 3.
    """
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < 3 * rounding * np.sqrt(2 * layers / 3)


def linear_layers(policy: CogVLAPolicy) -> int:
    assert policy.engine is not None
    return sum(isinstance(module, FusedLinear | Int8Linear) for module in policy.engine.network.modules())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equal_with_every_routing(routing: str) -> None:
    policy = random_policy(routing=ROUTINGS[routing])
    assert_same(policy, policy.with_engine(EngineConfig("eager")), batch=3)


@pytest.mark.parametrize("model", MODELS)
def test_equal_with_every_model(model: str) -> None:
    policy = random_policy(MODELS[model])
    assert_same(policy, policy.with_engine(EngineConfig("eager")), batch=2)


def test_towers_of_one_shape_run_as_one() -> None:
    assert len(FusedNetwork(random_policy().model).towers) == 1
    assert len(FusedNetwork(random_policy(MODELS["towers of two shapes"]).model).towers) == 2


@pytest.mark.parametrize("routing", ["cogvla", "faithful", "drop", "all off"])
def test_a_recorded_network_computes_the_same(routing: str) -> None:
    policy = random_policy(routing=ROUTINGS[routing])
    engine = policy.with_engine(EngineConfig("trace", text_buckets=(6,)))
    engine.warm_up(2)
    assert engine.engine is not None
    assert list(engine.engine._recorded) == [(2, 6, False)]
    for seed in range(3):  # other pixels, states and instructions than those it was recorded with
        seen = replace(observation(2, seed), instruction=small.INSTRUCTIONS[seed - 2 : seed] or small.INSTRUCTIONS[1:])
        np.testing.assert_allclose(engine.act(seen).actions, policy.act(seen).actions, atol=2e-5)


@hypothesis_settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 4), seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_padding_to_a_bucket_changes_nothing(batch: int, seed: int, lengths: list[int]) -> None:
    policy = _POLICY
    words = "touch the red green blue square one"[:35].split()
    asked = [" ".join((words * 2)[:length]) for length in lengths[:batch]]
    seen = replace(observation(batch, seed), instruction=asked)
    np.testing.assert_allclose(_PADDED.act(seen).actions, policy.act(seen).actions, atol=3e-5)


_POLICY = random_policy()
_PADDED = _POLICY.with_engine(EngineConfig("eager", text_buckets=(7, 12)))


def test_unannounced_shapes_work_without_recording() -> None:
    engine = random_policy().with_engine(EngineConfig("trace", text_buckets=(2,)))
    engine.warm_up(1)
    assert engine.act(observation(3)).actions.shape == (3, small.CHUNK, 4)
    assert len(engine.engine._recorded) == 1  # type: ignore[union-attr]


def test_warm_up_records_the_lengths_that_are_expected() -> None:
    engine = random_policy().with_engine(EngineConfig("trace", text_buckets=(4, 8, 16)))
    engine.warm_up(1, small.INSTRUCTIONS)  # four words each
    assert list(engine.engine._recorded) == [(1, 4, False)]  # type: ignore[union-attr]
    engine.warm_up(1, ["touch the red square and then the green one"])  # nine
    assert list(engine.engine._recorded) == [(1, 4, False), (1, 16, False)]  # type: ignore[union-attr]


def test_the_trained_model_stays_as_it_was() -> None:
    policy = random_policy()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    engine = policy.with_engine(EngineConfig("eager", dtype="bfloat16"))
    engine.act(observation(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in policy.model.parameters())
    assert engine.describe()["dtype"] == "bfloat16"


def changes(model: CogVLA) -> dict[str, Callable[[], object]]:
    """Ways to change the weights of a model."""
    state = {name: value + 0.05 * torch.randn(value.shape) for name, value in model.state_dict().items()}

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        torch.optim.SGD(model.parameters(), 0.05).step()

    def replace_all() -> None:
        model.load_state_dict(state, assign=True)

    return {"loaded": lambda: model.load_state_dict(state), "replaced": replace_all, "trained": step}


@pytest.mark.parametrize("way", ["loaded", "replaced", "trained"])
def test_new_weights_encode_the_instruction_anew(way: str) -> None:
    policy, seen = random_policy(), observation(2)
    before = policy.act(seen).actions
    changes(policy.model)[way]()
    after = policy.act(seen).actions
    policy.reset()
    np.testing.assert_array_equal(policy.act(seen).actions, after)
    assert not np.allclose(before, after)


@pytest.mark.parametrize("way", ["loaded", "replaced", "trained"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("inference", [True, False])
def test_an_engine_does_not_mix_old_and_new_weights(way: str, dtype: str | None, inference: bool) -> None:
    policy, seen = random_policy(), observation(2)
    with torch.inference_mode(inference):
        engine = policy.with_engine(EngineConfig("eager", dtype=dtype))
    engine.act(seen)
    changes(policy.model)[way]()
    engine.reset()
    with pytest.raises(ValueError, match=r"^the weights changed after the engine was built: call with_engine again$"):
        engine.act(seen)
    assert_same(policy, policy.with_engine(EngineConfig("eager")), 2)
    assert engine.engine is not None
    if dtype is None:
        with pytest.raises(ValueError, match="call with_engine again"):
            engine.engine.with_router(policy.model)
        with pytest.raises(ValueError, match="call with_engine again"):
            engine.normalised_actions(policy.preprocessor.observation(seen))


def test_an_engine_in_another_precision_does_not_need_its_model() -> None:
    engine = Engine(random_policy().model, EngineConfig("eager", dtype="bfloat16"))
    gc.collect()
    inputs = small.small_preprocessor().observation(observation(1))
    with torch.inference_mode():
        assert engine.run(inputs, engine.encode(inputs.text_ids, inputs.text_mask)).isfinite().all()


@pytest.mark.parametrize("model", ["four layers", "towers of two shapes"])
def test_released_weights_are_in_memory_once(model: str) -> None:
    policy = random_policy(MODELS[model])
    expected = policy.act(observation(2)).actions
    engine = policy.with_engine(EngineConfig("trace"), release=True)
    model_: Any = policy.model
    layers = [*model_.decoder.llm.layers.parameters(), *model_.vision.towers["siglip"].vit.blocks.parameters()]
    assert all(parameter.is_meta for parameter in layers)
    engine.warm_up(2, small.INSTRUCTIONS)
    np.testing.assert_allclose(engine.act(observation(2)).actions, expected, atol=2e-5)
    assert engine.describe()["device"] == "cpu"


@pytest.mark.parametrize("release", [True, False])
def test_another_precision_makes_no_more_copies_than_it_must(release: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[CogVLA] = []

    def copy_of(model: CogVLA) -> CogVLA:
        copied.append(copy.deepcopy(model))
        return copied[-1]

    policy = random_policy(MODELS["towers of two shapes"])
    monkeypatch.setattr("cogvla.policy.engine.engine.copy", SimpleNamespace(deepcopy=copy_of))
    engine = policy.with_engine(EngineConfig("eager", dtype="bfloat16"), release)
    converted = policy.model if release else copied.pop()
    assert not copied
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in converted.decoder.llm.layers.parameters()), "they are in the engine only"
    assert policy.model.decoder.llm.rotary_emb.inv_freq.dtype == torch.float32
    expected = random_policy(MODELS["towers of two shapes"]).act(observation(2)).actions
    assert_near(engine.act(observation(2)).actions, expected, BFLOAT16, linear_layers(engine))


def test_bfloat16_stays_near() -> None:
    policy = random_policy()
    engine = policy.with_engine(EngineConfig("eager", dtype="bfloat16"))
    found, expected = (each.act(observation(2)).actions for each in (engine, policy))
    assert_near(found, expected, BFLOAT16, linear_layers(engine))


def test_eight_bits_stay_near_and_are_fewer() -> None:
    policy = random_policy({"language": {"width": 32, "intermediate": 64}, "vision": {"aggregation_tokens": 4}})
    engine = policy.with_engine(EngineConfig("eager", dtype="bfloat16"))
    reference = policy.with_engine(EngineConfig("eager", dtype="bfloat16"))
    engine.to_float8([observation(2, seed) for seed in range(3)], smallest=16)
    assert engine.calibration is not None
    assert len(engine.calibration.largest_inputs) == 8
    layer: Any = engine.engine.network.decoder.layers[0]  # type: ignore[union-attr]
    assert layer.gate_up.weight.dtype == torch.float8_e4m3fn
    found, expected = engine.act(observation(2)).actions, reference.act(observation(2)).actions
    assert_near(found, expected, FLOAT8, layers=8)


@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits_without_units_for_them_give_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    low = Float8Linear(
        FusedLinear(torch.randn(16, 32), torch.randn(16) if bias else None, torch.bfloat16), torch.tensor(3.0)
    )
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    x_RI = (x.flatten(0, 1) / low.input_scale.bfloat16()).to(torch.float8_e4m3fn)
    scales = low.input_scale, low.weight_scale
    y_RO = torch._scaled_mm(x_RI, low.weight.T, *scales, bias=low.bias, out_dtype=torch.bfloat16)
    assert torch.allclose(low(x).flatten(0, 1), y_RO, rtol=2 * BFLOAT16, atol=1e-6)


def test_eight_bits_clip_what_calibration_has_not_seen() -> None:
    torch.manual_seed(0)
    linear = FusedLinear(torch.randn(16, 32), torch.randn(16), torch.bfloat16)
    low = Float8Linear(linear, torch.tensor(1.0))
    x = torch.full((1, 32), 5.0, dtype=torch.bfloat16)
    exact = linear(x / 5)  # the clipped input is 1, without rounding; that of the weights adds up, at the worst
    worst = FLOAT8 * linear.weight.float().abs().sum(dim=1) + BFLOAT16 * 2 * exact.abs()
    assert ((low(x) - exact).abs() <= worst).all()


@pytest.mark.parametrize(
    ("config", "smallest", "message"),
    [(EngineConfig("eager"), 16, "engine.dtype=bfloat16"), (EngineConfig("eager", dtype="bfloat16"), 4096, "4096")],
)
def test_eight_bits_say_what_they_need(config: EngineConfig, smallest: int, message: str) -> None:
    policy = random_policy()
    engine = policy.with_engine(config)
    with pytest.raises(ValueError, match=message):
        engine.to_float8([observation(1)], smallest)
    with pytest.raises(ValueError, match="with_engine"):
        policy.to_float8([observation(1)])


def test_eight_bits_need_something_to_measure() -> None:
    with pytest.raises(ValueError, match="recorded observations"):
        random_policy().with_engine(EngineConfig("eager", dtype="bfloat16")).to_float8([], smallest=16)


INT8 = EngineConfig("trace", text_buckets=(6,), dtype="int8", smallest=16)
WIDE = {"language": {"width": 32, "intermediate": 64}, "vision": {"dinov2": {**OTHER_TOWER, "width": 48}}}


def test_integers_stay_near_and_are_recorded() -> None:
    policy = random_policy(WIDE)
    engine = policy.with_engine(INT8)
    assert engine.describe()["dtype"] == "int8"
    network = engine.engine.network  # type: ignore[union-attr]
    replaced = [name for name, module in network.named_modules() if isinstance(module, Int8Linear)]
    assert sum(name.startswith("decoder.layers.") for name in replaced) == 4 * len(network.decoder.layers)
    assert sum(name.startswith("towers.") for name in replaced) >= 8
    assert not any("router" in name for name in replaced)
    engine.warm_up(2)
    found, expected = engine.act(observation(2)).actions, policy.act(observation(2)).actions
    assert_near(found, expected, INT8_ROUNDING, linear_layers(engine))


def test_a_trained_policy_in_integers_does_what_it_did() -> None:
    seen = replace(
        load_policy(SHIPPED).embodiment.fake_observation(2), instruction=["put the red cube in the tray"] * 2
    )
    exact = open_policy(SHIPPED, "cpu", engine=EngineConfig("plain"))[0].act(seen).actions
    policy, _ = open_policy(SHIPPED, "cpu", engine=EngineConfig(dtype="int8", smallest=64))
    assert_near(policy.act(seen).actions, exact, INT8_ROUNDING, linear_layers(policy))
    with pytest.raises(ValueError, match=r"engine\.dtype=null, then evaluate with `eval_libero engine\.dtype=int8`"):
        EngineConfig(dtype="int8").check_trained()


def test_integers_of_one_sample_do_not_depend_on_the_others() -> None:
    engine = random_policy(WIDE).with_engine(INT8)
    three = observation(3)
    images = {name: image[1:2] for name, image in three.images.items()}
    one = replace(three, images=images, state=three.state[1:2], instruction=three.instruction[1:2])
    np.testing.assert_allclose(engine.act(three).actions[1:2], engine.act(one).actions, atol=2e-5)


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 40),
    biased=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_integer_products_are_as_near_as_their_levels(
    rows: int, inputs: int, outputs: int, biased: bool, size: float
) -> None:
    torch.manual_seed(rows * inputs + outputs)
    x_RI, weight_OI = size * torch.randn(rows, inputs), torch.randn(outputs, inputs)
    linear = FusedLinear(weight_OI, torch.randn(outputs) if biased else None, torch.float32)
    found_RO, expected_RO = Int8Linear(linear)(x_RI), linear(x_RI)
    # Each number is off by half a level of its row at most, of inputs (63) and weights (127).
    off_RI = x_RI.abs().amax(1, keepdim=True).expand_as(x_RI) / 63 / 2
    off_OI = weight_OI.abs().amax(1, keepdim=True).expand_as(weight_OI) / 127 / 2
    bound_RO = off_RI @ weight_OI.abs().T + (x_RI.abs() + off_RI) @ off_OI.T
    assert ((found_RO - expected_RO).abs() <= 1.01 * bound_RO + 1e-5 * size + 1e-6).all()


def test_integer_sums_do_not_overflow() -> None:
    """The largest inputs and weights there are, side by side: 8 bits of both overflow the 16 bits of older CPUs."""
    linear, before = FusedLinear(torch.ones(8, 64), None, torch.float32), torch.backends.quantized.engine
    torch.testing.assert_close(Int8Linear(linear)(torch.ones(3, 64)), torch.full((3, 8), 64.0))
    torch.testing.assert_close(Int8Linear(linear)(torch.zeros(3, 64)), torch.zeros(3, 8))
    assert torch.backends.quantized.engine == before


def test_a_model_without_large_layers_is_not_for_integers() -> None:
    with pytest.raises(ValueError, match=r"256 or more inputs and outputs: .*engine\.dtype=null"):
        random_policy().with_engine(EngineConfig("eager", dtype="int8"))


def test_machines_that_cannot_multiply_integers_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvla.policy.engine.int8.LIBRARY", "none such")
    with pytest.raises(ValueError, match="x86 CPU with AVX2"):
        random_policy(WIDE).with_engine(INT8)


def test_a_recording_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy()
    engine = Engine(policy.model, EngineConfig("eager"))
    inputs = policy.preprocessor.observation(observation(1))
    text = engine.encode(inputs.text_ids, inputs.text_mask)
    monkeypatch.setattr("cogvla.policy.engine.recording._traced", lambda *_: lambda *_: torch.zeros(1, small.CHUNK, 4))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="differs from the eager pass"):
        record("trace", engine.network, {"pixels": inputs.pixels, "state": inputs.state, **text.tensors})


class Scaled(torch.nn.Module):
    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(8))

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.weight * inputs["x"]


def test_what_was_recorded_is_freed() -> None:
    network = Scaled()
    weight = StorageWeakRef(network.weight.untyped_storage())
    run = record("trace", network, {"x": torch.ones(1)})
    del network
    gc.collect()
    assert not weight.expired(), "the recording needs it"
    del run
    gc.collect()
    assert weight.expired(), "torch keeps the constants of a traced function for ever"


def test_what_cannot_be_fused_is_said() -> None:
    policy = random_policy()
    policy.model.decoder.llm.layers[0].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"merge adapters first.*engine.kind=plain"):
        policy.with_engine(EngineConfig("eager"))
    assert policy.with_engine(EngineConfig()).describe()["engine"] == "plain"
    assert policy.with_engine(EngineConfig(dtype="float32")).describe()["dtype"] == "float32", "it is already"
    with pytest.raises(ValueError, match=r"engine.dtype=bfloat16.* in float32.*merge adapters.*engine.dtype=null"):
        policy.with_engine(EngineConfig(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "fast"}, "unknown engine.kind 'fast'; one of auto, plain"),
        ({"dtype": "int3"}, "unknown engine.dtype"),
        ({"kind": "plain", "dtype": "bfloat16"}, "engine.dtype=null, or another engine.kind"),
        ({"kind": "compile", "dtype": "int8"}, "engine.kind=trace or auto, not compile"),
        ({"kind": "cuda_graph", "dtype": "int8"}, "engine.dtype=int8 is for CPUs"),
        ({"dtype": "int8", "smallest": 0}, "engine.smallest must be at least 1"),
        ({"text_buckets": [8, 4]}, "increasing"),
        ({"text_buckets": [0, 4]}, "increasing positive"),
        ({"threads": 3}, "unknown key threads in engine; valid keys are kind"),
    ],
)
def test_wrong_settings_are_said(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(EngineConfig, values, "engine")


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        random_policy().with_engine(EngineConfig("cuda_graph"))


def test_commands_run_the_engine_by_default() -> None:
    policy, _ = open_policy(SHIPPED, "cpu")
    plain, _ = open_policy(SHIPPED, "cpu", engine=EngineConfig("plain"))
    assert (policy.describe()["engine"], plain.describe()["engine"]) == ("trace", "plain")
    policy.warm_up(1, ["put the red cube in the tray"])
    seen = replace(policy.embodiment.fake_observation(), instruction=["put the red cube in the tray"])
    np.testing.assert_allclose(policy.act(seen).actions, plain.act(seen).actions, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph: needs an NVIDIA GPU")
@pytest.mark.parametrize("routing", ["cogvla", "faithful", "drop", "all off"])
def test_a_cuda_graph_computes_the_same(routing: str) -> None:
    policy = random_policy(routing=ROUTINGS[routing])
    gpu = CogVLAPolicy(policy.model.cuda(), policy.preprocessor)
    engine = gpu.with_engine(EngineConfig("cuda_graph", text_buckets=(6,)))
    engine.warm_up(2)
    for seed in range(3):
        seen = observation(2, seed)
        np.testing.assert_allclose(engine.act(seen).actions, gpu.act(seen).actions, atol=1e-4)
