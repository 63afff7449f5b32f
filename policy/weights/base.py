"""Load weights and tokenizer of a checkpoint folder as the start of training on another robot or other data."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import torch

from cogvla.policy.checkpoint import CONFIG, load_weights, read_config
from cogvla.policy.hub.connection import HubError
from cogvla.policy.hub.download import NoCheckpointError, hub_source, load_from_hub
from cogvla.policy.inputs.text_encoder import KEY, TextEncoder
from cogvla.policy.inputs.tokenizer import (
    EMPTY_TOKEN,
    PAPER_PROMPT,
    PretrainedTokenizer,
    Tokenizer,
    tokenizer_from_dict,
)
from cogvla.policy.model.cogvla import CogVLA

BACKBONES = ("decoder.llm.*", "vision.towers.*.vit.*")
"""Parts that a base must have. Others, such as head and routers, may differ and are then initialised randomly."""


def is_own(source: str | Path) -> bool:
    """Return True for a checkpoint folder of this package, False for published weights."""
    path = Path(source) / CONFIG
    return path.is_file() and '"embodiment"' in path.read_text()


def find_base(source: str) -> str:
    """Return the folder of a base; of the hub, a checkpoint of this package is downloaded, published weights are not.

    Raises:
        ValueError: see `load_from_hub`.
    """
    hub = None if Path(source).is_dir() else hub_source(source)
    if hub is None:
        return source
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


def load_own(model: CogVLA, folder: Path | str) -> list[str]:
    """Load all weights of a checkpoint folder that fit the model by name and shape, in place.

    Returns:
        Lines for the log: what was loaded and what was not.

    Raises:
        ValueError: the checkpoint is damaged, or its towers or language model do not fit the model.
    """
    read_config(Path(folder))
    wanted, source = model.state_dict(), load_weights(Path(folder))
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
    with torch.no_grad():
        for name in fits:
            wanted[name].copy_(source[name])
    said = [f"{len(fits)} of {len(wanted)} tensors from {folder}"]
    return said + ([f"nothing into {', '.join(_parts(new))}, which are initialised randomly"] if new else [])


def _parts(names: list[str]) -> list[str]:
    """Return the modules that contain these tensors."""
    return sorted({name.rpartition(".")[0] or name for name in names})
