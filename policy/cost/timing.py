"""Measure the time of a policy and its stages, and the peak rates of the machine."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cogvla.policy.cost.flops import BYTES, StageCost
from cogvla.policy.engine.float8 import Float8Linear
from cogvla.policy.engine.int8 import Int8Linear
from cogvla.policy.engine.linear import FusedLinear
from cogvla.policy.engine.network import FusedNetwork
from cogvla.policy.engine.recording import Tensors, record
from cogvla.policy.interface import Observation
from cogvla.policy.model.routers.policy_router import Routed
from cogvla.policy.policy import CogVLAPolicy

STAGE_CALLS = 50
"""Largest number of timed calls of each stage."""
WIDTHS = {"float32": (4, 4), "bfloat16": (2, 2), "float8": (1, 2), "int8": (1, 4)}
"""Bytes of a weight and of an activation by precision; with 8 bits, all weights count as 8-bit weights."""


@dataclass(frozen=True)
class Peaks:
    """Measured peak rates of a machine.

    Attributes:
        name: name of the device.
        flops: FLOP/s of a large matrix product in one precision.
        bandwidth: bytes/s read and written by a large copy.
    """

    name: str
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Measured:
    """One row of measurements; times in ms from an observation to actions in physical units.

    Attributes:
        row: name of the row.
        batch: samples in one pass.
        calls: number of timed calls.
        least: shortest time.
        p50: median time.
        p95: 95th percentile of the time.
        p99: 99th percentile of the time.
        flops: FLOP of one pass with a reused instruction.
        moved: least number of bytes that this pass reads and writes.
        floor: lower bound of the time at the machine's measured peaks.
        memory_gib: peak memory in GiB: allocated GPU memory, or memory of the process on a CPU.
        peaks: measured peaks of the machine.
        engine: engine of the policy.
        stages: median time of each stage.
        deviation: mean and largest difference of the actions from the model without engine; None: not measured.
    """

    row: str
    batch: int
    calls: int
    least: float
    p50: float
    p95: float
    p99: float
    flops: float
    moved: float
    floor: float
    memory_gib: float
    peaks: Peaks
    engine: str
    stages: dict[str, float] = field(default_factory=dict)
    deviation: tuple[float, float] | None = None

    @property
    def tflops(self) -> float:
        """TFLOP/s."""
        return self.flops / self.p50 / 1e9

    @property
    def gb_per_s(self) -> float:
        """GB/s."""
        return self.moved / self.p50 / 1e6

    @property
    def times_floor(self) -> float:
        """The median as a multiple of the floor."""
        return self.p50 / self.floor


@functools.cache
def machine_peaks(device: str, precision: str) -> Peaks:
    """Measure the peak rates: the best of several large products and copies.

    Args:
        device: torch device.
        precision: one of `WIDTHS`.
    """
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    size = 8192 if on_gpu and precision != "float32" else 1024
    source = torch.empty(2**28 if on_gpu else 2**25, device=device, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    product = _best(_product(device, precision, size), device)
    copy = _best(lambda: target.copy_(source), device)
    return Peaks(name, 2 * size**3 / product, 2 * source.numel() / copy)


def _product(device: str, precision: str, size: int) -> Callable[[], object]:
    """Return a function that multiplies two square matrices; in 8 bits with the engine's layer."""
    kind = torch.bfloat16 if precision in ("bfloat16", "float8") else torch.float32
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    if precision == "float8":
        layer: nn.Module = Float8Linear(FusedLinear(b, None, kind), a.abs().amax())
        return lambda: layer(a)
    if precision == "int8":
        layer = Int8Linear(FusedLinear(b, None, kind))
        return lambda: layer(a)
    return lambda: a @ b


def measure(
    policy: CogVLAPolicy,
    observation: Observation,
    calls: int,
    row: str,
    cost: StageCost,
    peaks: Peaks,
    instruction: str,
) -> Measured:
    """Time `policy.act` and its stages.

    Args:
        policy: policy with or without engine.
        observation: batch for every call.
        calls: number of timed calls.
        row: name of the row.
        cost: cost of one pass with this batch.
        peaks: peaks of this machine in the policy's precision.
        instruction: instruction of the observation, for the warm-up.
    """
    device, about = str(policy.preprocessor.device), policy.describe()
    reset_peak_memory(device)
    policy.warm_up(observation.batch_size, [instruction])
    samples = call_times(lambda: policy.act(observation), calls)
    engine, memory = str(about["engine"]), peak_memory_gib(device)
    measured = summarise(samples, row, observation.batch_size, cost, peaks, about["dtype"], engine, memory)
    return replace(measured, stages=_stages(policy, observation, min(calls, STAGE_CALLS)))


