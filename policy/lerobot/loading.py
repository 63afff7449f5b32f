"""Load a policy of lerobot from a folder or the hub; every mistake ends in one line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cogvla.files import file_hash, read_object, visible
from cogvla.policy.device import usable_device
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.lerobot.pipelines import PROCESSORS, check_registered, check_statistics, saved_steps
from cogvla.policy.lerobot.policy import IMAGES, STATE, LeRobotPolicy, Parts

PREFIX = "lerobot:"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LAST = Path("checkpoints", "last", "pretrained_model")
REPLACED = {"pretrained_backbone_weights": None, "load_vlm_weights": False}
"""Fields of configurations that download weights which the checkpoint's replace -> the value that does not."""
EXECUTED = ("n_action_steps", "action_chunk_size")
"""Fields that say how many actions are executed until the policy looks again; the second one is VQ-BeT's."""
HUB = re.compile(r"huggingface\.co|offline mode|gated repo", re.IGNORECASE)
"""End of the errors about files of the hub that cannot be had."""
MIGRATE = "python -m lerobot.processor.migrate_policy_normalization"


def open_lerobot_policy(
    source: str,
    embodiment: Embodiment,
    device: str | None = None,
    cameras: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[LeRobotPolicy, dict[str, str]]:
    """Open a policy of lerobot.

    Args:
        source: lerobot's `pretrained_model` folder, or an id of the hub.
        embodiment: the robot: its name, control rate and grippers, which lerobot's checkpoints do not say.
        device: torch device; None: cuda if available, otherwise cpu.
        cameras: camera of the robot -> camera of the policy, where their names differ.
        seed: see `LeRobotPolicy`.

    Returns:
        The policy, and what identifies it: hashes of its weights, processors and configuration, and
        `cameras` if they are given.

    Raises:
        ValueError: there is no such policy, it cannot be loaded or run, or it does not fit the robot.
    """
    device = usable_device(device)
    folder = _folder(source)
    config, found, robot = _described(folder, embodiment, device, cameras)
    policy, before, after = _loaded(config, folder, device)
    about = {"lerobot": version("lerobot"), "checkpoint": str(source)}
    parts = Parts(policy, before, after, {camera.name: key for camera, key in found.items()}, about)
    try:
        sees = {"cameras": str(sorted(cameras.items()))} if cameras else {}
        return LeRobotPolicy(parts, robot, seed), _identity(folder) | sees
    except Exception as error:  # whatever a policy of others raises
        raise ValueError(f"the policy in {folder} cannot act on its own inputs: {_said(error)}") from error


def lerobot_robot(source: str, embodiment: Embodiment, cameras: Mapping[str, str] | None = None) -> Embodiment:
    """Return the robot of a policy of lerobot without loading its weights; see `open_lerobot_policy`."""
    return _described(_folder(source), embodiment, "cpu", cameras)[2]


def _described(
    folder: Path, embodiment: Embodiment, device: str, cameras: Mapping[str, str] | None
) -> tuple[Any, dict[Camera, str], Embodiment]:
    """Return a policy's configuration, its cameras with their keys, and its robot."""
    body = read_object(folder / CONFIG, "give another checkpoint")
    _check_folder(folder, body)
    config = _configuration(folder, body, device)
    _check_runnable(config, folder)
    found = _features(config, embodiment, dict(cameras or {}), folder)
    return config, found, replace(embodiment, cameras=tuple(found), chunk=_executed(config))


def _folder(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / CONFIG).is_file() and (folder / LAST / CONFIG).is_file():
            raise ValueError(f"{source} is the folder of a training: give checkpoint={PREFIX}{folder / LAST}")
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{source} has no {CONFIG}: give lerobot's folder `pretrained_model`")
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"no checkpoint folder at {source}; give lerobot's folder `pretrained_model`, or an id of the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's errors are of many kinds
        raise ValueError(f"no folder at {source}, and it cannot be downloaded from the hub: {_said(error)}") from error


def _check_folder(folder: Path, body: Mapping[str, Any]) -> None:
    if "embodiment" in body and "type" not in body:
        raise ValueError(f"{folder} is a checkpoint of this package: give checkpoint={folder} without {PREFIX}")
    if "type" not in body:
        raise ValueError(f"{folder / CONFIG} does not say a type of policy: it is no checkpoint of lerobot")
    missing = [name for name in PROCESSORS if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}: it was saved half, or by lerobot before 0.4; such "
            f"a one is converted with `{MIGRATE} --pretrained-path {folder}`"
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: the checkpoint is incomplete, or of an adapter alone")


def _configuration(folder: Path, body: Mapping[str, Any], device: str) -> Any:
    """Return lerobot's configuration of a policy.

    Raises:
        ValueError: lerobot is not installed, does not know the policy, or cannot read its configuration.
    """
    try:
        import lerobot.policies.factory  # noqa: F401  registers lerobot's own policies
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise ValueError(f"policies of lerobot need the package lerobot: {_said(error)}") from error
    register_third_party_plugins()
    kind, known = str(body["type"]), sorted(PreTrainedConfig.get_known_choices())
    if kind not in known:
        raise ValueError(
            f"{folder} holds a policy of type {kind!r}, which lerobot {version('lerobot')} does not know: install the "
            f"package that adds it (by its convention lerobot_policy_{kind}), or another version of lerobot; known are "
            f"{', '.join(known)}"
        )
    try:
        config = PreTrainedConfig.from_pretrained(folder)
    except Exception as error:  # draccus raises errors of its own
        raise ValueError(
            f"lerobot {version('lerobot')} cannot read {folder / CONFIG} ({_said(error)}): another version saved it; "
            "use that one"
        ) from error
    config.device = device
    for name, none in REPLACED.items():
        if getattr(config, name, none) != none:
            setattr(config, name, none)
    return config


def _executed(config: Any) -> int:
    """Return how many actions the policy executes until it looks again; 1 if its configuration does not say it."""
    return int(next((getattr(config, name) for name in EXECUTED if hasattr(config, name)), 1))


def _check_runnable(config: Any, folder: Path) -> None:
    """Raise ValueError for a policy that keeps more from call to call than its next actions."""
    if (steps := getattr(config, "n_obs_steps", 1)) > 1:
        raise ValueError(
            f"the {config.type} policy in {folder} reads {steps} observations (n_obs_steps), but each call here has "
            "one: train it with --policy.n_obs_steps=1"
        )
    if (decay := getattr(config, "temporal_ensemble_coeff", None)) is not None:
        raise ValueError(
            f"the {config.type} policy in {folder} averages chunks itself (temporal_ensemble_coeff={decay}): in its "
            f"{CONFIG} set that to null and n_action_steps to its chunk_size, and give "
            f"protocol.temporal_ensemble={decay}"
        )
    others = [
        key
        for key in config.input_features or {}
        if key != STATE and not key.startswith(IMAGES) and not key.startswith("observation.language")
    ]
    if others:
        raise ValueError(
            f"the {config.type} policy in {folder} reads {', '.join(others)}, which robots here do not give: train "
            f"it on {STATE} and cameras"
        )


def _features(config: Any, robot: Embodiment, cameras: Mapping[str, str], folder: Path) -> dict[Camera, str]:
    """Return the cameras with their keys in the policy, after a check of all widths.

    Raises:
        ValueError: the policy does not fit the robot.
    """
    inputs, outputs = config.input_features or {}, config.output_features or {}
    for key, features, width in ((STATE, inputs, robot.state_dim), ("action", outputs, robot.action_dim)):
        shape = tuple(features[key].shape) if key in features else None
        if shape is None and key == STATE:
            continue
        if shape != (width,):
            raise ValueError(
                f"the {config.type} policy in {folder} has {key} {list(shape or ())}, embodiment {robot.name!r} has "
                f"[{width}]: choose another embodiment="
            )
    keys = [key for key in inputs if key.startswith(IMAGES) and "empty_camera" not in key]
    theirs = {key.removeprefix(IMAGES): key for key in keys}
    if unknown := [name for name in cameras.values() if name not in theirs]:
        raise ValueError(
            f"cameras names {', '.join(unknown)}, but the {config.type} policy in {folder} has {', '.join(theirs)}"
        )
    ours = {name: mine for mine, name in cameras.items()}
    if len(ours) != len(cameras):
        raise ValueError(f"cameras names one camera of the policy twice: {dict(cameras)}")
    found = {}
    for name, key in theirs.items():
        _, height, width = inputs[key].shape
        found[Camera(ours.get(name, name), int(height), int(width))] = key
    if not found:
        raise ValueError(f"the {config.type} policy in {folder} has no camera; policies here have at least one")
    return found


def _loaded(config: Any, folder: Path, device: str) -> tuple[Any, Any, Any]:
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    steps = saved_steps(folder)
    try:
        policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
        named = any(step.get("registry_name") == "device_processor" for step in steps[PROCESSORS[0]])
        overrides = {"device_processor": {"device": device}} if named else {}
        before, after = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=overrides)
        _check_weights(policy, folder)
        check_statistics(config, before, after)
    except (ImportError, PackageNotFoundError) as error:
        check_registered(steps, folder)
        raise ValueError(
            f"the {config.type} policy in {folder} needs a package that is not installed: {_said(error)}; lerobot "
            f"names it as an extra, `uv pip install 'lerobot[{config.type}]'`"
        ) from error
    except Exception as error:  # a damaged or foreign file makes lerobot raise almost anything
        if HUB.search(str(error)):
            raise ValueError(
                f"the {config.type} policy in {folder} needs files of the hub that are not on this machine, such as "
                "a tokenizer: load it once with a network (and a login, if they are gated), or name a folder with "
                f"them in {CONFIG} and {PROCESSORS[0]} ({_said(error)})"
            ) from error
        raise ValueError(
            f"lerobot {version('lerobot')} cannot load the {config.type} policy in {folder}: {_said(error)}; the files "
            "are damaged, or another version saved them"
        ) from error
    return policy.eval(), before, after


