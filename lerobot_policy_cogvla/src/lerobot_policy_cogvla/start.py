"""Start a policy from the data set that it is trained on: robot, statistics and words, and a check that they fit.

Shape legend: N frames.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.files import visible
from cogvla.policy.checkpoint import FORMAT, read_config, saved_config
from cogvla.policy.data.files.columns import numbers, parquet
from cogvla.policy.data.gripper import gripper_mistakes
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.text_encoder import with_encoder
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig as NetworkConfig
from cogvla.policy.weights.base import find_base, is_own
from cogvla.scripts.training.build import choose_tokenizer, load_start
from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig

IMAGES, STATE, ACTION = "observation.images.", "observation.state", "action"
SAME = 1e-5
"""Largest difference of statistics that are the same, relative to the range of the dimension."""


def start(config: CogVLAConfig, meta: Any) -> CogVLA:
    """Build a network for a data set, and describe it in `config.cogvla`.

    Args:
        config: configuration of the policy.
        meta: lerobot's metadata of the data set.

    Raises:
        ValueError: the data set, the embodiment or the base do not fit.
    """
    base = None if config.base is None else find_base(config.base)
    body = read_config(Path(base)) if base is not None and is_own(base) else None
    if body is not None:
        network = saved_config(body, Path(str(base)))
        robot = replace(build(Embodiment, body["embodiment"], "embodiment"), chunk=config.chunk_size)
        _check_nothing_else(config, robot)
    else:
        network = with_encoder(
            NetworkConfig.from_dict({**load("policy", config.preset), "routing": load("routing", config.routing)})
        )
        robot = _embodiment(config, meta)
    check_features(robot, meta)
    statistics = data_statistics(robot, meta)
    instructions = [str(text) for text in meta.tasks.index]
    tokenizer = choose_tokenizer(network.language, instructions, base, reworded=False)
    pictures = {} if body is None else body.get("pictures", {})
    preprocessor = Preprocessor(robot, tokenizer, dict(statistics), **pictures)
    model = CogVLA(network, robot)
    if model.text is not None:
        model.text.fit(*tokenizer.inputs(instructions))
    for said in load_start(model, base, preprocessor):
        print(f"loaded {said}")
    config.cogvla = {
        "format": FORMAT,
        "model": network.to_dict(),
        "embodiment": _plain(asdict(robot)),
        "tokenizer": tokenizer.to_dict(),
        "pictures": {"crop_area": preprocessor.crop_area, "resize_kernel": preprocessor.resize_kernel},
        "description": {
            "trained_by": f"lerobot {version('lerobot')}",
            "data_set": {"name": str(meta.repo_id), "episodes": int(meta.total_episodes)},
        },
        "statistics": {key: value.to_dict() for key, value in statistics.items()},
        "names": {key: names for key in (STATE, ACTION) if (names := _names(meta, key))},
    }
    config.action_feature_names = config.cogvla["names"].get(ACTION)
    return model


def check_data(config: CogVLAConfig, meta: Any) -> None:
    """Check that a data set fits a policy that is trained further on it.

    Raises:
        ValueError: it has other widths, another order, another frame rate, too few cameras, or other statistics.
    """
    robot = build(Embodiment, config.cogvla["embodiment"], "embodiment")
    check_features(robot, meta)
    for key, saved in (config.cogvla.get("names") or {}).items():
        names = _names(meta, key)
        if names != saved and sorted(names) == sorted(saved):  # other names may mean the same
            raise ValueError(
                f"the {key} of data set {meta.repo_id} has another order than the checkpoint: {', '.join(names)}; not "
                f"{', '.join(saved)}: record or train again with the same order"
            )
    if config.keep_statistics or meta.total_frames == 0:  # `lerobot-record` of 0.4 gives the data set that it begins
        return
    found = data_statistics(robot, meta)
    for key, theirs in found.items():
        ours = Statistics(**config.cogvla["statistics"][key])
        apart = np.abs(np.subtract([theirs.q01, theirs.q99], [ours.q01, ours.q99])).max(axis=0)
        size = np.maximum(np.subtract(ours.max, ours.min), 1e-6)
        if (apart > SAME * size).any():
            at = int(np.argmax(apart / size))
            raise ValueError(
                f"the {key} of {meta.repo_id} has other statistics than the checkpoint: dimension {at} has q01 to q99 "
                f"{theirs.q01[at]:.4g} to {theirs.q99[at]:.4g}, not {ours.q01[at]:.4g} to {ours.q99[at]:.4g}; give "
                "--policy.keep_statistics=true to keep the checkpoint's, or start with --policy.type=cogvla "
                "--policy.base=FOLDER (a checkpoint of cogvla, see convert_checkpoint), which takes the data's"
            )


def check_features(robot: Embodiment, meta: Any) -> None:
    """Check widths, frame rate and number of cameras of a data set; cameras may be renamed.

    Raises:
        ValueError: one of them does not fit.
    """
    features = meta.features
    for key, width in ((STATE, robot.state_dim), (ACTION, robot.action_dim)):
        shape = tuple(features[key]["shape"]) if key in features else None
        if shape != (width,):
            found = "has no" if shape is None else f"has shape {list(shape)} of"
            raise ValueError(f"data set {meta.repo_id} {found} {key}; the policy for {robot.name} needs [{width}]")
    if abs(meta.fps - robot.control_hz) > 1e-3:
        raise ValueError(
            f"data set {meta.repo_id} has {meta.fps:g} frames per second; the policy for {robot.name} acts "
            f"{robot.control_hz:g} times per second"
        )
    if len(meta.camera_keys) < len(robot.cameras):
        raise ValueError(
            f"data set {meta.repo_id} has the cameras {', '.join(meta.camera_keys) or '(none)'}; the policy for "
            f"{robot.name} needs {', '.join(IMAGES + name for name in robot.camera_names)}"
        )


def data_statistics(robot: Embodiment, meta: Any) -> dict[str, Statistics]:
    """Compute the statistics of all frames of a data set, of "state" and "action".

    Raises:
        ValueError: its files are not on this machine, or damaged; or gripper values are not those of the robot.
    """
    files = visible(Path(meta.root) / "data", "**/*.parquet")
    if not files:
        raise ValueError(f"{meta.root}/data has no parquet files, which the statistics need: train without streaming")
    tables = {file: parquet(file, [STATE, ACTION]) for file in files}
    values = {
        key: np.concatenate([numbers(table[key], f"{file}, column {key}") for file, table in tables.items()])
        for key in (STATE, ACTION)
    }
    for key, rows in values.items():
        if not np.isfinite(rows).all():
            frame, number = np.argwhere(~np.isfinite(rows))[0]
            raise ValueError(f"data set {meta.repo_id}: {key} is NaN or infinite in frame {frame}, dimension {number}")
    if mistakes := gripper_mistakes(torch.from_numpy(values[ACTION].astype(np.float32)), None, robot):
        raise ValueError(f"data set {meta.repo_id}: {'; '.join(mistakes)}")
    return {"state": Statistics.of(values[STATE]), "action": Statistics.of(values[ACTION])}


def _check_nothing_else(config: CogVLAConfig, robot: Embodiment) -> None:
    """Check that no option says what the base says itself; ValueError if one does."""
    wrong = [
        name for name in ("preset", "routing", "image_size") if getattr(config, name) != getattr(CogVLAConfig, name)
    ]
    if config.embodiment is not None and load("embodiment", config.embodiment)["name"] != robot.name:
        wrong.append("embodiment")
    if wrong:
        raise ValueError(
            f"--policy.base={config.base} is a checkpoint for {robot.name}, whose network and pictures stay: leave out "
            f"{', '.join(f'--policy.{name}' for name in wrong)}"
        )


def _embodiment(config: CogVLAConfig, meta: Any) -> Embodiment:
    if config.embodiment is not None:
        values = load("embodiment", config.embodiment)
        return build(Embodiment, values | {"chunk": config.chunk_size}, "embodiment")
    config.validate_features()
    size = config.image_size
    names = [key.removeprefix(IMAGES) for key in config.image_features]
    return Embodiment(
        name=str(getattr(meta, "robot_type", None) or "robot"),
        cameras=tuple(Camera(name, size, size) for name in names),
        state_dim=int(meta.features[STATE]["shape"][0]),
        action_dim=int(meta.features[ACTION]["shape"][0]),
        chunk=config.chunk_size,
        control_hz=float(meta.fps),
    )


def _names(meta: Any, key: str) -> list[str]:
    """Return the names of a feature's numbers, which data sets save as a list or, in older ones, in a dictionary."""
    found = meta.features[key].get("names") or []
    return [str(name) for part in found.values() for name in part] if isinstance(found, dict) else list(map(str, found))


def _plain(value: Any) -> Any:
    """Return tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
