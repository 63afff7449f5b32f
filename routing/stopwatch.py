"""How long parts of a forward pass take, without a profiler that slows them down."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the wall time of the blocks it is put around: `with stopwatch: ...`. Waits for the GPU at both ends.

    Attributes:
        seconds: so far; set it to 0 to begin again.
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
