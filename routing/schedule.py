"""How many vision tokens each layer of the language model keeps (LFP).

The published schedule is the shifted cosine: the keep ratio of layer l is `cos(pi * l / period) / 2 + mean`, floored at
`lo`; a layer is routed only where the ratio is at most `hi`. All other schedules are the reference's alternatives.
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
    """Keep ratio per layer; None where the layer is not routed.

    Args:
        schedule: one of `SCHEDULES`, e.g. `shiftedcos_decay_0.85_0.15`.
        depth: layers of the language model.
        mean: shift of the decays, and the constant ratio of the other schedules.
        period: layers over which a decay runs; None is `depth - 1`. The published code always divides by 31.

    Raises:
        ValueError: unknown schedule, or numbers outside their range.
    """
    if depth < 1 or not 0 < mean <= 1 or (period is not None and period < 1):
        raise ValueError(f"needs depth >= 1, 0 < mean <= 1 and period >= 1, got {depth=}, {mean=}, {period=}")
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
    """Tokens kept of `tokens`: rounded down, so that few tokens at a low ratio can be none at all, as published."""
    return math.floor(tokens * ratio)


# Written as the published code rounds, since a count is rounded down from them.
def _cosine(layer: int, steps: int) -> float:
    return math.cos(layer * math.pi / steps) / 2


def _linear(layer: int, steps: int) -> float:
    return -layer / steps + 0.5
