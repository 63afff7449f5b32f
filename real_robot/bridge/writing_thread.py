"""A thread that writes what the control loop hands over, so that the loop never waits for a disk or an encoder."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class WritingThread(ABC, Generic[T]):
    """Runs `_write` in a thread while the context is open, on what is put into `_waiting` meanwhile.

    What `_write` raises ends it, stands in `_failure`, and is raised where the context is left without another error.

    Args:
        name: of the thread.
        room: how many items may wait; 0: any number.
    """

    def __init__(self, name: str, room: int = 0) -> None:
        self._waiting: queue.Queue[T | None] = queue.Queue(room)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def _write(self, items: Iterator[T]) -> None:
        """Write all of them; there are no more when the context is left."""

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
        except BaseException as error:  # raised again where the context is left
            self._failure = error
            for _ in items:  # so that nobody waits for room
                pass
