"""Keep schedules: the share of vision tokens that each layer of the language model keeps (LFP).

The published schedule is the shifted cosine: the keep ratio of layer l is `cos(pi * l / period) / 2 + mean`, but at
least `lo`. A layer is routed only if its ratio is at most `hi`. The other schedules are alternatives in the published
code.
"""

from __future__ import annotations

import math
import re

SCHEDULES = (
    "shiftedcos_decay_{hi}_{lo}",
    "shiftedlinear_decay",
    "shiftedlinear_decay_{hi}_{lo}",
    "interleave",
    "deep_all",
    "deep_all_wo_last",
    "none",
)
_DECAY = re.compile(r"shifted(cos|linear)_decay(?:_([0-9.]+)_([0-9.]+))?")


def keep_ratios(schedule: str, depth: int, mean: float = 0.5, period: int | None = None) -> tuple[float | None, ...]:
    """Return the keep ratio of each layer; None for a layer that is not routed.

    Args:
        schedule: one of `SCHEDULES`, e.g. `shiftedcos_decay_0.85_0.15`.
        depth: number of layers of the language model.
        mean: shift of the decays, and the constant ratio of the other schedules.
        period: number of layers over which a decay runs; None: `depth - 1`. The published code always uses 31.

    Raises:
        ValueError: unknown schedule, or a number out of range.
    """
    if depth < 1 or not 0 < mean <= 1 or (period is not None and period < 1):
        raise ValueError(
            f"a keep schedule needs depth >= 1, 0 < mean <= 1 and period >= 1, got {depth=}, {mean=}, {period=}"
        )
    if match := _DECAY.fullmatch(schedule):
        kind, hi_text, lo_text = match.groups()
        if kind == "cos" and hi_text is None:
            raise ValueError(f"schedule {schedule!r} needs its limits, e.g. shiftedcos_decay_0.85_0.15")
        hi, lo = float(hi_text or 1), float(lo_text or 0)
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"schedule {schedule!r} needs 0 <= lo <= hi <= 1")
        steps = period or max(depth - 1, 1)
        shape = _cosine if kind == "cos" else _linear
        decay = [max(shape(layer, steps) + mean, lo) for layer in range(depth)]
        return tuple(ratio if ratio <= hi else None for ratio in decay)
    routed = {
        "interleave": lambda layer: layer % 2 == 1,
        "deep_all": lambda layer: layer >= 2,
        "deep_all_wo_last": lambda layer: 2 <= layer < depth - 1,
        "none": lambda layer: False,
    }.get(schedule)
    if routed is None:
        raise ValueError(f"unknown keep schedule {schedule!r}; one of {', '.join(SCHEDULES)}")
    return tuple(mean if routed(layer) else None for layer in range(depth))


def keep_count(tokens: int, ratio: float) -> int:
    """Return the number of tokens to keep, rounded down as in the published code, but at least 1 of a positive share.

    The published code has so many tokens that its shares are never below one.
    """
    return min(tokens, max(1, math.floor(tokens * ratio))) if ratio > 0 else 0


# Same order of operations as the published code: counts are rounded down, so the last bit matters.
def _cosine(layer: int, steps: int) -> float:
    return math.cos(layer * math.pi / steps) / 2


def _linear(layer: int, steps: int) -> float:
    return -layer / steps + 0.5
