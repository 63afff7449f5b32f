"""Read single keys of the operator: from a terminal without Enter, or from a pipe."""

from __future__ import annotations

import logging
import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

_log = logging.getLogger(__name__)


class Keyboard:
    """Context manager that calls back with every key, from its own thread.

    An exception of the callback is logged, and the next key works: it may be the emergency stop.

    Args:
        on_key: callback with one character; line ends from a pipe are left out.
        descriptor: file descriptor of the input; None for standard input.
    """

    def __init__(self, on_key: Callable[[str], None], descriptor: int | None = None) -> None:
        self._on_key = on_key
        self._input = sys.stdin.fileno() if descriptor is None else descriptor
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, name="keyboard", daemon=True)
        self._after = ExitStack()

    def __enter__(self) -> Self:
        if os.isatty(self._input):
            before = termios.tcgetattr(self._input)
            self._after.callback(termios.tcsetattr, self._input, termios.TCSADRAIN, before)
            tty.setcbreak(self._input)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._waker, b"x")
        self._thread.join()
        os.close(self._wake)
        os.close(self._waker)
        self._after.close()

    def _run(self) -> None:
        terminal = os.isatty(self._input)
        while True:
            ready, _, _ = select.select([self._input, self._wake], [], [])
            if self._wake in ready:
                return
            pressed = os.read(self._input, 64).decode(errors="replace")
            if not pressed:  # the pipe was closed
                return
            for key in pressed:
                if terminal or key not in "\r\n":
                    try:
                        self._on_key(key)
                    except Exception:
                        _log.exception("key %r has failed", key)
