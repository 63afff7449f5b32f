"""`record_demonstrations`: record a suite's scripted expert as a LeRobotDataset."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from cogvla.envs.recording.demonstration import ExpertFailedError
from cogvla.envs.recording.recorder import record
from cogvla.envs.suite import get_suite
from cogvla.scripts.command import import_modules, mistakes_in_one_line, plain


@hydra.main(version_base="1.3", config_path="pkg://cogvla.configs", config_name="record_demonstrations")
def main(config: DictConfig) -> None:
    """Record `config.episodes` demonstrations; see configs/record_demonstrations.yaml."""
    with mistakes_in_one_line(ExpertFailedError):
        import_modules(config.imports)
        folder = record(
            get_suite(config.suite, plain(config)),
            config.episodes,
            config.output,
            image_size=config.image_size,
            workers=config.workers,
            noise=config.noise,
            seed=config.seed,
            resume=config.resume,
            video=config.video,
            grow=config.grow,
        )
    print(f"{config.episodes} episodes of {config.suite} in {folder}")


if __name__ == "__main__":
    main()
