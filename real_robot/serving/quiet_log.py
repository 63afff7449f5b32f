"""A logger for what strangers can cause: its size stays small, whatever they send.

It writes a limited number of lines per minute, then how many it left out. Each line is short and has no control
characters. A traceback is written once for each place where an exception was raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LINES, PERIOD_S, LENGTH = 30, 60.0, 500
PLACES = 20
"""Most tracebacks in the lifetime of a logger."""


class QuietLog(logging.Logger):
    """Logger with a limited number of lines per minute; its handlers are those of Python's root logger.

    Args:
        lines: most lines in a period.
        clock: clock in seconds.
    """

    def __init__(self, lines: int = LINES, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("cogvla.policy_server", logging.WARNING)
        self.parent = logging.getLogger()
        self._lines, self._clock = lines, clock
        self._began, self._written, self._left_out = clock(), 0, 0
        self._places: set[tuple[str, int]] = set()

    def handle(self, record: logging.LogRecord) -> None:
        """Write a record, or count it."""
        now = self._clock()
        if now - self._began >= PERIOD_S:
            left_out, self._began, self._written, self._left_out = self._left_out, now, 0, 0
            if left_out:
                self.warning("%d more lines were left out", left_out)
        self._written += 1
        if self._written > self._lines:
            self._left_out += 1
            return
        self._shorten(record)
        super().handle(record)

    def _shorten(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text += f": {type(error).__name__}: {error}"
            record.exc_info = record.exc_info if self._is_new(error) else None
        short = text if len(text) <= LENGTH else text[:LENGTH] + "..."
        record.msg, record.args = "".join(c if c.isprintable() else " " for c in short), ()

    def _is_new(self, error: BaseException) -> bool:
        """Return whether no traceback was written yet for the place where an exception was raised."""
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = ("", 0) if frame is None else (frame.tb_frame.f_code.co_filename, frame.tb_lineno)
        if place in self._places or len(self._places) >= PLACES:
            return False
        self._places.add(place)
        return True
