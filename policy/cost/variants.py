"""The networks that benchmarks compare, with random weights, and the ways to run them.

all off               no stage of CogVLA, as in OpenVLA-OFT, without the engine
faithful              CogVLA as published, without the engine
faithful, engine      the same network in the inference engine
bypass, drop          CogVLA with our choices, in the engine; `drop` removes pruned tokens from all later layers
without stage 1, 2    ablations, in the engine
drop, float8          `drop` with large layers in 8 bits, on GPUs
drop, int8            the same on CPUs
drop, auto            `drop` in the fastest precision: `engine.dtype=auto` without a bound, as weights are random

`PUBLISHED` is OpenVLA as published, which is no variant: one view, and one action token after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.cost.decoding import TokenDecoder
from cogvla.policy.cost.flops import REPEATED, TOTAL, count_decoding, count_flops, without_stages
from cogvla.policy.cost.not_measured import NotMeasuredError
from cogvla.policy.cost.timing import (
    Measured,
    Peaks,
    call_times,
    measure,
    peak_memory_gib,
    reset_peak_memory,
    summarise,
)
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.interface import Embodiment, Observation
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.empty_model import empty_model
from cogvla.policy.policy import CogVLAPolicy

INSTRUCTION = "put the red cube in the tray"
CALIBRATION = 8
"""Observations that set the input ranges of 8-bit layers."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One network and one way to run it.

    Attributes:
        routing: name of a file in configs/routing; None: routing of the checkpoint.
        engine: run the network in the inference engine.
        changes: changed keys of that routing.
        precision: `float8` or `int8` for large layers, or `auto`, see `policy.engine.precision`; None: as given.
    """

    routing: str | None
    engine: bool = True
    changes: dict[str, Any] = field(default_factory=dict)
    precision: str | None = None

    def check(self, device: str, dtype: str) -> None:
        """Check that a device and a precision support this variant.

        Raises:
            NotMeasuredError: they do not.
        """
        if self.precision == "float8" and dtype != "bfloat16":
            raise NotMeasuredError("float8 layers need the other layers in bfloat16 (--dtype bfloat16)")
        if self.precision == "int8" and (device.startswith("cuda") or dtype != "float32"):
            raise NotMeasuredError("int8 needs a CPU and float32 (--device cpu --dtype float32)")


VARIANTS = {
    "all off": Variant("none", engine=False, changes={"attention": "bidirectional"}),
    "faithful": Variant("faithful", engine=False),
    "faithful, engine": Variant("faithful"),
    "bypass": Variant("cogvla", changes={"mode": "bypass"}),
    "drop": Variant("cogvla", changes={"mode": "drop"}),
    "without stage 1": Variant("no_efa"),
    "without stage 2": Variant("no_lfp"),
    "drop, float8": Variant("cogvla", changes={"mode": "drop"}, precision="float8"),
    "drop, int8": Variant("cogvla", changes={"mode": "drop"}, precision="int8"),
    "drop, auto": Variant("cogvla", changes={"mode": "drop"}, precision="auto"),
}

PUBLISHED = "OpenVLA as published"

AS_TRAINED = {
    "plain": Variant(None, engine=False),
    "engine": Variant(None),
    "float8": Variant(None, precision="float8"),
    "int8": Variant(None, precision="int8"),
    "auto": Variant(None, precision="auto"),
}
"""Variants of a checkpoint."""

Deviation = Callable[[CogVLAPolicy], tuple[float, float]]
"""Function that returns the mean and the largest difference of a policy's actions from the model without engine."""


def preset(variant: Variant, name: str, views: int = 2, size: int | None = None) -> tuple[CogVLAConfig, Embodiment]:
    """Return the model configuration of a preset with a variant's routing, and LIBERO's embodiment.

    Args:
        variant: a variant of `VARIANTS`.
        name: a file of configs/policy.
        views: number of cameras.
        size: side of the square views in pixels; None: 224, for `tiny` 128.
    """
    assert variant.routing is not None, "rows of a checkpoint have no preset"
    values = load("embodiment", "libero")
    side = size or (128 if name == "tiny" else 224)
    cameras = [{"name": f"view{index}", "height": side, "width": side} for index in range(views)]
    routing = {**load("routing", variant.routing), **variant.changes}
    config = CogVLAConfig.from_dict({**load("policy", name), "routing": routing})
    return config, build(Embodiment, {**values, "cameras": cameras}, "embodiment")


def random_policy(config: CogVLAConfig, embodiment: Embodiment, device: str, dtype: str) -> CogVLAPolicy:
    """Build a policy with random weights, without engine; it takes as long as a trained one."""
    model = empty_model(config, embodiment)
    _fill(model, torch.device(device), DTYPES[dtype])
    return CogVLAPolicy(model, _preprocessor(embodiment))


