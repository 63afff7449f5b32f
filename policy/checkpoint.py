"""Save and load checkpoints. A checkpoint is a folder with everything that a policy needs.

    config.json          model, embodiment, tokenizer, image preprocessing and provenance
    model.safetensors    weights
    statistics.json      normalisation statistics of state and action
    float8.json          calibration of 8-bit layers, if `calibrate_policy` has measured it
    forecast.json        forecast of the state while chunks are late, if training or `fit_forecast` has fitted it
    training.pt          optimiser, step and EMA; only in checkpoints to resume from
    encoder/             a copy of the text encoder, if a user put one there; it comes before the source in config.json

Saving is atomic: the folder is written under a temporary name and then renamed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from filecmp import cmp
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvla.configs.build import build
from cogvla.files import file_hash, read_object, write_atomic
from cogvla.policy.checkpoint_folder import CONFIG, STATISTICS, WEIGHTS, check_checkpoint_folder
from cogvla.policy.device import usable_device
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.engine.float8 import Calibration
from cogvla.policy.hub.download import checkpoint_name, find_checkpoint
from cogvla.policy.inputs.forecast import Forecast
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.text_encoder import open_encoder
from cogvla.policy.inputs.tokenizer import PretrainedTokenizer, Tokenizer, tokenizer_from_dict
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.empty_model import empty_model
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.threads import use_threads
from cogvla.routing.router import RouterConfig

FORMAT = 1
ROUTER_WEIGHTS = "router."
ANOTHER = "use another checkpoint"
TRAINING = "training.pt"
FLOAT8 = "float8.json"
FORECAST = "forecast.json"
ENCODER = "encoder"
EVERY = "*"
"""Name of the statistics for `load_policy`: keep those of all data sets, and choose later."""


@contextmanager
def atomic_folder(folder: Path, keep_same: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `folder` if the block ends without an error.

    Args:
        folder: what is written.
        keep_same: keep a `folder` that has all these files already, with what was added to it since.

    Raises:
        OSError: writing failed, for example because the disk is full; the message gives the free space. `folder` is
            unchanged then.
    """
    draft, previous = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file has this name")
        shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed
        draft.mkdir()
        yield draft
        files = [file for file in draft.rglob("*") if file.is_file()]
        there = [folder / file.relative_to(draft) for file in files]
        if keep_same and all(b.is_file() and cmp(a, b, shallow=False) for a, b in zip(files, there, strict=True)):
            return
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        draft.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        free = shutil.disk_usage(above).free / 1e6
        raise OSError(
            error.errno,
            f"cannot write {folder}: {error.strerror or error} ({free:.0f} MB free). What was saved before is "
            "untouched; make space, or choose another output, and run the same command again",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def save_checkpoint(
    folder: Path | str,
    weights: dict[str, Tensor],
    config: CogVLAConfig,
    preprocessor: Preprocessor,
    statistics: dict[str, Any],
    description: dict[str, Any],
    training: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder atomically.

    Args:
        folder: checkpoint folder; another checkpoint there is replaced. The same one stays, with what was added to it
            since (calibration, export, monitor).
        weights: the model's state dict for inference (EMA).
        config: configuration of the model.
        preprocessor: preprocessing of observations, with tokenizer and embodiment.
        statistics: statistics of state and action, or those of each data set by its name; also as plain values.
        description: provenance for reports (step, data set, seed, versions).
        training: state to resume from (tensors, numbers and containers of them); None: for inference only.

    Raises:
        OSError: see `atomic_folder`.
    """
    with atomic_folder(Path(folder), keep_same=True) as draft:
        body = {
            "format": FORMAT,
            "model": config.to_dict(),
            "embodiment": asdict(preprocessor.embodiment),
            "tokenizer": preprocessor.tokenizer.to_dict(),
            "pictures": {"crop_area": preprocessor.crop_area, "resize_kernel": preprocessor.resize_kernel},
            "description": description,
        }
        (draft / CONFIG).write_text(json.dumps(body, indent=2) + "\n")
        (draft / STATISTICS).write_text(json.dumps(_plain(statistics), indent=2) + "\n")
        tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        with write_errors():
            save_file(tensors, draft / WEIGHTS)
        (draft / WEIGHTS).chmod((draft / CONFIG).stat().st_mode)  # safetensors makes it unreadable for other users
        if isinstance(preprocessor.tokenizer, PretrainedTokenizer):
            preprocessor.tokenizer.save(draft)
        if training is not None:
            with write_errors():
                torch.save(training, draft / TRAINING)


def _plain(statistics: Mapping[str, Any]) -> dict[str, Any]:
    plain = {k: _plain(v) if isinstance(v, Mapping) else v for k, v in statistics.items()}
    return {k: v.to_dict() if isinstance(v, Statistics) else v for k, v in plain.items()}


@contextmanager
def write_errors() -> Iterator[None]:
    """Raise OSError if the disk is full; the libraries raise errors of their own."""
    try:
        yield
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise OSError(errno.EIO, str(error)) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint.

    Raises:
        ValueError: the folder is missing, incomplete, damaged, or of another format.
    """
    check_checkpoint_folder(folder)
    body = read_object(folder / CONFIG, ANOTHER)
    if body.get("format") != FORMAT:
        raise ValueError(f"{folder} has checkpoint format {body.get('format')!r}; this version reads {FORMAT}")
    return body


def saved_config(body: Mapping[str, Any], folder: Path) -> CogVLAConfig:
    """Return the configuration of a checkpoint's model, with the place of its text encoder, if any.

    Args:
        body: content of the checkpoint's `config.json`.
        folder: the checkpoint.

    Raises:
        ValueError: see `CogVLAConfig.from_dict`.
        KeyError: the content is incomplete.
    """
    config = CogVLAConfig.from_dict(body["model"])
    if config.language.encoder is None or not (folder / ENCODER).exists():
        return config
    return replace(config, language=replace(config.language, encoder=str(folder / ENCODER)))


class EncoderError(ValueError):
    """The text encoder of a checkpoint is missing or another one; the checkpoint itself is sound."""


def _saved_tokenizer(description: dict[str, Any], encoder: str | None, folder: Path) -> Tokenizer:
    """Return the tokenizer or text encoder of a checkpoint.

    Args:
        description: "tokenizer" of the checkpoint's `config.json`.
        encoder: source of the text encoder; None: the policy has none.
        folder: the checkpoint.

    Raises:
        EncoderError: the text encoder is missing, or another one than in training.
        ValueError: the description is damaged.
        KeyError: the description is incomplete.
    """
    if (description.get("kind") == "encoder") != (encoder is not None):
        raise ValueError(f"tokenizer is {description.get('kind')!r}, but model.language.encoder is {encoder!r}")
    if encoder is None:
        return tokenizer_from_dict(description, folder)
    try:
        found = open_encoder(encoder)
    except ValueError as error:
        raise EncoderError(
            f"{folder} needs the text encoder of its training: {error}; or copy that encoder to {folder / ENCODER}"
        ) from error
    if found.fingerprint != description["fingerprint"]:
        raise EncoderError(
            f"{encoder} is not the text encoder with which {folder} was trained: its weights or its tokenizer differ "
            f"(fingerprint {found.fingerprint}, not {description['fingerprint']}); copy that one to {folder / ENCODER}"
        )
    return found


def described(body: Mapping[str, Any], statistics: dict[str, Any], folder: Path) -> tuple[CogVLAConfig, Preprocessor]:
    """Return the configuration and the preprocessor that a checkpoint describes.

    Args:
        body: content of the checkpoint's `config.json`.
        statistics: content of its `statistics.json`.
        folder: folder with the files of its tokenizer, if it has any.

    Raises:
        EncoderError, ValueError, KeyError: see `_saved_tokenizer`.
        ValueError, TypeError, AttributeError: a value does not fit.
    """
    embodiment = build(Embodiment, body["embodiment"], "embodiment")
    config = saved_config(body, folder)
    tokenizer = _saved_tokenizer(body["tokenizer"], config.language.encoder, folder)
    # Checkpoints that are older than augmentation have no "pictures" entry: their images are not cropped.
    return config, Preprocessor(embodiment, tokenizer, statistics, **body.get("pictures", {}))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Load the weights of a checkpoint.

    Raises:
        ValueError: the file is damaged or truncated, or has NaN or infinite numbers.
    """
    try:
        weights = load_file(folder / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or truncated ({error}); use another checkpoint") from error
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} in {folder / WEIGHTS} has NaN or infinite numbers; use another checkpoint")
    return weights


def load_policy(
    folder: Path | str, device: str = "cpu", router: RouterConfig | None = None, statistics: str | None = None
) -> CogVLAPolicy:
    """Load the policy in a checkpoint folder, in the precision in which it was saved.

    Args:
        folder: checkpoint folder, or USER/NAME[@REVISION] on the hub, which is downloaded.
        device: torch device.
        router: token router to use instead of the one that the policy was trained with (if any); None: do not change
            it.
        statistics: name of the data set whose statistics are used, for a policy that has those of several; EVERY: the
            caller chooses later.

    Raises:
        ValueError: the folder is missing, incomplete or damaged, its weights do not fit its configuration, or the
            router does not fit the policy; or its text encoder is missing, or another one than in training; or it has
            statistics of several data sets, and none or an unknown one is chosen; or the device cannot be used here.
    """
    folder, device = find_checkpoint(folder), usable_device(device)
    body = read_config(folder)
    saved = read_object(folder / STATISTICS, ANOTHER)
    try:
        config, preprocessor = described(body, saved, folder)
        description = dict(body["description"])
    except EncoderError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{CONFIG} or {STATISTICS} in {folder} is damaged ({problem}); use another checkpoint"
        ) from error
    if statistics is None and preprocessor.sets:
        raise ValueError(
            f"{folder} has statistics of several data sets; choose those of the robot with statistics=NAME: "
            + ", ".join(preprocessor.sets)
        )
    if statistics is not None and statistics != EVERY:
        preprocessor = preprocessor.choosing(statistics)
    if router is not None:
        config = replace(config, routing=replace(config.routing, router=router))
        description["router"] = {"plugged_in": True, **asdict(router)}
    elif config.routing.router.name is not None:
        description["router"] = asdict(config.routing.router)
    model = empty_model(config, preprocessor.embodiment)
    try:
        # Tensors of the memory-mapped file are copied, since products differ in the last digits if memory is not
        # aligned. They are copied one by one, so that a large model is not in memory twice.
        weights = load_weights(folder)
        if router is not None:
            weights = _for_router(weights, model, router)
        model.load_state_dict({name: weights.pop(name).clone() for name in list(weights)}, assign=True)
    except RuntimeError as error:
        first, *others = [line.strip("\t. ") for line in str(error).splitlines() if line[:1] == "\t"] or [str(error)]
        more = f" and {len(others)} more differences" if others else ""
        raise ValueError(f"the weights in {folder} do not fit its {CONFIG} ({first[:200]}{more}); {ANOTHER}") from error
    description = {"checkpoint": checkpoint_name(folder), **description}
    preprocessor.forecast = _load_forecast(folder, preprocessor.embodiment)
    return CogVLAPolicy(model.to(device), preprocessor, description, calibration=_load_calibration(folder))


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Save a calibration in a checkpoint folder; it replaces an older one.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomic(folder / FLOAT8, json.dumps(asdict(calibration), indent=2) + "\n")


def save_forecast(folder: Path, forecast: Forecast) -> None:
    """Save a forecast in a checkpoint folder; it replaces an older one. OSError if the file cannot be written."""
    write_atomic(folder / FORECAST, json.dumps(forecast.to_dict()) + "\n")


def _load_forecast(folder: Path, robot: Embodiment) -> Forecast | None:
    if not (folder / FORECAST).is_file():
        return None
    try:
        body = read_object(folder / FORECAST, ANOTHER)
        return Forecast.from_dict(body, robot.chunk, robot.state_dim, robot.action_dim)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / FORECAST} is damaged: delete it, or run `fit_forecast` again ({error})") from error


def _load_calibration(folder: Path) -> Calibration | None:
    if not (folder / FLOAT8).is_file():
        return None
    try:
        body = read_object(folder / FLOAT8, ANOTHER)
        largest = {str(name): float(value) for name, value in body["largest_inputs"].items()}
        return Calibration(largest, dict(body["about"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / FLOAT8} is damaged: delete it, and run `calibrate_policy` again") from error


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the weights file, which identifies the weights."""
    return file_hash(folder / WEIGHTS)


def _for_router(weights: dict[str, Tensor], model: CogVLA, router: RouterConfig) -> dict[str, Tensor]:
    """Return the weights without those of the router that was replaced."""
    wanted = model.state_dict().keys()
    if any(name.startswith(ROUTER_WEIGHTS) and name not in weights for name in wanted):
        raise ValueError(
            f"router {router.name!r} has weights of its own, which this checkpoint does not have: train a policy with "
            f"it first, train_policy base=... routing=router routing.router.name={router.name}"
        )
    return {name: value for name, value in weights.items() if name in wanted or not name.startswith(ROUTER_WEIGHTS)}


def open_policy(
    folder: Path | str,
    device: str | None = None,
    threads: int | None = None,
    engine: EngineConfig | None = None,
    router: RouterConfig | None = None,
    beside: int = 0,
    statistics: str | None = None,
) -> tuple[CogVLAPolicy, dict[str, str]]:
    """Open a policy as commands do for `checkpoint=SOURCE`: load it, build its engine and set torch's threads.

    Args:
        folder: see `load_policy`.
        device: torch device; None: cuda if available, otherwise cpu.
        threads: torch's threads, see `use_threads`.
        engine: engine to run it; None: the default.
        router: see `load_policy`.
        beside: processes that run at the same time, see `use_threads`.
        statistics: see `load_policy`.

    Returns:
        The policy, and `{"weights_sha256": ...}`, which identifies its weights; with a forecast `forecast_sha256`, too.

    Raises:
        ValueError: see `load_policy`; or its 8-bit calibration was measured on other weights.
    """
    use_threads(threads, beside)
    folder = find_checkpoint(folder)
    policy = load_policy(folder, usable_device(device), router, statistics)
    identity = {"weights_sha256": weights_hash(folder)}
    if policy.preprocessor.forecast is not None:
        identity["forecast_sha256"] = file_hash(folder / FORECAST)
    engine = engine or EngineConfig()
    measured = None if engine.dtype != "float8" or policy.calibration is None else policy.calibration.about
    if measured is not None and measured.get("weights_sha256") != identity["weights_sha256"]:
        raise ValueError(f"{folder}/{FLOAT8} was measured on other weights: run `calibrate_policy` again")
    return policy.with_engine(engine, release=True), identity


def load_training_state(folder: Path) -> dict[str, Any]:
    """Load the `training` state that `save_checkpoint` saved.

    Raises:
        ValueError: the checkpoint is for inference only, or damaged.
    """
    if not (folder / TRAINING).is_file():
        raise ValueError(f"{folder} has no {TRAINING}: it can be evaluated, but training cannot resume from it")
    try:
        return torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise almost anything
        raise ValueError(
            f"{folder / TRAINING} is damaged or truncated ({type(error).__name__}: {error}); delete {folder} to resume "
            "from the checkpoint before it, or to start again"
        ) from error
