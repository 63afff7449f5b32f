"""What the processes of tests/test_processes.py run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from cogvla.processes import send


def count(connection: Connection) -> None:
    """Add up what is received; the number 0 is fatal."""
    total = connection.recv()
    while True:
        number = connection.recv()
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        total += number
        send(connection, (total, os.environ["OMP_NUM_THREADS"], os.getsid(0) == os.getpid()))


@contextmanager
def dividing(dividend: float) -> Iterator[Callable[[float], float]]:
    """Answer quotients."""
    if dividend < 0:
        raise OSError("no negative dividend")
    yield lambda divisor: dividend / divisor


@contextmanager
def dying(folder: Path) -> Iterator[Callable[[int], int]]:
    """Answer each number with itself; for each file NUMBER-* or begin-* of the folder, a process dies first."""

    def die(what: str) -> None:
        for death in folder.glob(f"{what}-*"):
            try:
                death.unlink()
            except FileNotFoundError:  # another process was faster
                continue
            os.kill(os.getpid(), signal.SIGKILL)

    def answer(number: int) -> int:
        die(str(number))
        return number

    die("begin")
    yield answer
