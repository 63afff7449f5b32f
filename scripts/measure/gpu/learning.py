"""Part `learning`: train `tiny` and `small` from nothing on packed demonstrations, for minutes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cogvla.policy.checkpoint import save_checkpoint
from cogvla.policy.cost.not_measured import NotMeasuredError
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.packed import unpack
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.training import adapters
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.optimisation import warmup_cosine
from cogvla.policy.training.validation import validate
from cogvla.scripts.measure.gpu.journal import Row
from cogvla.scripts.measure.gpu.networks import network
from cogvla.scripts.measure.gpu.runner import Task
from cogvla.scripts.measure.gpu.settings import Settings
from cogvla.scripts.measure.gpu.steps import Steps, generated, objective_for

COLUMNS = {
    "frames": "frames",
    "batch": "batch",
    "steps": "steps",
    "samples_per_s": "samples/s",
    "loss": "loss",
    "action_l1": "action L1, held out",
    "wrong_instruction_l1": "with a wrong instruction",
    "target_cm": "target error, cm",
}
TRAINING = {
    "tiny": TrainingConfig(batch_size=128, learning_rate=1e-3, cpu_parts=1, precision="bfloat16"),
    "small": TrainingConfig(batch_size=64, learning_rate=3e-4, cpu_parts=1, precision="bfloat16"),
}
SECONDS, REHEARSED_SECONDS = 240.0, 1.0
HELD_OUT = 0.1
CURVE = 20
"""Steps between two points of the loss curve."""


def tasks(settings: Settings) -> Mapping[str, Task]:
    """Return a task for each preset."""
    return {name: partial(learn, settings, name) for name in TRAINING}


def learn(settings: Settings, name: str) -> Iterable[Row]:
    """Train a preset, save the weights of `tiny` as a checkpoint, and yield the row."""
    data, robot = demonstrations(settings)
    config = network(settings, name, "bypass")[0]
    training, seconds = TRAINING[name], SECONDS
    if settings.rehearse:
        training, seconds = replace(training, batch_size=4), REHEARSED_SECONDS
    learned, held_out = data.split(HELD_OUT, seed=0)
    torch.manual_seed(0)
    model = CogVLA(config, robot).to(settings.device)
    steps = Steps(model, learned, training, objective_for(data, robot))
    curve, took = _train(steps, training, seconds)
    objective = steps.weights.averaged()
    with steps.accelerator.autocast():
        errors = validate(objective, held_out, steps.builder)
    if name == "tiny":
        description = {"step": steps.count, "batch_size": training.batch_size, "data_set": data.describe()}
        weights = adapters.merged_state(objective.model)
        folder = Path(settings.output) / "tiny"
        save_checkpoint(folder, weights, config, steps.preprocessor, learned.statistics(), description)
    yield {
        "row": name,
        "frames": len(learned),
        "batch": training.batch_size,
        "steps": steps.count,
        "samples_per_s": steps.count * training.batch_size / took,
        "loss": curve[-1][1],
        "curve": curve,
        **{key.removeprefix("validation/"): value for key, value in errors.items()},
    }


def demonstrations(settings: Settings) -> tuple[DemonstrationData, Embodiment]:
    """Return the packed demonstrations and their robot; in a rehearsal without a file, generated ones.

    Raises:
        NotMeasuredError: no file is given.
    """
    if settings.demonstrations is not None:
        return unpack(Path(settings.demonstrations))
    if not settings.rehearse:
        raise NotMeasuredError("no file of demonstrations (--demonstrations FILE, made with --pack)")
    robot = network(settings, "tiny", "bypass")[1]
    return generated(robot, episodes=10), robot


def _train(steps: Steps, training: TrainingConfig, seconds: float) -> tuple[list[tuple[float, float]], float]:
    """Train for some seconds; return the curve of (seconds, loss), and the seconds it took."""
    curve: list[tuple[float, float]] = []
    started = time.monotonic()
    while True:
        elapsed = time.monotonic() - started
        rate = warmup_cosine(int(1000 * elapsed / seconds), 25, 1000)
        loss = steps.step(training.learning_rate * rate)
        if steps.count % CURVE == 0 or elapsed >= seconds:
            curve.append((round(elapsed, 2), loss.item()))
        if elapsed >= seconds:
            return curve, time.monotonic() - started
