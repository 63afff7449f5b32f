"""Writer thread with a queue, so that the control loop never waits for a disk or a video encoder."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class WritingThread(ABC, Generic[T]):
    """Context manager that runs `_write` in a thread, on the items that are put into `_waiting`.

    An exception of `_write` ends the writing. It is kept in `_failure`, and raised when the context is left without
    another error.

    Args:
        name: name of the thread.
        room: largest number of waiting items; 0 for no limit.
    """

    def __init__(self, name: str, room: int = 0) -> None:
        self._waiting: queue.Queue[T | None] = queue.Queue(room)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def _write(self, items: Iterator[T]) -> None:
        """Write all items; the iterator ends when the context is left."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.put(None)
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    def _run(self) -> None:
        items = iter(self._waiting.get, None)
        try:
            self._write(items)
        except BaseException as error:  # raised when the context is left
            self._failure = error
            for _ in items:  # empty the queue, so that no `put` waits for room
                pass
