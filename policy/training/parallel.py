"""Data parallelism on CPUs.

The operations of a small model are too short to be worth splitting over cores, so each core computes a part of the
batch by itself. Threads of one interpreter would wait for its lock between operations, processes do not. They get the
weights and give their gradients through shared memory. Gradients are summed in a fixed order, so that results do not
depend on timing.

    this process:    weights --> memory   | the last part   | builds the next parts | sum of gradients, step
    other processes:                      | a part          --> memory              | read their next part
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import IO, Any

import torch
from torch import Tensor, nn

from cogvla.processes import Child, ProcessDiedError, send

START = None  # a message to another process; all others are parts of a batch
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT, LARGEST = 1 << 30, 32 << 20  # bytes; glibc takes no larger threshold


def keep_freed_memory() -> None:
    """Have this process keep what it frees for what it needs next.

    Otherwise the kernel takes back large activations after each operation, and clears thousands of pages for the next
    one, in every step of a training. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)


class ParallelGradients:
    """Gradients of the mean loss over the parts of a batch, one process for each part; this one takes the last.

    The others start with the first batch, with the weights and the mode (training or not) that the module has then,
    and take trained weights anew from this process in each call. `close` ends them, and so does the end of this
    process. If one fails, all are ended; `give` starts them anew.

    Args:
        objective: batch -> losses by name, `loss` among them; must be picklable, and its classes importable. What is
            trained of it must not change.
        parts: how many processes.
        compiled: use torch.compile.
    """

    def __init__(self, objective: nn.Module, parts: int, compiled: bool = False) -> None:
        self.objective, self.parts, self.compiled = objective, parts, compiled
        self.forward: Any = torch.compile(objective) if compiled else objective
        self.parameters = _trained(objective)
        self.others: list[_Other] = []
        self.own: Any = None
        torch.set_num_threads(1)

    def give(self, parts: Iterable[Any]) -> None:
        """Set the work of the next call; it replaces the earlier one.

        Args:
            parts: as many as processes, of one size; each is sent on before the next one is asked for.

        Raises:
            RuntimeError: a process is gone.
        """
        left = iter(parts)
        with self._closing_on_failure():
            while len(self.others) < self.parts - 1:
                self.others.append(_Other(self.objective, self.compiled))
            for other in self.others:
                other.child.send(next(left))
            self.own = next(left)

    def __call__(self, scale: float = 1.0, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """Add `scale` times the gradients to `.grad` and return the mean losses, detached and not scaled.

        Args:
            scale: of the gradients.
            meanwhile: is called when this process has computed its part, to `give` the next ones: the others read
                them while this process makes its step.

        Raises:
            RuntimeError: a process failed, or nothing was given.
        """
        if self.own is None:
            raise RuntimeError("give the parts first")
        part, self.own = self.own, None
        with self._closing_on_failure():
            for other in self.others:
                other.start(self.parameters)
            own = _losses_and_gradients(self.forward, self.parameters, part)
            meanwhile()
            results = [own, *(other.receive() for other in self.others)]
        self._add([gradients for _, gradients in results], scale / self.parts)
        return {name: torch.stack([losses[name] for losses, _ in results]).mean() for name in own[0]}

    def close(self) -> None:
        """End the other processes."""
        for other in self.others:
            other.close()
        self.others, self.own = [], None

    def _add(self, parts: list[list[Tensor | None]], share: float) -> None:
        """Add `share` times their sum to `.grad`, where there is any."""
        for parameter, *gradients in zip(self.parameters, *parts, strict=True):
            given = [gradient for gradient in gradients if gradient is not None]
            if given:
                total = given[0] * share
                for gradient in given[1:]:
                    total.add_(gradient, alpha=share)
                parameter.grad = total if parameter.grad is None else parameter.grad + total

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # whoever still computes must not answer the next call
            self.close()
            raise


class _Other:
    """Another process as this one sees it."""

    def __init__(self, objective: nn.Module, compiled: bool) -> None:
        self.memory = _file_in_memory()
        self.weights, self.gradients = _views(self.memory.fileno(), _trained(objective))
        self.child = Child(serve, (objective, compiled), [self.memory.fileno()])

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Have it compute what was sent last, with these weights."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, list(parameters))
        self.child.send(START)

    def receive(self) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        try:
            answer = self.child.receive()
        except ProcessDiedError as error:
            raise RuntimeError(
                f"a process of training.cpu_parts is gone: {error}. The same command resumes, "
                "training.cpu_parts=1 does without"
            ) from None
        if isinstance(answer, str):
            raise RuntimeError(f"a process of training.cpu_parts failed:\n{answer}")
        losses, there = answer
        return losses, [gradient if given else None for gradient, given in zip(self.gradients, there, strict=True)]

    def close(self) -> None:
        self.child.close()
        self.memory.close()


def serve(connection: Connection, memory: int) -> None:
    """Run the main loop of another process, until the other end of the pipe closes."""
    torch.set_num_threads(1)
    keep_freed_memory()
    objective, compiled = connection.recv()
    parameters = _trained(objective)
    weights, memory_of_gradients = _views(memory, parameters)
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    forward = torch.compile(objective) if compiled else objective
    part = None
    while True:
        message = connection.recv()
        if message is not START:
            part = message
            continue
        try:
            losses, gradients = _losses_and_gradients(forward, parameters, part)
        except Exception:
            send(connection, traceback.format_exc())
            continue
        for given, gradient in zip(memory_of_gradients, gradients, strict=True):
            if gradient is not None:
                given.copy_(gradient)
        send(connection, (losses, [gradient is not None for gradient in gradients]))


def _file_in_memory() -> IO[bytes]:
    """Open a file without a name, not in /dev/shm: it is small in containers, and overfilling it kills a process."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("gradients"), "w+b")
    return tempfile.TemporaryFile()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _views(memory: int, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients in a file's memory, each a tensor as large as its parameter."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    starts = [0]
    for size in sizes * 2:
        starts.append(starts[-1] + -(-size // 64) * 64)
    os.truncate(memory, max(starts[-1], 1))
    buffer = mmap.mmap(memory, max(starts[-1], 1))
    views = [
        torch.frombuffer(buffer, dtype=parameter.dtype, count=parameter.numel(), offset=start).view(parameter.shape)
        for parameter, start in zip([*parameters, *parameters], starts, strict=False)
    ]
    return views[: len(sizes)], views[len(sizes) :]


def _losses_and_gradients(
    forward: Any, parameters: Sequence[Tensor], part: Any
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    losses = forward(part)
    gradients = torch.autograd.grad(losses["loss"], list(parameters), allow_unused=True)
    return {name: value.detach() for name, value in losses.items()}, list(gradients)
