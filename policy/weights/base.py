"""Load weights and tokenizer of a checkpoint folder as the start of training on another robot or other data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cogvla.configs.build import build
from cogvla.files import read_object
from cogvla.policy.checkpoint import ANOTHER, CONFIG, STATISTICS, load_weights, read_config
from cogvla.policy.hub.connection import HubError
from cogvla.policy.hub.download import NoCheckpointError, hub_source, load_from_hub
from cogvla.policy.inputs.normalise import normalisers, of_each
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.text_encoder import KEY, TextEncoder
from cogvla.policy.inputs.tokenizer import (
    EMPTY_TOKEN,
    PAPER_PROMPT,
    PretrainedTokenizer,
    Tokenizer,
    tokenizer_from_dict,
)
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig, LanguageConfig
from cogvla.policy.model.heads.regression import L1Head

BACKBONES = ("decoder.llm.*", "vision.towers.*.vit.*")
"""Parts that a base must have. Others, such as head and routers, may differ and are then initialised randomly."""

LANGUAGE = ("heads", "rms_norm_eps", "rope_theta")
"""Settings of the language model that the shapes of its weights do not show, beside `kv_heads`."""


def is_own(source: str | Path) -> bool:
    """Return True for a checkpoint folder of this package, False for published weights."""
    path = Path(source) / CONFIG
    return path.is_file() and '"embodiment"' in path.read_text()


def find_base(source: str) -> str:
    """Return the folder of a base; of the hub, a checkpoint of this package is downloaded, published weights are not.

    Raises:
        ValueError: there is no such folder, and it is no name of the hub; or see `load_from_hub`.
    """
    if Path(source).is_dir():
        return source
    if (hub := hub_source(source)) is None:
        raise ValueError(f"base={source} is neither a folder nor USER/NAME of the hub; give the folder of a checkpoint")
    try:
        return str(load_from_hub(*hub))
    except (HubError, NoCheckpointError):
        if hub[1] is not None:
            raise
        return source  # published weights, which may be in the cache


def base_tokenizer(source: str) -> Tokenizer:
    """Return the tokenizer that the base was trained with.

    Raises:
        ValueError: the base has no tokenizer, or cannot be found; or it was trained with a text encoder.
    """
    if is_own(source):
        check_base_encoder(source, None)
        return tokenizer_from_dict(read_config(Path(source))["tokenizer"], Path(source))
    try:
        return PretrainedTokenizer(source, PAPER_PROMPT, EMPTY_TOKEN)
    except (OSError, ValueError) as error:
        raise ValueError(f"base={source} has no tokenizer: it is no checkpoint folder, and {error}") from error


def check_base_encoder(source: str, encoder: TextEncoder | None) -> None:
    """Check that a checkpoint of this package fits the text encoder of the training; None: none.

    A base with a vocabulary fits every encoder: its projection is then new.

    Raises:
        ValueError: the base was trained with another text encoder.
    """
    body = read_config(Path(source))
    theirs = body["tokenizer"].get("fingerprint")
    if theirs is not None and (encoder is None or encoder.fingerprint != theirs):
        ours = "without one" if encoder is None else f"with {encoder.source}, whose weights or words differ"
        raise ValueError(
            f"base={source} was trained with a text encoder, this training is {ours}: give "
            f"{KEY}={body['model']['language']['encoder']}, or its new place"
        )


def load_own(model: CogVLA, folder: Path | str, preprocessor: Preprocessor | None = None) -> list[str]:
    """Load all weights of a checkpoint folder that fit the model by name and shape, in place; no head of another kind.

    Args:
        model: the network to train.
        folder: the checkpoint.
        preprocessor: that of the training, to whose statistics the weights are changed; None: they are not changed.

    Returns:
        Lines for the log: what was loaded, what starts anew, and what has no place in the model.

    Raises:
        ValueError: the checkpoint is damaged, or its towers or language model do not fit the model.
    """
    body = read_config(Path(folder))
    wanted, stored = model.state_dict(), load_weights(Path(folder))
    try:
        config = CogVLAConfig.from_dict(body["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{CONFIG} in {folder} is damaged ({error!r}); {ANOTHER}") from error
    same_head = config.head.kind == model.config.head.kind  # heads of diffusion and flow have the same names and shapes
    source = {name: value for name, value in stored.items() if same_head or not name.startswith("head.")}
    fits = {name for name, value in wanted.items() if name in source and source[name].shape == value.shape}
    new = [name for name in wanted if name not in fits]
    if wrong := [name for name in new if any(fnmatchcase(name, part) for part in BACKBONES)]:
        raise ValueError(
            f"{folder} has other towers or another language model than the configuration: {', '.join(wrong[:3])} "
            f"({len(wrong)} of {len(wanted)} tensors); set policy=, routing= and image size as in its training"
        )
    deeper = [name for name in source if name not in wanted and any(fnmatchcase(name, part) for part in BACKBONES)]
    if deeper:
        raise ValueError(
            f"{folder} has {', '.join(deeper[:3])} ({len(deeper)} tensors), for which the configuration has no place; "
            "set policy=, routing= and image size as in its training"
        )
    _check_settings(config, model.config, folder)
    with torch.no_grad():
        for name in fits:
            wanted[name].copy_(source[name])
    said = [f"{len(fits)} of {len(wanted)} tensors from {folder}"]
    if preprocessor is not None:
        said += _change_units(model, fits, Path(folder), body["embodiment"], preprocessor)
    if new:
        said.append(f"nothing into {', '.join(_parts(new))}, which are initialised randomly")
    if unused := sorted(stored.keys() - wanted.keys()):
        said.append(f"left out: {', '.join(_parts(unused))} of {folder}, for which the model has no place")
    return said


def _check_settings(base: CogVLAConfig, ours: CogVLAConfig, folder: Path | str) -> None:
    """Check what shapes do not show: with other heads, positions or ids the weights fit, and compute something else.

    Raises:
        ValueError: towers or language model of the base differ in it.
    """
    check_language(base.language, ours.language, folder)
    tokens = ("bos_token", "stop_token")
    pairs = [(f"language.{name}", getattr(base.language, name), getattr(ours.language, name)) for name in tokens]
    for tower in ("dinov2", "siglip"):
        theirs, mine = getattr(base.vision, tower), getattr(ours.vision, tower)
        pairs += [(f"vision.{tower}.{name}", getattr(theirs, name), getattr(mine, name)) for name in ("mean", "std")]
        if None not in (theirs.heads, mine.heads):  # timm's towers say it themselves
            pairs.append((f"vision.{tower}.heads", theirs.heads, mine.heads))
    _check_equal(pairs, folder)


def check_language(base: LanguageConfig, ours: LanguageConfig, folder: Path | str) -> None:
    """Check what the shapes of a language model's weights do not show.

    Raises:
        ValueError: the language model of the base differs in it.
    """
    pairs = [(f"language.{name}", getattr(base, name), getattr(ours, name)) for name in LANGUAGE]
    _check_equal([*pairs, ("language.kv_heads", base.kv_heads or base.heads, ours.kv_heads or ours.heads)], folder)


def _check_equal(pairs: Sequence[tuple[str, object, object]], folder: Path | str) -> None:
    for name, there, here in pairs:
        near = isinstance(there, float) and isinstance(here, float) and math.isclose(there, here, rel_tol=1e-5)
        if there != here and not near:  # GGUF has float32
            raise ValueError(f"{folder} was trained with {name} {there}, not {here}: set policy.{name}={there}")


@torch.no_grad()
def _change_units(
    model: CogVLA, loaded: set[str], folder: Path, robot: dict[str, Any], preprocessor: Preprocessor
) -> list[str]:
    """Change the layers that read states and actions, and those of an L1 head that write actions, in place.

    So they compute the base's actions, in physical units, although states and actions are now normalised by other
    statistics. Other heads cannot be changed exactly and stay. Nothing changes for another robot, whose numbers mean
    something else, nor with statistics of several data sets.

    Returns:
        A line for the log, if something was changed.
    """
    statistics = read_object(folder / STATISTICS, ANOTHER)
    if robot.get("name") != preprocessor.embodiment.name or preprocessor.sets or None not in of_each(statistics):
        return []
    try:
        base_state, base_action = normalisers(build(Embodiment, robot, "embodiment"), statistics)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG} or {STATISTICS} in {folder} is damaged ({error}); {ANOTHER}") from error
    state, action = preprocessor.state_normaliser, preprocessor.action_normaliser
    if "state.0.weight" in loaded:
        factor_S, offset_S = state.change_to(base_state)
        reads = cast(nn.Linear, model.state[0])
        reads.bias.add_(reads.weight @ offset_S)
        reads.weight.mul_(factor_S)
    if model.committed is not None and "committed.matrix" in loaded:
        factor_A, offset_A = action.change_to(base_action)
        matrix_XD = model.committed.matrix
        matrix_XD[-1].add_(offset_A @ matrix_XD[:-1])
        matrix_XD[:-1].mul_(factor_A[:, None])
    if isinstance(model.head, L1Head) and f"head.net.{len(model.head.net) - 1}.weight" in loaded:
        factor_A, offset_A = base_action.change_to(action)
        writes = cast(nn.Linear, model.head.net[-1])
        writes.weight.mul_(factor_A[:, None])
        writes.bias.mul_(factor_A).add_(offset_A)
    return ["the layers for states and actions, changed to the statistics of these data"]


def _parts(names: list[str]) -> list[str]:
    """Return the modules that contain these tensors."""
    return sorted({name.rpartition(".")[0] or name for name in names})
