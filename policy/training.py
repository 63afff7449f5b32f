"""The training loop: one for every preset, on accelerate (single process, DDP or FSDP by its configuration).

Unusual here:

- every random draw is a function of (seed, step, rank), so that nothing random has to be saved and a resumed run
  equals the uninterrupted one bit for bit on a CPU;
- the inference weights of a checkpoint are the moving average; `training.pt` beside them holds the raw ones;
- validation also measures the error under a wrong instruction: the gap says whether the policy listens.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

from cogvla.policy.batches import BatchBuilder
from cogvla.policy.checkpoint import load_training_state, save_checkpoint
from cogvla.policy.config import CogVLAConfig
from cogvla.policy.data import DemonstrationData, TrainingBatches
from cogvla.policy.objective import Objective
from cogvla.policy.optimisation import ExponentialAverage, adamw, warmup_cosine
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.preprocess import Preprocessor
from cogvla.policy.validation import validate

PRECISIONS = ("auto", "float32", "bfloat16")
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Steps are optimiser steps; `batch_size` is per step, over all processes and accumulation."""

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.998
    precision: str = "auto"
    compile: bool = False
    seed: int = 0
    validation_fraction: float = 0.03
    validate_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    rollout_every: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.accumulation, self.checkpoint_every, self.keep_checkpoints) < 1:
            raise ValueError(
                "steps, batch_size, accumulation, checkpoint_every and keep_checkpoints must be at least 1"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; one of {', '.join(PRECISIONS)}")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError("learning_rate and clip_norm must be positive")


class Trainer:
    """Trains one policy on one data set and leaves checkpoints in `output/checkpoints`, the last also in `output/policy`.

    Args:
        config: how to train.
        objective: the policy with its training heads.
        model_config: written into checkpoints.
        preprocessor: the same object that inference uses.
        data: the demonstrations.
        output: folder of this run; an earlier run's checkpoints there are resumed.
        log: receives (metrics, step).
        evaluate: optional periodic rollouts, (policy, step) -> metrics.
    """

    def __init__(
        self,
        config: TrainingConfig,
        objective: Objective,
        model_config: CogVLAConfig,
        preprocessor: Preprocessor,
        data: DemonstrationData,
        output: Path,
        log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
        evaluate: Callable[[CogVLAPolicy, int], dict[str, float]] | None = None,
    ) -> None:
        self.config, self.model_config, self.data, self.output = config, model_config, data, output
        self.log, self.evaluate = log, evaluate
        bf16 = config.precision == "bfloat16" or (config.precision == "auto" and torch.cuda.is_available())
        self.accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            cpu=not torch.cuda.is_available(),
            step_scheduler_with_optimizer=False,
        )
        if config.batch_size % (self.accelerator.num_processes * config.accumulation):
            raise ValueError(
                f"batch_size {config.batch_size} must be a multiple of processes x accumulation "
                f"({self.accelerator.num_processes} x {config.accumulation})"
            )
        self.preprocessor = preprocessor.to(self.accelerator.device)
        self.objective: Any = self.accelerator.prepare(objective)
        optimiser = adamw(self.objective, config.learning_rate, config.weight_decay)
        self.schedule = warmup_cosine(optimiser, config.warmup_steps, config.steps)
        self.optimiser: Any = self.accelerator.prepare(optimiser)
        self.raw: Objective = self.accelerator.unwrap_model(self.objective)
        self.forward = torch.compile(self.objective) if config.compile else self.objective
        self.average = ExponentialAverage(dict(self.raw.named_parameters()), config.ema_decay)
        training, held_out = data.split(config.validation_fraction, config.seed)
        self.batches = TrainingBatches(training, config.batch_size, config.seed)
        self.held_out = held_out
        self.builder = BatchBuilder(data, self.preprocessor, self.raw.config)
        self.step = 0

    def run(self) -> CogVLAPolicy:
        """Train to the last step (from the newest checkpoint, if there is one) and return the policy."""
        self._resume()
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            smoothing=0.05,
        )
        started, first = time.perf_counter(), self.step
        window: list[dict[str, Tensor]] = []
        try:
            while self.step < self.config.steps:
                window.append(self._train_step())
                self.step += 1
                bar.update()
                if self.step % 20 == 0 or self.step == self.config.steps:
                    metrics = {f"train/{k}": torch.stack([w[k] for w in window]).mean().item() for k in window[0]}
                    window.clear()
                    self._check_finite(metrics)
                    seconds = time.perf_counter() - started
                    rate = (self.step - first) * self.config.batch_size / seconds
                    metrics |= {"train/learning_rate": self.schedule.get_last_lr()[0]}
                    bar.set_postfix(loss=f"{metrics['train/loss']:.4f}", samples_per_s=f"{rate:.0f}")
                    self._record(metrics, {"train/samples_per_s": rate})
                if self._due(self.config.validate_every) and len(self.held_out):
                    self._record(validate(self.averaged(), self.held_out, self.builder), {})
                if self.evaluate is not None and self._due(self.config.rollout_every):
                    self._record(self.evaluate(self.policy(), self.step), {})
                if self._due(self.config.checkpoint_every):
                    self.save()
        except KeyboardInterrupt:
            bar.close()
            self.save()
            self.accelerator.print(f"stopped at step {self.step}; the same command goes on from there")
            raise
        bar.close()
        policy = self.policy()
        self._export(self.output / "policy")
        return policy

    def averaged(self) -> Objective:
        """A copy of the model and its heads with the averaged weights."""
        objective = copy.deepcopy(self.raw)
        objective.load_state_dict({**self.raw.state_dict(), **self.average.average})
        return objective.eval()

    def policy(self) -> CogVLAPolicy:
        """The policy with the averaged weights."""
        return CogVLAPolicy(self.averaged().model, self.preprocessor, self.describe())

    def describe(self) -> dict[str, Any]:
        """Provenance of the policy at this step."""
        return {
            "step": self.step,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "data_set": self.data.describe(),
        }

    def save(self) -> None:
        """Write `checkpoints/step_N` and delete all but the newest ones."""
        model_state, optimiser_state = get_state_dict(self.objective, self.optimiser.optimizer, options=FULL_STATE)
        if self.accelerator.is_main_process:
            training = {
                "step": self.step,
                "objective": model_state,
                "optimiser": optimiser_state,
                "schedule": self.schedule.state_dict(),
                "average": self.average.average,
                "batches": self.batches.state_dict(),
            }
            self._export(self.output / "checkpoints" / f"step_{self.step:07d}", training)
            for old in self._checkpoints()[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _export(self, folder: Path, training: dict[str, Any] | None = None) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                folder,
                self.averaged().model.state_dict(),
                self.model_config,
                self.preprocessor,
                self.data.statistics(),
                self.describe(),
                training,
            )

    def _train_step(self) -> dict[str, Tensor]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        seed = (self.config.seed * 1_000_003 + self.step) * world + rank
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        rows = self.batches.rows(self.step)[rank::world]
        self.objective.train()
        losses: dict[str, Tensor] = {}
        for part in rows.chunk(self.config.accumulation):
            batch = self.builder.training(self.batches.gather(part), generator)
            with self.accelerator.autocast():
                parts = self.forward(batch)
            self.accelerator.backward(parts["loss"] / self.config.accumulation)
            for name, value in parts.items():
                losses[name] = losses.get(name, 0) + value.detach() / self.config.accumulation
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.schedule.step()
        self.average.update(dict(self.raw.named_parameters()), self.step + 1)
        return {**losses, "gradient_norm": norm.detach()}

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _check_finite(self, metrics: dict[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} is not finite at step {self.step}. The checkpoint before it is intact; "
                "go on from there with a smaller training.learning_rate or training.clip_norm"
            )

    def _record(self, metrics: dict[str, float], volatile: dict[str, float]) -> None:
        """`metrics` go to metrics.jsonl, which a resumed run reproduces exactly; `volatile` to the logger only."""
        if self.accelerator.is_main_process:
            with (self.output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **metrics}) + "\n")
            self.log({**metrics, **volatile}, self.step)

    def _checkpoints(self) -> list[Path]:
        found = (self.output / "checkpoints").glob("step_*")
        return sorted(path for path in found if re.fullmatch(r"step_\d+", path.name))

    def _resume(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        metrics = self.output / "metrics.jsonl"
        checkpoints = self._checkpoints()
        if checkpoints:
            state = load_training_state(checkpoints[-1])
            set_state_dict(
                self.objective,
                self.optimiser.optimizer,
                model_state_dict=state["objective"],
                optim_state_dict=state["optimiser"],
                options=FULL_STATE,
            )
            self.schedule.load_state_dict(state["schedule"])
            self.batches.load_state_dict(state["batches"])
            for name, value in state["average"].items():
                self.average.average[name].copy_(value)
            self.step = state["step"]
            self.accelerator.print(f"resuming {checkpoints[-1]}")
        if self.accelerator.is_main_process:
            rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= self.step]
            draft = metrics.with_suffix(f".{os.getpid()}.partial")
            draft.write_text("".join(kept))
            draft.replace(metrics)
