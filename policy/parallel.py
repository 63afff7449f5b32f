"""Data parallelism inside one process, for CPUs.

The operations of a small model are too short to be worth splitting over cores: two threads on one batch are 1.3 times
as fast as one, two threads on half a batch each 1.9 times. Kernels release the interpreter's lock, so that Python
threads are enough; gradients are summed in a fixed order, so that results do not depend on timing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor


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


class ParallelGradients:
    """Gradients of the mean loss over the parts of a batch, one thread for each part.

    Args:
        forward: batch -> losses by name, `loss` among them; must not change the module it belongs to.
        parameters: what is trained.
        parts: how many threads.
    """

    def __init__(
        self, forward: Callable[[Any], dict[str, Tensor]], parameters: Sequence[torch.nn.Parameter], parts: int
    ) -> None:
        self.forward, self.parameters = forward, [p for p in parameters if p.requires_grad]
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(parts, "gradients", initializer=partial(torch.set_num_threads, 1))

    def __call__(self, parts: Sequence[Any], scale: float = 1.0) -> dict[str, Tensor]:
        """Add `scale` times the gradients to `.grad` and return the mean losses, detached and not scaled."""
        results = list(self.pool.map(self._part, parts))
        share = scale / len(parts)
        for index, parameter in enumerate(self.parameters):
            total = _sum([gradient for _, gradients in results if (gradient := gradients[index]) is not None])
            if total is not None:
                parameter.grad = total * share if parameter.grad is None else parameter.grad + total * share
        names = results[0][0]
        return {name: torch.stack([losses[name] for losses, _ in results]).mean() for name in names}

    def _part(self, batch: Any) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        losses = self.forward(batch)
        gradients = torch.autograd.grad(losses["loss"], self.parameters, allow_unused=True)
        return {name: value.detach() for name, value in losses.items()}, gradients


def _sum(tensors: list[Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    return total
