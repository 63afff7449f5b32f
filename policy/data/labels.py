"""The shapes of labels. Data sets store them flat, because lerobot's tools cannot edit features of two dimensions.

Shape legend: N frames of the data set, T tasks.
"""

from __future__ import annotations

import math

from torch import Tensor

ALTERNATIVES = "alternatives"
PROJECTION = "projection_"
SHAPES: dict[str, tuple[int, ...]] = {"target": (3,), "goal": (3,), "possible": (-1,), ALTERNATIVES: (-1, 6)}
"""Label -> shape in one frame; -1: any number."""
INDICES = ("phase", "task")
"""Labels that are one whole number from 0 up in each frame."""


def shaped(name: str, key: str, values: Tensor) -> Tensor:
    """Return a label [N,...] in its shape and type; labels that are not listed here stay as they are.

    Args:
        name: name of the label in a batch: `phase`, `task` int64 [N], `possible` [N,T], or float32: `target`, `goal`
            [N,3], `alternatives` [N,T,6] and `projection_CAMERA` [N,3,4].
        key: key of the data set, for messages.
        values: the label as stored: flat, or in its shape as in older recordings.

    Raises:
        ValueError: it has another number of values, is stored in another shape, or is no index where it must be one.
    """
    if name in INDICES:
        index_N = values.reshape(len(values), -1).double()
        if index_N.shape[1] != 1 or not ((index_N >= 0) & (index_N == index_N.floor())).all():
            raise ValueError(
                f"label {name!r} must be one whole number from 0 up in each frame, {key!r} of the data set is not: map "
                "another feature in data.labels, or leave this label out"
            )
        return index_N[:, 0].long()
    shape = (3, 4) if name.startswith(PROJECTION) else SHAPES.get(name)
    if shape is None:
        return values
    stored, size = tuple(values.shape[1:]), math.prod(values.shape[1:])
    fits = size > 0 and (size % math.prod(shape[1:]) == 0 if shape[0] == -1 else size == math.prod(shape))
    same = len(stored) == len(shape) and all(wanted in (-1, there) for wanted, there in zip(shape, stored, strict=True))
    if not fits or (len(stored) > 1 and not same):
        wanted = " x ".join("any number" if n == -1 else str(n) for n in shape)
        raise ValueError(
            f"label {name!r} must have {wanted} values in each frame, {key!r} of the data set has shape {stored}: "
            "map another feature in data.labels, or leave this label out"
        )
    values = values.reshape(len(values), *shape)
    return values if name == "possible" else values.float()
