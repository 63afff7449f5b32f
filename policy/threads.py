"""How many threads torch gets."""

from __future__ import annotations

import os

import torch


def use_threads(wanted: int | None, beside: int = 0) -> None:
    """Give torch its threads.

    Args:
        wanted: how many; None: torch's own choice, without the cores of the processes beside it. Threads that have to
            wait for a core hold up all others of an operation: beside two environments on two cores, rollouts were
            1.6 times as fast with one thread as with two (docs/benchmarks.md).
        beside: processes that keep a core busy each.
    """
    if wanted is None and beside:
        wanted = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) - beside))
    if wanted is not None:
        torch.set_num_threads(wanted)
