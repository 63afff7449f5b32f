"""The configuration of training: plain data, validated where it is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from cogvla.policy.inputs.augmentation import AugmentationConfig
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.optimisation import OPTIMISERS
from cogvla.policy.training.wordings import InstructionAugmentation

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, optimiser, precision, validation and checkpoints of a training run.

    Attributes:
        steps: number of optimiser steps.
        batch_size: samples per step, over all processes and accumulation.
        learning_rate: peak learning rate, after a linear warm-up and before a cosine decay.
        warmup_steps: number of steps of the warm-up.
        optimiser: `adamw`, or `adamw8bit` (bitsandbytes), whose state takes a quarter of the memory.
        weight_decay: weight decay of matrices; other parameters have none.
        clip_norm: maximum norm of the gradients; larger gradients are scaled down.
        accumulation: number of parts of a batch to compute in turn, to save memory.
        cpu_parts: number of parts of a batch to compute in parallel on a CPU, each in a process.
            See `policy.training.parallel`.
        ema_decay: decay of the moving average of the weights, which is evaluated; 0: use the current weights.
        precision: `float32`, `bfloat16` (autocast), or `auto` (bfloat16 if there is a GPU).
            With `bfloat16`, frozen matrices are kept in bfloat16 and all else in float32.
        compile: use torch.compile.
        gradient_checkpointing: recompute the blocks of towers and language model in the backward pass, to save memory.
        seed: random seed of the initial weights, the order of the data and all other random numbers.
        prefix_share: share of samples with committed actions, for policies that read them (`head.prefix`).
        validation_fraction: share of the episodes that is held out for validation; 0: none.
        validate_every: steps between two validations; 0: never.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: number of the newest checkpoints to keep.
        rollout_every: steps between two evaluations in simulation, which need suite and evaluation; 0: never.
        finetune: parts to train, and how, see `policy.training.adapters`.
        augmentation: image augmentation, see `policy.inputs.augmentation`.
        wordings: other wordings of the instructions, see `policy.training.wordings`.
    """

    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    optimiser: str = "adamw"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulation: int = 1
    cpu_parts: int = 2
    ema_decay: float = 0.998
    precision: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    prefix_share: float = 0.75
    validation_fraction: float = 0.03
    validate_every: int = 500
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    rollout_every: int = 0
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    wordings: InstructionAugmentation = field(default_factory=InstructionAugmentation)

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.accumulation, self.checkpoint_every, self.keep_checkpoints) < 1:
            raise ValueError(
                "steps, batch_size, accumulation, checkpoint_every and keep_checkpoints must be at least 1"
            )
        if self.cpu_parts < 1 or self.batch_size % (self.accumulation * self.cpu_parts):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation} "
                f"x cpu_parts {self.cpu_parts}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; one of {', '.join(PRECISIONS)}")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"unknown optimiser {self.optimiser!r}; one of {', '.join(OPTIMISERS)}")
        if not 0 < self.prefix_share <= 1:
            raise ValueError(f"training.prefix_share must be above 0 and at most 1, got {self.prefix_share}")
        if not (self.learning_rate > 0 and self.clip_norm > 0):
            raise ValueError("learning_rate and clip_norm must be positive")
        for name in ("ema_decay", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("seed", "warmup_steps", "weight_decay", "validate_every", "rollout_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"training.{name} must not be negative, got {getattr(self, name)}")

    def check_processes(self, processes: int) -> None:
        """Raise a ValueError if a batch cannot be shared equally among so many processes."""
        if self.batch_size % (processes * self.accumulation):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of processes x accumulation "
                f"({processes} x {self.accumulation})"
            )
