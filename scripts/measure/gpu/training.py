"""Part `training`: samples per second and memory of training steps, with all stages and without."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.cost.flops import TOTAL, count_flops
from cogvla.policy.cost.timing import machine_peaks, peak_memory_gib, reset_peak_memory
from cogvla.policy.cost.variants import INSTRUCTION, random_policy
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.config import TrainingConfig
from cogvla.scripts.measure.gpu.journal import Row
from cogvla.scripts.measure.gpu.networks import network
from cogvla.scripts.measure.gpu.runner import Task
from cogvla.scripts.measure.gpu.settings import Settings
from cogvla.scripts.measure.gpu.steps import Steps, generated, objective_for

COLUMNS = {
    "checkpointing": "checkpointing",
    "batch": "batch",
    "seconds": "s/step",
    "samples_per_s": "samples/s",
    "memory_gib": "GiB",
    "of_peak": "share of large products' speed",
}
BATCHES = {"cogvla_7b": (16, 8, 4, 2, 1), "small": (32, 16, 8)}
"""Batch sizes to try; the first that fits into memory is measured."""
STEPS, LEARNING_RATE = 6, 1e-5
PASSES = {"lora_all": 2, "full": 3}
"""A step in forward passes: adapters need no gradient of the large weights. Recomputed passes do not count."""


def tasks(settings: Settings) -> Mapping[str, Task]:
    """Return a task for each network, routing, and way to train."""
    ways = (("cogvla_7b", "lora_all", False), ("small", "full", False), ("cogvla_7b", "lora_all", True))
    chosen = [(*way, variant) for way in ways for variant in ("bypass", "all off")]
    return {
        f"{name}, {variant}, {finetune}{', checkpointing' * again}": partial(
            measure, settings, name, finetune, again, variant
        )
        for name, finetune, again, variant in chosen
    }


def measure(settings: Settings, name: str, finetune: str, checkpointing: bool, variant: str) -> Iterable[Row]:
    """Yield the row of the largest batch that fits."""
    config, robot, _ = network(settings, name, variant)
    model = random_policy(config, robot, settings.device, "float32").model
    data = generated(robot, episodes=4)
    training = TrainingConfig(
        cpu_parts=1,
        ema_decay=0.0,
        precision="bfloat16",
        gradient_checkpointing=checkpointing,
        finetune=build(FinetuneConfig, load("finetune", finetune), "finetune"),
    )
    steps = Steps(model, data, training, objective_for(data, robot))
    batch, seconds, memory = largest(steps, (2,) if settings.rehearse else BATCHES[name], settings)
    costs = count_flops(config, robot, len(INSTRUCTION.split()), batch)
    flops = PASSES[finetune] * next(cost.flops for cost in costs if cost.stage == TOTAL)
    yield {
        "row": f"{name}, {variant}, {finetune}",
        "preset": name,
        "variant": variant,
        "checkpointing": "on" if checkpointing else "off",
        "batch": batch,
        "seconds": seconds,
        "samples_per_s": batch / seconds,
        "memory_gib": memory,
        "of_peak": flops / seconds / machine_peaks(settings.device, "bfloat16").flops,
    }


def largest(steps: Steps, batches: Iterable[int], settings: Settings) -> tuple[int, float, float]:
    """Return the first batch size that fits, the median seconds of its steps, and the peak memory in GiB.

    Raises:
        torch.OutOfMemoryError: none of them fits.
    """
    last: torch.OutOfMemoryError | None = None
    for batch in batches:
        steps.resize(batch)
        reset_peak_memory(settings.device)
        try:
            return batch, _seconds(steps, 2 if settings.rehearse else STEPS), peak_memory_gib(settings.device)
        except torch.OutOfMemoryError as error:
            last = error.with_traceback(None)  # its frames hold the tensors of the step
    assert last is not None, "there are batch sizes to try"
    raise last


def _seconds(steps: Steps, count: int) -> float:
    """Return the median seconds of steps, after two that are not timed."""
    times = []
    for _ in range(count + 2):
        started = time.perf_counter()
        steps.step(LEARNING_RATE).item()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times[2:]))
