"""Choice of the fastest precision on this machine, for `engine.dtype=auto`.

Engines in each precision that the machine has units for run in turns on the same observations. The fastest one wins
whose actions stay near those in the checkpoint's own precision; a gain below `GAIN` is not worth another precision.

Shape legend: B batch, K chunk, A action dimension.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cogvla.policy.engine.engine import Engine, EngineConfig, starting
from cogvla.policy.engine.float8 import Calibration
from cogvla.policy.model.cogvla import CogVLA, ModelInput

GAIN = 1.1
"""Least speed-up of another precision over the checkpoint's own."""
CALLS = 20
"""Timed calls of each engine."""


@dataclass(frozen=True)
class Measured:
    """One precision.

    Attributes:
        dtype: a value of `EngineConfig.dtype`.
        milliseconds: least time of the network for one observation; None: it cannot run here.
        deviation: mean difference of the normalised actions from those in the checkpoint's own precision.
        refused: reason why it was not chosen although it may be fast; None: it could be chosen.
    """

    dtype: str
    milliseconds: float | None = None
    deviation: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Choice:
    """The chosen precision, and what was measured for it.

    Attributes:
        dtype: the chosen precision.
        measured: all precisions that were considered; the first is the checkpoint's own.
    """

    dtype: str
    measured: tuple[Measured, ...]

    def __str__(self) -> str:
        return f"engine.dtype=auto: {self.dtype} ({'; '.join(map(_line, self.measured))})"


def choose_precision(
    model: CogVLA, config: EngineConfig, inputs: Sequence[ModelInput], calibration: Calibration | None = None
) -> Choice:
    """Measure the precisions that this machine supports and choose one.

    While it measures, the memory holds the weights once more in each precision.

    Args:
        model: trained model, which can be fused.
        config: settings of the engine; its `dtype` is ignored.
        inputs: observations of one robot each; the first is timed, all are compared.
        calibration: input ranges of this model, for `float8`; None: it is not considered.
    """
    own, *others = _candidates(model, calibration)
    engines: dict[str, Engine] = {}
    refused: list[Measured] = []
    for dtype in (own, *others):
        try:
            as_asked = replace(config, dtype=None if dtype == own else dtype)  # its own may be float16
            engines[dtype] = Engine(model, as_asked, calibration=calibration)
        except ValueError as error:
            if dtype == own:
                raise
            refused.append(Measured(dtype, refused=str(error).partition(":")[0]))
    inputs = [starting(model, one) for one in inputs]
    words = inputs[0].text_ids.shape[1]
    for engine in engines.values():
        engine.warm_up(inputs[0], words)
    answers = {dtype: [_actions(engine, one) for one in inputs] for dtype, engine in engines.items()}
    times = _in_turns([_call(engine, inputs[0]) for engine in engines.values()])
    found = [
        _judged(dtype, milliseconds, answers[dtype], answers[own], config.bound)
        for dtype, milliseconds in zip(engines, times, strict=True)
    ]
    return Choice(_fastest(found), (*found, *refused))


def has_bfloat16_units(device: torch.device) -> bool:
    """Return whether products in bfloat16 are faster than in float32 by the hardware's design."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def _candidates(model: CogVLA, calibration: Calibration | None) -> list[str]:
    """Return the precisions to consider, the model's own first."""
    first = next(model.parameters())
    found = [str(first.dtype).removeprefix("torch.")]
    if has_bfloat16_units(first.device):
        found.append("bfloat16")
    if first.is_cuda:
        found += ["float8"] if calibration is not None else []
    else:
        found += ["float32", "int8"]
    return list(dict.fromkeys(found))


def _actions(engine: Engine, inputs: ModelInput) -> Tensor:
    """Return normalised actions, float32 [B,K,A]."""
    return engine.run(inputs, engine.encode(inputs.text_ids, inputs.text_mask)).float().cpu().clone()


def _call(engine: Engine, inputs: ModelInput) -> Callable[[], object]:
    """Return a function that runs the network as the control loop does, and waits for the actions."""
    text = engine.encode(inputs.text_ids, inputs.text_mask)
    return lambda: engine.run(inputs, text).cpu()


def _in_turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Return the least time of each call in milliseconds, to which other work on the machine adds nothing."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(CALLS):
        for call, taken in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return [1e3 * min(taken) for taken in seconds]


def _judged(
    dtype: str, milliseconds: float, found: Sequence[Tensor], expected: Sequence[Tensor], bound: float
) -> Measured:
    differences = [(a - b).abs().mean() for a, b in zip(found, expected, strict=True)]
    deviation = float(torch.stack(differences).mean())
    refused = None if deviation <= bound else f"actions deviate by more than {bound}"
    return Measured(dtype, milliseconds, deviation, refused)


def _fastest(found: Sequence[Measured]) -> str:
    """Return the precision to take; the first is the model's own."""
    own, *others = found
    assert own.milliseconds is not None, "the model's own precision always runs"
    allowed = [one for one in others if one.refused is None and one.milliseconds is not None]
    best = min(allowed, key=lambda one: one.milliseconds or 0.0, default=own)
    assert best.milliseconds is not None
    return best.dtype if best.milliseconds * GAIN <= own.milliseconds else own.dtype


def _line(one: Measured) -> str:
    if one.milliseconds is None:
        return f"{one.dtype} not measured: {one.refused}"
    text = f"{one.dtype} {one.milliseconds:.2f} ms"
    if one.deviation:
        text += f", deviation {one.deviation:.4f}"
    return text if one.refused is None else f"{text}, refused: {one.refused}"
