"""`record_demonstrations`: record a suite's scripted expert as a LeRobotDataset.

    record_demonstrations
    record_demonstrations suite=tabletop_goal episodes=500 workers=4
    record_demonstrations episodes=2000 grow=true       (adds to a finished recording)
    record_demonstrations randomise=[camera,light,background]
    record_demonstrations suite=libero_object counterfactual=0.5    (half of the episodes show another possible task)

The same command resumes a stopped recording.
"""

from __future__ import annotations

from omegaconf import DictConfig

from cogvla.envs.recording.recorder import record
from cogvla.envs.suite import get_suite
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain


def main(config: DictConfig) -> None:
    """Record `config.episodes` demonstrations; see configs/record_demonstrations.yaml."""
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
        randomise=plain(config)["randomise"],
        counterfactual=config.counterfactual,
    )
    print(f"{config.episodes} episodes of {config.suite} in {folder}")


if __name__ == "__main__":
    console.record_demonstrations()
