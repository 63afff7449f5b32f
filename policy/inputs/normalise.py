"""Normalisation of states and actions; its statistics are saved with the weights.

For LIBERO, OpenVLA and CogVLA use `q99`: `2*(x-q01)/(q99-q01) - 1`, clipped to [-1,1]. For ALOHA they use `min_max`,
the same formula with minimum and maximum. Dimensions whose mask is False (the gripper) are not changed.

Shape legend: D state or action dimension; inputs are [...,D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cogvla.policy.interface import NORMALISATIONS, Embodiment

CONSTANT = 1e-6
"""Dimensions with a smaller range carry no information and are normalised to 0; for values above 1, relative to them,
because float32 has only seven digits."""
REST, FAR = 0.005, 0.5
"""A quantile is that of a dimension at rest, and the extreme is used instead, if the median is nearer than `REST` of
its distance to the extreme, and the extreme lies further than `FAR` of the quantiles' range outside of it."""


@dataclass(frozen=True)
class Statistics:
    """Per-dimension statistics of a data set, each a tuple of D numbers in physical units."""

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for f in fields(self):
            values = tuple(float(v) for v in getattr(self, f.name))
            object.__setattr__(self, f.name, values)
            if len(values) != len(self.q01):
                raise ValueError(f"statistic {f.name!r} has {len(values)} dimensions, q01 has {len(self.q01)}")
            if not np.isfinite(values).all():
                raise ValueError(f"statistic {f.name!r} contains NaN or infinite values; check the data set")
        size = np.maximum(np.abs(self.min), np.abs(self.max))
        for low, high, rounding in (
            *(("min", "max", 1e-6), ("q01", "q99", 1e-6)),
            *(("min", "q01", 1e-4), ("q99", "max", 1e-4), ("min", "mean", 1e-4), ("mean", "max", 1e-4)),
        ):
            above = np.subtract(getattr(self, low), getattr(self, high)) > rounding * size + 1e-9
            self._check(f"{low} is above {high}", above)
        self._check("std is negative", np.less(self.std, 0))
        # Of two values, the sample standard deviation is 0.71 of their distance; no other samples have a larger one.
        self._check(
            "std is larger than max - min", np.subtract(self.std, np.subtract(self.max, self.min)) > 1e-4 * size + 1e-9
        )

    def _check(self, wrong: str, dimensions: np.ndarray) -> None:
        if dimensions.any():
            at = int(np.argmax(dimensions))
            values = ", ".join(f"{f.name} {getattr(self, f.name)[at]:.6g}" for f in fields(self))
            raise ValueError(f"{wrong} in dimension {at} ({values}); compute the statistics again")

    @classmethod
    def of(cls, values_ND: np.ndarray) -> Statistics:
        """Compute the statistics of samples [N,D].

        Where a dimension rests in nearly all samples, q01 or q99 is the minimum or maximum: with the quantile as the
        end of the range, a policy could never leave the rest (see `rarely_used`).
        """
        x = np.asarray(values_ND, dtype=np.float64)
        q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
        rare_2D = rarely_used(x)
        low, high, mean, std = x.min(0), x.max(0), x.mean(0), x.std(0)
        q01, q99 = np.where(rare_2D[0], low, q01), np.where(rare_2D[1], high, q99)
        std = np.where(std < _negligible(mean) / 2, np.maximum(std, (high - low) / 2), std)
        return cls(*(tuple(v) for v in (q01, q99, low, high, mean, std)))

    @property
    def dim(self) -> int:
        return len(self.q01)

    def to_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in asdict(self).items()}


def rarely_used(values_ND: np.ndarray) -> np.ndarray:
    """Return bool [2,D]: whether q01, and q99, of samples [N,D] only show where the dimension rests."""
    x = np.asarray(values_ND, dtype=np.float64)
    low, q01, median, q99, high = np.quantile(x, [0, 0.01, 0.5, 0.99, 1], axis=0)
    past_2D = np.stack([q01 - low, high - q99])
    rest_2D = np.stack([median - q01, q99 - median])
    far_2D = (past_2D > FAR * (q99 - q01)) & (past_2D >= _negligible(median))
    return far_2D & (rest_2D < REST * (rest_2D + past_2D))


def _negligible(value_D: np.ndarray) -> np.ndarray:
    return CONSTANT * np.maximum(1, np.abs(value_D))


