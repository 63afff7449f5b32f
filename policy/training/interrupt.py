"""Delay Ctrl-C until the end of a training step, so that a checkpoint is of a complete step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Context manager in which the first Ctrl-C only sets `requested`, and the second one interrupts at once.

    It does nothing outside of the main thread, because Python delivers signals to the main thread only.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let Ctrl-C raise KeyboardInterrupt as usual within a part of the block."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; Ctrl-C again stops without saving", file=sys.stderr)
