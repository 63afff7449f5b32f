"""`training_memory`: estimate the GPU memory of `train_policy` without training.

It takes the arguments of `train_policy`, and the number of GPUs:

    training_memory policy=cogvla_7b embodiment=libero training=libero finetune=lora +gpus=4
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cogvla.configs.build import build, check_kind
from cogvla.policy.checkpoint import read_config, saved_config
from cogvla.policy.cost.memory import estimate_memory, report
from cogvla.policy.inputs.text_encoder import with_encoder_width
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.training.auxiliary.frozen_policy import check_frozen
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.policy.weights.base import is_own
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain
from cogvla.scripts.policies import named_router


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    print(run(config))


def run(config: DictConfig) -> str:
    """Return the memory table for a configuration of `train_policy` with an optional key `gpus` (default 1)."""
    values = plain(config)
    import_modules(values["imports"])
    gpus = values.get("gpus", 1)
    check_kind(int, gpus, "gpus")
    training = build(TrainingConfig, values["training"], "training")
    if gpus < 1 or training.batch_size % (gpus * training.accumulation):
        raise ValueError(f"batch_size {training.batch_size} is not a multiple of {gpus} GPUs x {training.accumulation}")
    model = with_encoder_width(CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]}))
    named_router(values["routing"]["router"], "routing.router")
    objective = build(ObjectiveConfig, values["objective"], "objective")
    memory, said = estimate_memory(
        model,
        build(Embodiment, values["embodiment"], "embodiment"),
        training,
        gpus,
        _beside(objective.teacher, "teacher", model) if objective.distillation else None,
        _beside(objective.blind, "blind", model) if objective.prior else None,
    )
    return report(memory, gpus, said)


def _beside(folder: str | None, key: str, model: CogVLAConfig) -> CogVLAConfig:
    """Return the configuration of a frozen checkpoint; one that is not here is taken to be as large as the policy."""
    assert folder is not None, "ObjectiveConfig demands it"
    check_frozen(folder, key)
    return saved_config(read_config(Path(folder)), Path(folder)) if is_own(folder) else model


if __name__ == "__main__":
    console.training_memory()
