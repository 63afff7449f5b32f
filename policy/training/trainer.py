"""The training loop for all presets, on accelerate (one process, DDP or FSDP, as accelerate is configured).

- Random draws depend on (seed, step) only, and are made for a whole batch before it is divided. So no random state has
  to be saved, a resumed run on a CPU equals an uninterrupted one exactly, and neither the number of processes nor
  accumulation changes the result.
- A checkpoint holds the moving average of the weights with adapters folded in, for inference. `training.pt` holds the
  raw trained weights; frozen weights are loaded again from the base.
- Validation also measures the error with a wrong instruction: the larger the gap, the more the policy uses the
  instruction.
"""

from __future__ import annotations

import copy
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from tqdm import tqdm

from cogvla.policy.checkpoint import load_training_state, read_config, save_checkpoint
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.text_encoder import same_place
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training import adapters
from cogvla.policy.training.batches import BatchBuilder, Choices
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.data_checks import check_instructions
from cogvla.policy.training.identity import FINISHED, differences, identity
from cogvla.policy.training.interrupt import Interruption
from cogvla.policy.training.metrics import LossWindow, MetricsFile
from cogvla.policy.training.objective import Batch, Objective
from cogvla.policy.training.optimisation import warmup_cosine
from cogvla.policy.training.parallel import ParallelGradients, keep_freed_memory
from cogvla.policy.training.trained_weights import TrainedWeights
from cogvla.policy.training.validation import validate

AVERAGED_STEPS = 20
"""Number of steps whose training metrics are averaged."""
PATIENCE = timedelta(hours=4)
"""Longest time that processes wait for the first one, for example while it plays rollouts."""


