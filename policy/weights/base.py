"""Starting from a checkpoint of our own: weights by name, and its words, for another robot or other data."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import torch

from cogvla.policy.checkpoint import CONFIG, load_weights, read_config
from cogvla.policy.inputs.tokenizer import (
    EMPTY_TOKEN,
    PAPER_PROMPT,
    PretrainedTokenizer,
    Tokenizer,
    tokenizer_from_dict,
)
from cogvla.policy.model.cogvla import CogVLA

BACKBONES = ("decoder.llm.*", "vision.towers.*.vit.*")
"""Parts that a base must have. The rest may be new: another robot has another head, another routing other routers."""


def is_own(source: str | Path) -> bool:
    """Return True for a checkpoint folder of ours, False for published weights."""
    path = Path(source) / CONFIG
    return path.is_file() and '"embodiment"' in path.read_text()


def base_tokenizer(source: str) -> Tokenizer:
    """Return the tokenizer that the base was trained with.

    Raises:
        ValueError: there is none.
    """
    if is_own(source):
        return tokenizer_from_dict(read_config(Path(source))["tokenizer"], Path(source))
    try:
        return PretrainedTokenizer(source, PAPER_PROMPT, EMPTY_TOKEN)
    except (OSError, ValueError) as error:
        raise ValueError(f"base={source} is no checkpoint folder, and no published tokenizer: {error}") from error


def load_own(model: CogVLA, folder: Path | str) -> list[str]:
    """Load every weight of a checkpoint folder that the model has too, in place.

    Returns:
        What was loaded and what was not, for the log.

    Raises:
        ValueError: the checkpoint is damaged, or its towers or language model are not the model's.
    """
    read_config(Path(folder))
    wanted, source = model.state_dict(), load_weights(Path(folder))
    fits = {name for name, value in wanted.items() if name in source and source[name].shape == value.shape}
    new = [name for name in wanted if name not in fits]
    if wrong := [name for name in new if any(fnmatchcase(name, part) for part in BACKBONES)]:
        raise ValueError(
            f"{folder} has other towers or another language model than the configuration: {', '.join(wrong[:3])} "
            f"({len(wrong)} of {len(wanted)} tensors); give policy=, routing= and image size as it was trained"
        )
    with torch.no_grad():
        for name in fits:
            wanted[name].copy_(source[name])
    said = [f"{len(fits)} of {len(wanted)} tensors from {folder}"]
    return said + ([f"nothing into {', '.join(_parts(new))}, which start anew"] if new else [])


def _parts(names: list[str]) -> list[str]:
    """Return the modules that contain these tensors."""
    return sorted({name.rpartition(".")[0] or name for name in names})