def run_as(
    variant: Variant, plain: CogVLAPolicy, engine: str = "auto", smallest: int = 256
) -> tuple[CogVLAPolicy, Deviation | None]:
    """Prepare the policy of a variant.

    Args:
        variant: variant that passed `check`.
        plain: policy without engine; its weights may be moved into the result.
        engine: `EngineConfig.kind`.
        smallest: least number of inputs and of outputs of an 8-bit layer.

    Returns:
        The policy, and the function that measures its deviation from `plain` (None without engine).

    Raises:
        NotMeasuredError: the machine or the model does not support 8 bits.
        ValueError: the engine cannot run this model.
    """
    if not variant.engine:
        return plain, None
    seen = [observe(plain.embodiment, 1, seed) for seed in range(CALIBRATION)]
    plain.reset()
    expected = [torch.from_numpy(plain.act(observation).actions) for observation in seen]
    plain.reset()
    dtype = None if variant.precision == "float8" else variant.precision
    bound = EngineConfig.bound if variant.routing is None else math.inf  # random weights amplify rounding
    try:
        policy = plain.with_engine(EngineConfig(engine, dtype=dtype, smallest=smallest, bound=bound), release=True)
        if variant.precision == "float8":
            policy.to_float8(seen, smallest)
    except ValueError as error:
        if variant.precision is None:
            raise
        raise NotMeasuredError(str(error)) from error

    def deviation(policy: CogVLAPolicy) -> tuple[float, float]:
        policy.reset()
        found = [torch.from_numpy(policy.act(observation).actions) for observation in seen]
        difference = torch.stack([(a - b).abs() for a, b in zip(found, expected, strict=True)])
        return float(difference.mean()), float(difference.max())

    return policy, deviation


def measure_row(
    name: str, policy: CogVLAPolicy, deviation: Deviation | None, batch: int, calls: int, peaks: Peaks
) -> Measured:
    """Time the policy of a variant at one batch size.

    Args:
        name: name of the row.
        policy: policy from `run_as`.
        deviation: function from `run_as`; it is called at batch 1.
        batch: samples in one pass.
        calls: number of timed calls.
        peaks: peaks of this machine in the policy's precision.
    """
    words = policy.preprocessor.text([INSTRUCTION])[0].shape[1]  # with the prompt of a pretrained tokenizer
    costs = count_flops(policy.model.config, policy.embodiment, words, batch)
    cost = next(cost for cost in costs if cost.stage == REPEATED)
    measured = measure(policy, observe(policy.embodiment, batch), calls, name, cost, peaks, INSTRUCTION)
    return measured if deviation is None or batch > 1 else replace(measured, deviation=deviation(policy))


def published_policy(config: CogVLAConfig, embodiment: Embodiment, device: str, dtype: str) -> CogVLAPolicy:
    """Build OpenVLA's backbone with random weights, for `measure_published`; see `flops.without_stages`."""
    return random_policy(*without_stages(config, embodiment), device, dtype)


def measure_published(policy: CogVLAPolicy, dtype: str, batch: int, calls: int, peaks: Peaks) -> Measured:
    """Time OpenVLA as published at one batch size: a single action, not a chunk.

    Args:
        policy: policy from `published_policy`.
        dtype: its precision, of `DTYPES`.
        batch: samples in one pass.
        calls: number of timed calls.
        peaks: peaks of this machine in that precision.
    """
    decoder, observation = TokenDecoder(policy.model), observe(policy.embodiment, batch)
    device = str(policy.preprocessor.device)

    def act() -> torch.Tensor:
        inputs = policy.preprocessor.observation(observation)
        return decoder(inputs.pixels, inputs.text_ids).cpu()

    reset_peak_memory(device)
    act()
    times = call_times(act, calls)
    costs = count_decoding(policy.model.config, policy.embodiment, len(INSTRUCTION.split()), batch)
    cost = next(cost for cost in costs if cost.stage == TOTAL)
    return summarise(times, PUBLISHED, batch, cost, peaks, dtype, "transformers", peak_memory_gib(device))


def observe(embodiment: Embodiment, batch: int, seed: int = 0) -> Observation:
    """Return a random observation of `batch` robots with the benchmark's instruction."""
    return replace(embodiment.fake_observation(batch, seed), instruction=[INSTRUCTION] * batch)


def _fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace all parameters by random weights of typical size, created directly on the device."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensor = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.dim() < 2:
                tensor.fill_(1.0 if "norm" in type(module).__name__.lower() and name == "weight" else 0.0)
            else:
                tensor.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    model.to(device)


def _preprocessor(embodiment: Embodiment) -> Preprocessor:
    span = {"state": embodiment.state_dim, "action": embodiment.action_dim}
    low, high = -1.0, 1.0
    statistics = {
        key: Statistics((low,) * dim, (high,) * dim, (low,) * dim, (high,) * dim, (0.0,) * dim, (1.0,) * dim)
        for key, dim in span.items()
    }
    return Preprocessor(embodiment, WordTokenizer.from_instructions([INSTRUCTION]), statistics)
