"""`convert_checkpoint`: turn a checkpoint of cogvla into one of lerobot, or the other way round.

    convert_checkpoint checkpoints/tabletop_object outputs/tabletop_object_lerobot
    convert_checkpoint outputs/train/RUN/checkpoints/last/pretrained_model outputs/policy

The actions are the same. Files of a pretrained tokenizer or text encoder stay where they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature

from cogvla.files import read_object
from cogvla.policy.checkpoint import STATISTICS, load_policy, load_weights, read_config, save_checkpoint
from cogvla.policy.checkpoint_folder import CONFIG
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.interface import Embodiment
from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig
from lerobot_policy_cogvla.modeling_cogvla import PREFIX, CogVLAPolicy
from lerobot_policy_cogvla.processor_cogvla import make_cogvla_pre_post_processors, network_and_words

AGAIN = "give the folder of a checkpoint"


def to_lerobot(source: Path | str, output: Path | str, statistics: str | None = None) -> None:
    """Write a checkpoint of ours as lerobot's `pretrained_model` folder.

    Args:
        source: checkpoint folder of ours, or USER/NAME[@REVISION] on the hub.
        output: folder to write; it must not exist.
        statistics: name of the data set whose statistics to take, for a policy with those of several.

    Raises:
        ValueError: see `load_policy`; or the output exists.
    """
    source, output = find_checkpoint(source), _new(output)
    body = read_config(source)
    policy = load_policy(source, statistics=statistics)
    saved = read_object(source / STATISTICS, AGAIN)
    chosen = policy.preprocessor.chosen
    tokenizer = dict(body["tokenizer"])
    if tokenizer.get("kind") == "pretrained":
        tokenizer["source"] = policy.preprocessor.tokenizer.to_dict()["source"]
    described_here = {
        **body,
        "model": policy.model.config.to_dict(),
        "tokenizer": tokenizer,
        "statistics": saved if chosen is None else saved[chosen],
    }
    config = CogVLAConfig(
        chunk_size=policy.embodiment.chunk,
        n_action_steps=policy.embodiment.chunk,
        cogvla=described_here,
        device="cpu",
        push_to_hub=False,
        **_features(policy.embodiment),
    )
    converted = CogVLAPolicy(config)
    weights = {name: x.clone() for name, x in load_weights(source).items()}
    converted.model.load_state_dict(weights, assign=True)
    before, after = make_cogvla_pre_post_processors(config)
    for part in (converted, before, after):
        part.save_pretrained(output)


def from_lerobot(source: Path | str, output: Path | str) -> None:
    """Write lerobot's checkpoint of a `cogvla` policy as a checkpoint folder of ours.

    Args:
        source: lerobot's `pretrained_model` folder.
        output: checkpoint folder to write; it must not exist.

    Raises:
        ValueError: it is damaged, or of another policy; or the output exists.
    """
    source, output = Path(source), _new(output)
    try:
        config = PreTrainedConfig.from_pretrained(source)
    except Exception as error:  # draccus raises errors of its own
        said = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ValueError(
            f"{source / CONFIG} cannot be read ({said}): it is damaged, or another version saved it"
        ) from error
    if not isinstance(config, CogVLAConfig) or not config.cogvla:
        raise ValueError(f"{source} holds a policy of type {config.type!r}; only cogvla can be converted")
    network, preprocessor = network_and_words(config.cogvla)
    statistics = {key: Statistics(**values) for key, values in config.cogvla["statistics"].items()}
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in load_weights(source).items()}
    save_checkpoint(output, weights, network, preprocessor, dict(statistics), config.cogvla["description"])
    load_policy(output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the command line."""
    plain = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("convert_checkpoint", description=__doc__, formatter_class=plain)
    parser.add_argument("source", help="checkpoint folder of cogvla, or lerobot's pretrained_model folder")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--statistics", help="data set whose statistics to take, for a policy with those of several")
    given = parser.parse_args(arguments)
    try:
        if is_lerobot(given.source):
            from_lerobot(given.source, given.output)
        else:
            to_lerobot(given.source, given.output, given.statistics)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_checkpoint: {' '.join(str(error).split())}")
    print(f"saved to {given.output}")


def is_lerobot(folder: Path | str) -> bool:
    """Return True for a folder whose `config.json` is that of a policy of lerobot."""
    file = Path(folder) / CONFIG
    try:
        return file.is_file() and "type" in json.loads(file.read_text())
    except ValueError:
        return False


def _new(output: Path | str) -> Path:
    if Path(output).exists():
        raise ValueError(f"{output} exists already; give another folder, or remove it")
    return Path(output)


def _features(robot: Embodiment) -> dict[str, Any]:
    images = {
        f"observation.images.{camera.name}": PolicyFeature(FeatureType.VISUAL, (3, camera.height, camera.width))
        for camera in robot.cameras
    }
    return {
        "input_features": {**images, "observation.state": PolicyFeature(FeatureType.STATE, (robot.state_dim,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (robot.action_dim,))},
    }


if __name__ == "__main__":
    main()
