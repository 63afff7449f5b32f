"""A stopwatch for parts of a forward pass, without the overhead of a profiler."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """Add up the wall time of blocks: `with stopwatch: ...`. It waits for the GPU at both ends.

    Attributes:
        seconds: sum so far; set it to 0 to start again.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        _finish()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _finish()
        self.seconds += time.perf_counter() - self._started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
