"""`record_demonstrations`: record a suite's scripted expert, or its corrections of a policy, as a LeRobotDataset.

    record_demonstrations
    record_demonstrations suite=tabletop_goal episodes=500 workers=4
    record_demonstrations episodes=2000 grow=true       (adds to a finished recording)
    record_demonstrations suite=tabletop_spatial tasks=[7,9] seed=1     (more of what a policy does not yet know)
    record_demonstrations randomise=[camera,light,background]
    record_demonstrations suite=libero_object counterfactual=0.5    (half of the episodes show another possible task)
    record_demonstrations policy=CHECKPOINT             (corrections: the policy acts, the expert says what to do)

The same command resumes a stopped recording.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.recording.correction_pool import Corrected, check_advice, check_robot, check_steps
from cogvla.envs.recording.dataset_folder import START_ANEW
from cogvla.envs.recording.recorder import RECORDING_FILE, check_recording, record
from cogvla.envs.suite import Suite, get_suite
from cogvla.files import read_object
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.interface import Embodiment
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain, usual
from cogvla.scripts.policies import LEROBOT, open_any_policy


def main(config: DictConfig) -> None:
    """Record `config.episodes` demonstrations; see configs/record_demonstrations.yaml."""
    import_modules(config.imports)
    suite = get_suite(config.suite, plain(config))
    names = ("image_size", "workers", "noise", "seed", "randomise", "counterfactual", "tasks")
    given = {name: plain(config)[name] for name in names}
    check_recording(suite, config.episodes, **given)
    if config.checkpoint is None:
        _check_unused(plain(config))
    else:  # before it is loaded
        check_steps(config.patience, config.execute_steps)
        check_advice(suite)
    corrected = None if config.checkpoint is None else _corrected(config, suite)
    how = {"resume": config.resume, "video": config.video, "grow": config.grow}
    folder = record(suite, config.episodes, config.output, **given, **how, corrected=corrected)
    print(f"{config.episodes} episodes of {config.suite} in {folder}")
    if corrected is not None:
        made = read_object(folder / RECORDING_FILE, START_ANEW)
        print(
            f"the policy solved {made['solved_alone']} of them alone; the expert executed "
            f"{made['intervention_share']:.0%} of the steps"
        )


def _check_unused(values: dict[str, Any]) -> None:
    """Check that no key is given that only a policy's recording has; ValueError names one."""
    before = usual("record_demonstrations")
    for key in ("patience", "execute_steps", "cameras", "statistics"):
        if values[key] != before[key]:
            raise ValueError(
                f"{key}={values[key]} changes nothing without a policy: give policy=CHECKPOINT, or leave it out"
            )


def _corrected(config: DictConfig, suite: Suite) -> Corrected:
    """Open the policy that `config.checkpoint` names, if its robot fits the recording."""
    source = str(config.checkpoint)
    if not source.startswith(LEROBOT):
        source = str(find_checkpoint(source))
    check_robot(_robot(source, plain(config)), suite, config.image_size, config.execute_steps)
    policy, identity = open_any_policy(
        source,
        embodiment=plain(config.embodiment),
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        workers=config.workers,
        engine=plain(config.engine),
        statistics=config.statistics,
        cameras=plain(config.cameras or {}),
    )
    chosen = {} if config.statistics is None else {"statistics": str(config.statistics)}
    return Corrected(policy, identity | chosen, config.patience, config.execute_steps)


def _robot(source: str, values: dict[str, Any]) -> Embodiment:
    """Return the robot of a policy, whose weights are not loaded for it."""
    if source.startswith(LEROBOT):
        from cogvla.policy.lerobot.loading import lerobot_robot

        embodiment = build(Embodiment, values["embodiment"], "embodiment")
        return lerobot_robot(source.removeprefix(LEROBOT), embodiment, values["cameras"])
    from cogvla.policy.checkpoint import read_config

    return build(Embodiment, read_config(Path(source)).get("embodiment"), f"embodiment of {source}")


if __name__ == "__main__":
    console.record_demonstrations()