class Trainer:
    """Trains one policy on one data set, with checkpoints in `output/checkpoints` and the result in `output/policy`.

    Args:
        config: settings of the training.
        objective: the policy with its training heads.
        model_config: configuration of the model, saved in checkpoints.
        preprocessor: preprocessor of the policy, also used for inference.
        data: demonstrations.
        output: folder of this run; training resumes from the newest checkpoint in it.
        log: function that is called with (metrics, step).
        evaluate: function that plays rollouts, (policy, step) -> metrics; None: no rollouts.
        base: name of the checkpoint whose weights it starts from, for the provenance; None: none.
        base_weights: what must be the same base when the run resumes: a fingerprint of its weights, or a name.

    Raises:
        ValueError: the settings do not fit together, the data, or this machine.
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
        base: str | None = None,
        base_weights: str | None = None,
    ) -> None:
        check_instructions(preprocessor.tokenizer, data)
        self.config, self.model_config, self.data, self.output = config, model_config, data, output
        self.log, self.evaluate, self.base = log, evaluate, base
        self.base_weights = base_weights
        bf16 = config.precision == "bfloat16" or (config.precision == "auto" and torch.cuda.is_available())
        self.accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            cpu=not torch.cuda.is_available(),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        config.check_processes(self.accelerator.num_processes)
        self.preprocessor = preprocessor.to(self.accelerator.device)
        self.weights = TrainedWeights(self.accelerator, objective, config)
        self.objective, self.raw = self.weights.objective, self.weights.raw
        self.forward = torch.compile(self.objective) if config.compile else self.objective
        self.parallel: ParallelGradients | None = None
        alone_on_cpu = self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        if config.cpu_parts > 1 and alone_on_cpu and not bf16:
            self.parallel = ParallelGradients(self.raw, config.cpu_parts, config.compile)
        training, held_out = data.split(config.validation_fraction, config.seed)
        self.batches = TrainingBatches(training, config.batch_size, config.seed, self.raw.model.history)
        self.held_out = held_out
        pictures_and_words = config.augmentation, config.wordings
        prefix = model_config.head.prefix, config.prefix_share
        self.builder = BatchBuilder(data, self.preprocessor, self.raw.config, *pictures_and_words, *prefix)
        self.metrics = MetricsFile(output / "metrics.jsonl")
        self.window = LossWindow(self.accelerator)
        self.interruption = Interruption()
        self.step = self.first_step = 0
        self.chosen: tuple[int, Tensor, Choices] | None = None
        self.given: tuple[int, int] | None = None

    def run(self) -> CogVLAPolicy:
        """Train to the last step (from the newest checkpoint, if there is one) and return the policy.

        Raises:
            ValueError: the checkpoints in `output` are damaged, or from another model, data set or seed.
            FloatingPointError: a loss is NaN or infinite.
            OSError: a checkpoint cannot be written.
            KeyboardInterrupt: on Ctrl-C, after saving (on several processes at the next multiple of 20 steps).
        """
        self._resume()
        progress = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            smoothing=0.05,
        )
        started, self.first_step = time.perf_counter(), self.step
        with progress as bar, self.interruption, nullcontext() if self.parallel is None else closing(self.parallel):
            while self.step < self.config.steps:
                self.window.add(self._train_step())
                self.step += 1
                bar.update()
                if self.step % AVERAGED_STEPS == 0 or self.step == self.config.steps:
                    self.window.settle(self.step)
                    metrics = {f"train/{name}": value for name, value in self.window.take().items()}
                    rate = (self.step - self.first_step) * self.config.batch_size / (time.perf_counter() - started)
                    metrics["train/learning_rate"] = self._learning_rate()
                    bar.set_postfix(loss=f"{metrics['train/loss']:.4f}", samples_per_s=f"{rate:.0f}")
                    for name, counts in self.batches.drawn(self.step).items():
                        metrics |= {f"data/{name}/{kind}": value for kind, value in counts.items()}
                    self._record(metrics, {"train/samples_per_s": rate})
                self._evaluate()
                if self._due(self.config.checkpoint_every):
                    self.save()
                if self._stop_requested():
                    self._stop()
        self._export(self.output / "policy")
        return self.policy()

    def policy(self) -> CogVLAPolicy:
        """Return the policy with averaged weights, without adapters."""
        return self._policy(self.weights.averaged())

    def _policy(self, objective: Objective) -> CogVLAPolicy:
        model = adapters.fold(objective.model)
        if len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1:
            packed = {id(p): p for p in model.parameters() if not p.is_floating_point()}  # in 4 bits
            model = copy.deepcopy(model, packed)  # frozen weights are those of training
            for parameter in model.parameters():  # `model.to` would also round the frequencies of the positions
                if parameter.is_floating_point():
                    parameter.data = parameter.data.bfloat16()
        return CogVLAPolicy(model, self.preprocessor, self.describe())

    def describe(self) -> dict[str, Any]:
        """Return the provenance of the policy at this step."""
        return {
            "step": self.step,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "data_set": self.data.describe(),
            **({} if self.base is None else {"base": self.base}),
            **({"drawn": drawn} if (drawn := self.batches.drawn(self.step)) else {}),
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that must be the same when this run resumes."""
        began = self.config.augmentation, self.base_weights
        found = identity(self.data, self.preprocessor, self.raw.config, self.builder.wordings, *began)
        if self.builder.prefix:
            found["committed"] = {"head.prefix": self.builder.prefix, "training.prefix_share": self.config.prefix_share}
            found["data set, executed actions"] = self.data.executed_content()
        return found

    def save(self) -> None:
        """Write `checkpoints/step_N` and delete all but the newest ones."""
        self.window.settle(self.step)
        training = {
            "step": self.step,
            **self.weights.state_dict(),
            "batches": self.batches.state_dict(),
            "identity": self.identity,
            "settings": {name: getattr(self.config, name) for name in FINISHED},
            "window": self.window.state_dict(),
        }
        self._export(self.output / "checkpoints" / f"step_{self.step:07d}", training)
        if self.accelerator.is_main_process:
            for old in self._checkpoints()[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _export(self, folder: Path, training: dict[str, Any] | None = None) -> None:
        if not (self.weights.sharded or self.accelerator.is_main_process):
            return
        objective = self.weights.averaged()
        if self.accelerator.is_main_process:
            save_checkpoint(
                folder,
                adapters.merged_state(objective.model),
                self.model_config,
                self.preprocessor,
                self.data.statistics(),
                self.describe(),
                training,
            )

    def _train_step(self) -> dict[str, Tensor]:
        torch.manual_seed(self._seed(self.step))
        if not self.objective.training:
            self.objective.train()
        losses: dict[str, Tensor] = {}
        for number in range(self.config.accumulation):
            for name, value in self._gradients(self.step, number).items():
                losses[name] = losses.get(name, 0) + value / self.config.accumulation
        return {**losses, "gradient_norm": self.weights.update(self._learning_rate(), self.step + 1)}

    def _seed(self, step: int) -> int:
        return self.config.seed * 1_000_003 + step

    def _evaluate(self) -> None:
        """Run validation and rollouts if they are due, on the first process; the others wait at the next step."""
        validates = self._due(self.config.validate_every) and len(self.held_out) > 0
        plays = self.evaluate is not None and self._due(self.config.rollout_every)
        if not (validates or plays) or not (self.weights.sharded or self.accelerator.is_main_process):
            return
        objective = self.weights.averaged()
        if not self.accelerator.is_main_process:
            return
        if validates:
            with self.accelerator.autocast():
                metrics = validate(objective, self.held_out, self.builder)
            self._record(metrics, {})
        if plays:
            assert self.evaluate is not None
            try:
                with self.interruption.at_once():
                    metrics = self.evaluate(self._policy(objective), self.step)
            except KeyboardInterrupt:
                self.interruption.requested = True
            else:
                self._record(metrics, {})

    def _gradients(self, step: int, number: int) -> dict[str, Tensor]:
        """Add the gradients of part `number` of a step, divided by `accumulation`; return its mean losses."""
        share = 1 / self.config.accumulation
        if self.parallel is None:
            (batch,) = self._batches(step, number)
            with self.accelerator.autocast():
                losses = self.forward(batch)
            self.accelerator.backward(losses["loss"] * share)
            return {name: value.detach() for name, value in losses.items()}
        if self.given != (step, number):
            self.parallel.give(self._batches(step, number))
        return self.parallel(share, partial(self._give_after, step, number))

    def _give_after(self, step: int, number: int) -> None:
        """Send the part after part `number` of this step to the other processes."""
        step, number = (step, number + 1) if number + 1 < self.config.accumulation else (step + 1, 0)
        if step < self.config.steps:
            assert self.parallel is not None
            self.parallel.give(self._batches(step, number))
            self.given = step, number

    def _batches(self, step: int, number: int) -> Iterator[Batch]:
        """Yield this process's batches of part `number` of a step: one, or `cpu_parts` with parallel gradients.

        Random choices are made once for the whole step.
        """
        if self.chosen is None or self.chosen[0] != step:
            rows = self.batches.rows(step)
            generator = torch.Generator().manual_seed(self._seed(step))
            self.chosen = step, rows, self.builder.choose(self.batches.columns(rows), generator)
        _, rows, choices = self.chosen
        mine = torch.arange(len(rows))[self.accelerator.process_index :: self.accelerator.num_processes]
        part = mine.chunk(self.config.accumulation)[number]
        for piece in part.chunk(1 if self.parallel is None else self.config.cpu_parts):
            yield self.builder.build(self.batches.gather(rows[piece]), choices.part(piece))

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _stop_requested(self) -> bool:
        """Return True if any process was asked to stop; several processes compare only every `AVERAGED_STEPS` steps."""
        requested = self.interruption.requested
        if self.accelerator.num_processes == 1:
            return requested
        if self.step % AVERAGED_STEPS:
            return False
        flag = torch.tensor(float(requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _stop(self) -> None:
        self.save()
        self.accelerator.print(f"stopped at step {self.step}; the same command continues from there")
        raise KeyboardInterrupt

    def _learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return self.config.learning_rate * warmup_cosine(self.step, self.config.warmup_steps, self.config.steps)

    def _record(self, metrics: dict[str, float], volatile: dict[str, float]) -> None:
        """Write `metrics` to metrics.jsonl, which a resumed run reproduces exactly, and all metrics to the logger."""
        if self.accelerator.is_main_process:
            self.metrics.append(self.step, metrics)
            self.log({**metrics, **volatile}, self.step)

    def _checkpoints(self) -> list[Path]:
        found = (self.output / "checkpoints").glob("step_*")
        return sorted(path for path in found if re.fullmatch(r"step_\d+", path.name))

    def _resume(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        checkpoints = self._checkpoints()
        if checkpoints:
            self._load(checkpoints[-1])
            self.accelerator.print(f"resuming {checkpoints[-1]}")
        if self.accelerator.is_main_process:
            self.metrics.cut(self.step)

    def _load(self, folder: Path) -> None:
        state = load_training_state(folder)
        again = f"choose another output, or delete {self.output} to start again"
        body = read_config(folder)
        if same_place(CogVLAConfig.from_dict(body["model"]), self.model_config) != self.model_config:
            raise ValueError(f"{folder} was trained with another policy or routing; {again}")
        if body.get("pictures", {}).get("crop_area", 1.0) != self.preprocessor.crop_area:
            raise ValueError(f"{folder} was trained with another augmentation.crop_area; {again}")
        if "identity" not in state:
            self.accelerator.print(f"{folder} is older than this check: its data and objective may be others")
        elif changed := differences(state["identity"], self.identity):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(f"{folder} was trained with another setting: {'; '.join(changed[:3])}{more}; {again}")
        try:
            self.batches.load_state_dict(state["batches"])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; {again}") from error
        settings = state.get("settings", {})
        if (optimiser := settings.get("optimiser", self.config.optimiser)) != self.config.optimiser:
            raise ValueError(
                f"{folder} has the moments of training.optimiser={optimiser}, not {self.config.optimiser}; {again}"
            )
        try:
            self.weights.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{folder} {error}; {again}") from error
        self.window.load_state_dict(state["window"])
        self.step = state["step"]
        self._check_finished(folder, settings, again)

    def _check_finished(self, folder: Path, settings: Mapping[str, Any], again: str) -> None:
        """Raise a ValueError if there is nothing left to train, and this is not the run that was asked for."""
        if self.step > self.config.steps:
            raise ValueError(f"{folder} has {self.step} steps, more than training.steps={self.config.steps}; {again}")
        if self.step == self.config.steps:
            changed = [name for name, value in settings.items() if value != getattr(self.config, name)]
            said = ", ".join(f"training.{name}={settings[name]}, not {getattr(self.config, name)}" for name in changed)
            if changed:
                raise ValueError(f"{folder} is the end of a run with {said}; {again}")
