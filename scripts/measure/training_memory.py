"""`training_memory`: what `train_policy` with the same arguments would take of a GPU's memory. Nothing is trained.

It takes the same arguments, and the number of GPUs:

    training_memory policy=cogvla_7b embodiment=libero training=libero finetune=lora +gpus=4
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from cogvla.policy.cost.memory import estimate_memory, report
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.training.config import TrainingConfig
from cogvla.scripts.command import import_modules, mistakes_in_one_line, plain


@hydra.main(version_base="1.3", config_path="pkg://cogvla.configs", config_name="train_policy")
def main(config: DictConfig) -> None:
    """Console entry point."""
    with mistakes_in_one_line(TypeError):
        print(run(config))


def run(config: DictConfig) -> str:
    """The table for a configuration of `train_policy`, and `gpus`, which is 1 when it is left out."""
    values = plain(config)
    import_modules(values["imports"])
    gpus = int(values.get("gpus", 1))
    training = TrainingConfig(**values["training"])
    if gpus < 1 or training.batch_size % (gpus * training.accumulation):
        raise ValueError(f"batch_size {training.batch_size} is not a multiple of {gpus} GPUs x {training.accumulation}")
    model = CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]})
    memory, said = estimate_memory(model, Embodiment(**values["embodiment"]), training, gpus)
    return report(memory, gpus, said)


if __name__ == "__main__":
    main()
