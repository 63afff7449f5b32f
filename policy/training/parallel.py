"""Data parallelism on CPUs.

The operations of a small model are too short to be split over cores, so each core computes a part of the batch. This
uses processes, because threads would wait for the interpreter's lock between operations. Weights and gradients are in
shared memory. Gradients are summed in a fixed order, so that results do not depend on timing.

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

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT, LARGEST = 1 << 30, 32 << 20  # bytes; glibc takes no larger threshold


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in this process instead of returning it to the kernel.

    Otherwise the kernel takes large activations back after each operation, and clears thousands of pages for the next
    one. With another C library this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)


class ParallelGradients:
    """Computes the gradients of the mean loss with one process per part of the batch; this process takes the last part.

    The other processes start at the first `give`, with the module's weights and mode (training or evaluation) at that
    time; until `close` each process has one thread, this one too. Each call sends them the trained weights again. They
    end with `close`, or when this process ends. If one fails, all are ended; the next `give` starts them again.

    Args:
        objective: module that computes losses by name, `loss` among them, from a batch. It must be picklable, and the
            set of its trained parameters must not change.
        parts: number of processes, with this one.
        compiled: use torch.compile.
    """

    def __init__(self, objective: nn.Module, parts: int, compiled: bool = False) -> None:
        self.objective, self.parts, self.compiled = objective, parts, compiled
        self.forward: Any = torch.compile(objective) if compiled else objective
        self.parameters = _trained(objective)
        self.others: list[_Other] = []
        self.own: Any = None
        self.threads: int | None = None  # of this process before the first `give`; None: it has them

    def give(self, parts: Iterable[Any]) -> None:
        """Set the batch of the next call.

        Args:
            parts: one part of the batch per process, all of one size. Each is sent before the iterator builds the next.

        Raises:
            RuntimeError: a process has ended.
        """
        left = iter(parts)
        with self._closing_on_failure():
            if self.threads is None:
                self.threads = torch.get_num_threads()
                torch.set_num_threads(1)
            while len(self.others) < self.parts - 1:
                self.others.append(_Other(self.objective, self.compiled))
            for other in self.others:
                other.child.send(next(left))
            self.own = next(left)

    def __call__(self, scale: float = 1.0, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """Add the gradients to `.grad`; return the mean losses, detached and not scaled.

        Args:
            scale: factor of the gradients.
            meanwhile: function that is called after this process has computed its part. It can `give` the next batch,
                which the other processes then read during the optimiser's step.

        Raises:
            RuntimeError: a process failed, or `give` was not called before.
        """
        if self.own is None:
            raise RuntimeError("give the parts first")
        part, self.own = self.own, None
        with self._closing_on_failure():
            for other in self.others:
                # drawn here, where the seed depends on the step: a new process repeats what an older one did
                other.start(self.parameters, int(torch.randint(2**62, ())))
            own = _losses_and_gradients(self.forward, self.parameters, part)
            meanwhile()
            results = [own, *(other.receive() for other in self.others)]
        self._add([gradients for _, gradients in results], scale / self.parts)
        return {name: torch.stack([losses[name] for losses, _ in results]).mean() for name in own[0]}

    def close(self) -> None:
        """End the other processes; this one has as many threads again as before."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
            self.threads = None
        for other in self.others:
            other.close()
        self.others, self.own = [], None

    def _add(self, parts: list[list[Tensor | None]], share: float) -> None:
        """Add `share` times the sum of the gradients to `.grad`."""
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
        except BaseException:  # a process that still computes must not answer the next call
            self.close()
            raise


class _Other:
    """Handle of another process, with its shared memory."""

    def __init__(self, objective: nn.Module, compiled: bool) -> None:
        self.memory = _file_in_memory()
        self.weights, self.gradients = _views(self.memory.fileno(), _trained(objective))
        self.child = Child(serve, (objective, compiled), [self.memory.fileno()])

    def start(self, parameters: Sequence[Tensor], seed: int) -> None:
        """Start the computation of the part that was sent last, with these weights and this seed."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, list(parameters))
        self.child.send(seed)

    def receive(self) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        try:
            answer = self.child.receive()
        except ProcessDiedError as error:
            raise RuntimeError(
                f"a process of training.cpu_parts is gone: {error}. The same command resumes training, "
                "training.cpu_parts=1 uses a single process"
            ) from None
        if isinstance(answer, str):
            raise RuntimeError(f"a process of training.cpu_parts failed:\n{answer}")
        losses, there = answer
        return losses, [gradient if given else None for gradient, given in zip(self.gradients, there, strict=True)]

    def close(self) -> None:
        self.child.close()
        self.memory.close()


def serve(connection: Connection, memory: int) -> None:
    """Run the main loop of another process, until the other end of the pipe is closed."""
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
        if not isinstance(message, int):  # a seed starts the computation; all other messages are parts of a batch
            part = message
            continue
        torch.manual_seed(message)
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
    """Open a file without a name, in memory if possible; not in /dev/shm, which is often too small in containers."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("gradients"), "w+b")
    return tempfile.TemporaryFile()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _views(memory: int, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and gradients as tensors in a file's memory, each with the shape of its parameter."""
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
