"""Wait for something that other threads or processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Return once the condition holds; fail if it does not in time, which is long enough for a busy machine."""
    last = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < last, "it did not happen in time"
        time.sleep(0.005)