class Normaliser(nn.Module):
    """An affine map per dimension and its inverse.

    The parameters are buffers, so that they move to the policy's device.

    Args:
        kind: one of `NORMALISATIONS`.
        statistics: statistics of the data set.
        mask: False for dimensions that are not normalised; None: normalise all.

    Raises:
        ValueError: the kind is unknown, or the mask has another size than the statistics.
    """

    shift_D: Tensor
    scale_D: Tensor

    def __init__(self, kind: str, statistics: Statistics, mask: Sequence[bool] | None = None) -> None:
        super().__init__()
        if kind not in NORMALISATIONS:
            raise ValueError(f"unknown normalisation {kind!r}; one of {', '.join(NORMALISATIONS)}")
        keep = np.ones(statistics.dim, bool) if mask is None else np.asarray(mask, bool)
        if keep.shape != (statistics.dim,):
            raise ValueError(f"the mask has {keep.size} entries, the statistics {statistics.dim} dimensions")
        low, high = {
            "q99": (statistics.q01, statistics.q99),
            "min_max": (statistics.min, statistics.max),
            "mean_std": (np.subtract(statistics.mean, statistics.std), np.add(statistics.mean, statistics.std)),
            "identity": (-np.ones(statistics.dim), np.ones(statistics.dim)),
        }[kind]
        low, high = np.where(keep, low, -1.0), np.where(keep, high, 1.0)
        half_range = (high - low) / 2
        self.constant_D: Tensor
        self.register_buffer("shift_D", torch.tensor((high + low) / 2, dtype=torch.float32), persistent=False)
        self.register_buffer("scale_D", torch.tensor(half_range, dtype=torch.float32), persistent=False)
        self.register_buffer(
            "constant_D", torch.tensor(half_range < _negligible((high + low) / 2) / 2), persistent=False
        )
        bounded = keep if kind in ("q99", "min_max") else np.zeros_like(keep)
        limit = np.where(bounded, 1.0, np.inf)
        self.register_buffer("limit_D", torch.tensor(limit, dtype=torch.float32), persistent=False)
        self.limit_D: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise values [...,D] in physical units; `q99` and `min_max` are clipped to [-1,1]."""
        self._check(x)
        scale_D = torch.where(self.constant_D, torch.ones_like(self.scale_D), self.scale_D)
        y = torch.where(self.constant_D, torch.zeros_like(x), (x - self.shift_D) / scale_D)
        return torch.clamp(y, -self.limit_D, self.limit_D)

    def inverse(self, y: Tensor) -> Tensor:
        """Convert normalised values [...,D] back to physical units, without clipping."""
        self._check(y)
        return y * self.scale_D + self.shift_D

    def change_to(self, other: Normaliser) -> tuple[Tensor, Tensor]:
        """Return factor and offset [D] by which values that this one normalised become those of another one.

        Dimensions that are constant for one of them are not changed: factor 1, offset 0.
        """
        same_D = self.constant_D | other.constant_D
        scale_D = torch.where(same_D, torch.ones_like(other.scale_D), other.scale_D)
        factor_D = torch.where(same_D, torch.ones_like(scale_D), self.scale_D / scale_D)
        offset_D = torch.where(same_D, torch.zeros_like(scale_D), (self.shift_D - other.shift_D) / scale_D)
        return factor_D, offset_D

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.shift_D.shape[0]:
            raise ValueError(f"expected {self.shift_D.shape[0]} dimensions, got {x.shape[-1]}")


def of_each(statistics: Mapping[str, Any]) -> dict[str | None, Any]:
    """Return the statistics of each data set by its name; of one set of statistics, by None."""
    kinds = [statistics.get(key) for key in ("state", "action")]
    whole = any(isinstance(kind, Statistics) or (isinstance(kind, Mapping) and "q01" in kind) for kind in kinds)
    return {None: statistics} if whole or not statistics else cast(dict[str | None, Any], dict(statistics))


def normalisers(embodiment: Embodiment, statistics: dict[str, Any]) -> tuple[Normaliser, Normaliser]:
    """Build the normalisers of state and action.

    Args:
        embodiment: sizes and kinds of normalisation.
        statistics: `{"state": Statistics|dict, "action": Statistics|dict}`.

    Raises:
        ValueError: the statistics are missing, or have another size than the embodiment.
    """
    parsed = {k: v if isinstance(v, Statistics) else Statistics(**v) for k, v in statistics.items()}
    for key, dim in (("state", embodiment.state_dim), ("action", embodiment.action_dim)):
        if key not in parsed or parsed[key].dim != dim:
            found = parsed[key].dim if key in parsed else "none"
            raise ValueError(f"statistics of {key!r} must have the embodiment's {dim} dimensions; found {found}")
    return (
        Normaliser(embodiment.state_normalisation, parsed["state"]),
        Normaliser(embodiment.action_normalisation, parsed["action"], embodiment.action_normalise_mask),
    )
