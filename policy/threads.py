"""Set the number of torch's CPU threads."""

from __future__ import annotations

import os

import torch

_lowered: tuple[int, int] | None = None
"""Number of threads without processes beside, and the one that they left; None: the number is as given."""


def use_threads(wanted: int | None, beside: int = 0) -> None:
    """Set the number of torch's CPU threads.

    Args:
        wanted: number of threads; None: torch's choice, whatever an earlier part of the work had, minus the cores that
            other processes keep busy. A thread that waits for a core delays all other threads of an operation: with two
            environments on two cores, rollouts were 1.6 times as fast with one thread as with two (docs/benchmarks.md).
        beside: number of other processes that keep one core busy each.

    Raises:
        ValueError: the number makes no sense.
    """
    if wanted is not None and (type(wanted) is not int or wanted < 1):
        raise ValueError(f"threads must be a whole number, at least 1, or null, got {wanted!r}")
    global _lowered
    now = torch.get_num_threads()
    usual = now if _lowered is None or _lowered[1] != now else _lowered[0]
    threads = wanted or usual
    if wanted is None and beside:
        threads = max(1, min(usual, len(os.sched_getaffinity(0)) - beside))
    _lowered = None if threads == wanted else (usual, threads)
    torch.set_num_threads(threads)