def _check_weights(policy: Any, folder: Path) -> None:
    """Raise ValueError unless all weights of a policy are the saved ones: some of lerobot's print that they are not."""
    there = policy.state_dict()
    with safe_open(folder / WEIGHTS, "pt") as saved:
        names = list(saved.keys())
        found = {name: key for name in names for key in (name, f"model.{name}") if key in there}

        def loaded(name: str, key: str) -> bool:
            return torch.equal(saved.get_tensor(name).to(there[key].dtype), there[key].cpu())

        wrong = [name for name, key in found.items() if not loaded(name, key)]
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in names}
        by_name = set(found.values())
        for key, parameter in policy.named_parameters():
            # Tied and renamed weights are there by another name.
            if key not in by_name and not any(
                shape == tuple(parameter.shape) and loaded(name, key) for name, shape in shapes.items()
            ):
                wrong.append(key)
    if wrong or not found:
        at = f" ({', '.join(wrong[:3])})" if wrong else ""
        raise ValueError(f"lerobot has not loaded the weights in {WEIGHTS}{at}")


def _identity(folder: Path) -> dict[str, str]:
    """Return what identifies weights, processors and configuration."""
    whole = hashlib.sha256()
    for file in sorted(visible(folder, "policy_*")):
        whole.update(file.read_bytes())
    return {
        "weights_sha256": file_hash(folder / WEIGHTS),
        "processors_sha256": whole.hexdigest(),
        "config_sha256": file_hash(folder / CONFIG),
    }


def _said(error: BaseException) -> str:
    """Return an error of lerobot in one line."""
    text = " ".join(str(error).split())
    if error.__cause__ is not None:  # draccus says the reason there
        text = f"{text} {' '.join(str(error.__cause__).split())}"
    return f"{type(error).__name__}: {text[:300]}" + ("..." if len(text) > 300 else "")
