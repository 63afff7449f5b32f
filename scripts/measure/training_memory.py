"""`training_memory`: estimate the GPU memory of `train_policy` without training.

It takes the arguments of `train_policy`, and the number of GPUs:

    training_memory policy=cogvla_7b embodiment=libero training=libero finetune=lora +gpus=4
"""

from __future__ import annotations

from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.policy.cost.memory import estimate_memory, report
from cogvla.policy.inputs.text_encoder import with_encoder_width
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.training.config import TrainingConfig
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    print(run(config))


def run(config: DictConfig) -> str:
    """Return the memory table for a configuration of `train_policy` with an optional key `gpus` (default 1)."""
    values = plain(config)
    import_modules(values["imports"])
    gpus = int(values.get("gpus", 1))
    training = build(TrainingConfig, values["training"], "training")
    if gpus < 1 or training.batch_size % (gpus * training.accumulation):
        raise ValueError(f"batch_size {training.batch_size} is not a multiple of {gpus} GPUs x {training.accumulation}")
    model = with_encoder_width(CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]}))
    memory, said = estimate_memory(model, build(Embodiment, values["embodiment"], "embodiment"), training, gpus)
    return report(memory, gpus, said)


if __name__ == "__main__":
    console.training_memory()
