"""Load frozen checkpoints that training uses: a teacher, or a policy without vision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cogvla.policy.checkpoint import EVERY, load_policy
from cogvla.policy.hub.download import hub_source
from cogvla.policy.inputs.normalise import Normaliser
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.weights.base import is_own
from cogvla.routing.router import RouterConfig

TOLERANCE = 1e-3
"""Largest allowed difference of the normalisations, as a share of each range.

Two recordings of the same expert differ by less.
"""


def check_frozen(folder: str, key: str) -> None:
    """Check that there is a checkpoint of `train_policy`, here or perhaps on the hub; ValueError if not."""
    if hub_source(folder) is None and not is_own(folder):
        raise ValueError(f"objective.{key}={folder} is no checkpoint folder of train_policy, such as RUN/policy")


def load_frozen(folder: str, key: str, preprocessor: Preprocessor, instructions: Sequence[str]) -> CogVLA:
    """Load the network of a checkpoint without its token router, frozen, in evaluation mode.

    Args:
        folder: checkpoint folder.
        key: field of `ObjectiveConfig` that names the folder, for messages.
        preprocessor: preprocessor of the training, whose output will be the network's input.
        instructions: distinct instructions of the training data.

    Raises:
        ValueError: there is no checkpoint of `train_policy`, or its robot, image size, words or statistics differ from
            those of this training.
    """
    check_frozen(folder, key)
    policy = load_policy(folder, router=RouterConfig(), statistics=EVERY)
    theirs, ours = policy.preprocessor.cpu(), preprocessor
    differ: list[str] = []
    sizes = [(e.cameras, e.state_dim, e.action_dim, e.chunk) for e in (theirs.embodiment, ours.embodiment)]
    if sizes[0] != sizes[1]:
        differ.append("another robot or image size")
    elif theirs.sets != ours.sets or not all(map(_alike, theirs.normalisers(), ours.normalisers())):
        differ.append("data with other statistics of state or action")
    encoders = {getattr(p.tokenizer, "fingerprint", None) for p in (theirs, ours)}
    words = [p.tokenizer.encode(list(instructions)) for p in (theirs, ours)]
    if len(encoders) > 1:
        differ.append("another text encoder")
    elif not all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(*words, strict=True)):
        differ.append("other words")
    if differ:
        raise ValueError(
            f"objective.{key}={folder} was trained with {' and '.join(differ)}: train it on the data of this run "
            f"({Path(folder).name} must have the same robot, instructions and statistics)"
        )
    return policy.model.requires_grad_(False)


def _alike(first: Normaliser, second: Normaliser) -> bool:
    allowed_D = TOLERANCE * second.scale_D.cpu().abs() + 1e-6
    pairs = ((first.shift_D, second.shift_D), (first.scale_D, second.scale_D))
    return all(bool(((x_D - y_D.cpu()).abs() <= allowed_D).all()) for x_D, y_D in pairs)
