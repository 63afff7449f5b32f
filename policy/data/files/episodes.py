"""The choice of a part of a data set's episodes, `data.episodes`."""

from __future__ import annotations

import re

import numpy as np

EpisodeChoice = tuple[int, ...] | str | float | None
"""Numbers of episodes; a range `FIRST:END` of numbers without the end; a share, 0.1 or `10%`; None: all."""

HOW = "give a list such as [0,3,5], a range such as 0:50, or a share such as 0.1 or 10%"


def check_choice(wanted: EpisodeChoice) -> None:
    """Check a choice before a data set is opened.

    Raises:
        ValueError: it is none of list, range and share.
    """
    if wanted is None or _share(wanted) is not None:
        return
    if isinstance(wanted, str) and _range(wanted) is not None:
        return
    if isinstance(wanted, tuple) and wanted and all(type(number) is int and number >= 0 for number in wanted):
        if len(set(wanted)) == len(wanted):
            return
        raise ValueError(f"data.episodes names an episode twice: {list(wanted)}")
    raise ValueError(f"data.episodes: cannot understand {wanted!r}; {HOW}")


def choose(there: np.ndarray, wanted: EpisodeChoice) -> np.ndarray:
    """Return the chosen episodes among those of a data set, in ascending order.

    A share takes that part of a random order that is always the same, so that a smaller share is part of a larger one,
    and tasks that take turns are all in it.

    Args:
        there: numbers of the data set's episodes, int64, ascending.
        wanted: see `EpisodeChoice`.

    Raises:
        ValueError: the data set does not have these episodes, or see `check_choice`.
    """
    check_choice(wanted)
    if wanted is None:
        return there
    share = _share(wanted)
    if share is not None:
        order = np.random.default_rng(0).permutation(len(there))
        return np.sort(there[order[: max(1, round(share * len(there)))]])
    if isinstance(wanted, str):
        first, end = _range(wanted) or (None, None)
        first, end = there[0] if first is None else first, there[-1] + 1 if end is None else end
        chosen, missing = there[(there >= first) & (there < end)], end > there[-1] + 1
    else:
        assert isinstance(wanted, tuple)
        chosen = np.sort(np.array(wanted, np.int64))
        missing = not np.isin(chosen, there).all()
    if missing or not len(chosen):
        said = wanted if isinstance(wanted, str) else list(wanted)
        raise ValueError(
            f"data.episodes={said} is not in the data set, which has {len(there)} episodes, {there[0]} to {there[-1]}"
        )
    return chosen


def _share(wanted: EpisodeChoice) -> float | None:
    if isinstance(wanted, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", wanted.strip())):
        wanted = float(match[1]) / 100
    return wanted if isinstance(wanted, float) and 0 < wanted <= 1 else None


def _range(text: str) -> tuple[int | None, int | None] | None:
    match = re.fullmatch(r"(\d*):(\d*)", text.strip())
    if match is None:
        return None
    first, end = (int(part) if part else None for part in match.groups())
    return None if first is not None and end is not None and first >= end else (first, end)