def call_times(act: Callable[[], object], calls: int) -> list[float]:
    """Return the ms of each call after an untimed one; `act` must return results on the host, so nothing runs on."""
    act()
    samples: list[float] = []
    for _ in range(calls):
        started = time.perf_counter()
        act()
        samples.append((time.perf_counter() - started) * 1e3)
    return samples


def summarise(
    samples: list[float],
    row: str,
    batch: int,
    cost: StageCost,
    peaks: Peaks,
    precision: str,
    engine: str,
    memory_gib: float,
) -> Measured:
    """Return the row of these times in ms.

    Args:
        samples: times of the calls.
        row: name of the row.
        batch: samples in one pass.
        cost: cost of one pass with this batch.
        peaks: peaks of this machine in this precision.
        precision: one of `WIDTHS`.
        engine: engine of the policy.
        memory_gib: peak memory in GiB.
    """
    of_weight, of_activation = WIDTHS[precision]
    moved = (cost.weight_bytes * of_weight + cost.activation_bytes * of_activation) / BYTES
    p50, p95, p99 = (float(np.percentile(samples, q)) for q in (50, 95, 99))
    return Measured(
        row=row,
        batch=batch,
        calls=len(samples),
        least=min(samples),
        p50=p50,
        p95=p95,
        p99=p99,
        flops=cost.flops,
        moved=moved,
        floor=1e3 * max(cost.flops / peaks.flops, moved / peaks.bandwidth),
        memory_gib=memory_gib,
        peaks=peaks,
        engine=engine,
    )


def reset_peak_memory(device: str) -> None:
    """Count the GPU's peak memory from now on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib(device: str) -> float:
    """Return the peak of allocated GPU memory; on a CPU, that of the memory of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


@torch.inference_mode()
def _stages(policy: CogVLAPolicy, observation: Observation, calls: int) -> dict[str, float]:
    """Measure the median time in ms of each stage alone; with an engine, each stage is recorded separately.

    A policy with token routers has no such stages: they pass more than vision tokens on.
    """
    inputs = policy.preprocessor.observation(observation)
    device = str(policy.preprocessor.device)
    parts: dict[str, Callable[[], object]] = {"prepare": lambda: policy.preprocessor.observation(observation)}
    if policy.model.router is not None:
        return {name: _median(part, device, calls) for name, part in parts.items()}
    if (engine := policy.engine) is None:
        model = policy.model
        text = model.encode_text(inputs.text_ids, inputs.text_mask)
        vision_BND = model.vision(inputs.pixels, text.vision)
        output = model.decide(vision_BND, inputs.state, text, decode=False)
        parts["vision"] = lambda: model.vision(inputs.pixels, text.vision)
        parts["decide"] = lambda: model.decide(vision_BND, inputs.state, text, decode=False)
        parts["head"] = lambda: model.head(output.states)
    else:
        network, encoded = engine.network, engine.encode(inputs.text_ids, inputs.text_mask)
        tensors = {"pixels": inputs.pixels, "state": inputs.state, **encoded.tensors}
        see = record(engine.kind, _Stage(network, lambda part, given: part.see(given).vision_BnD), tensors)
        seen: dict[str, Tensor] = {**tensors, "vision": see(tensors)}
        decide = record(
            engine.kind, _Stage(network, lambda part, given: part.decide(Routed(given["vision"]), given)), seen
        )
        states = {"states": decide(seen)}
        head = record(engine.kind, _Stage(network, lambda part, given: part.head(given["states"])), states)
        parts |= {"vision": lambda: see(tensors), "decide": lambda: decide(seen), "head": lambda: head(states)}
    return {name: _median(part, device, calls) for name, part in parts.items()}


class _Stage(nn.Module):
    """One stage of a network as a module; a recorded function with 8-bit layers must be a module."""

    def __init__(self, network: FusedNetwork, stage: Callable[[FusedNetwork, Tensors], Tensor]) -> None:
        super().__init__()
        self.network, self.stage = network, stage

    def forward(self, given: Tensors) -> Tensor:
        return self.stage(self.network, given)


def profile(policy: CogVLAPolicy, observation: Observation, path: Path) -> None:
    """Write a trace of three calls to `path`, for Perfetto or chrome://tracing."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if policy.preprocessor.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(3):
            policy.act(observation)
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))


def _median(function: Callable[[], object], device: str, calls: int) -> float:
    return float(np.median(_times(function, device, calls))) * 1e3


def _best(function: Callable[[], object], device: str) -> float:
    return min(_times(function, device, 8))


def _times(function: Callable[[], object], device: str, calls: int) -> list[float]:
    """Return the seconds of each call after two untimed calls."""
    times: list[float] = []
    for _ in range(calls + 2):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - started)
    return times[2:]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
