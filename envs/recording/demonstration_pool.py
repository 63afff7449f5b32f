"""Record the missing episodes of a data set in worker processes, or in this process.

A worker starts with `python -c`, so that it imports the environment but not the parent's main module with torch. It
builds its environment, sends `_Ready`, and then answers each number of an episode with `_Recorded`. It ends when the
other end of the pipe closes, even if the recorder was killed.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from cogvla.envs.recording.demonstration import Demonstrator, DemonstratorSettings, ExpertFailedError


@dataclass(frozen=True)
class _Ready:
    """The worker has built its environment."""


@dataclass(frozen=True)
class _Recorded:
    """An episode was saved to its file."""

    slot: int
    attempts: int


@dataclass(frozen=True)
class _Failed:
    """The worker failed and ends; `error` is None if only its text is sent."""

    error: Exception | None
    text: str


class DemonstrationPool:
    """Records the missing episodes in order, in `workers` processes; in this process if `workers` is 0."""

    def __init__(self, settings: DemonstratorSettings, paths: list[Path], missing: list[int], workers: int) -> None:
        self.pending = set(missing)
        self.attempts = self.successes = 0
        self._queue = list(reversed(missing))
        self._arguments = (settings, [str(path) for path in paths])
        self._count = workers
        self._demonstrator: Demonstrator | None = None
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> DemonstrationPool:
        try:
            payload = pickle.dumps(self._arguments)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the suite's `make` or the expert cannot be sent to another process ({error}): "
                "make it a function or class of a module"
            ) from error
        for _ in range(self._count):
            ours, theirs = Pipe()
            single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            command = f"from cogvla.envs.recording.demonstration_pool import serve; serve({theirs.fileno()})"
            self._processes[ours] = subprocess.Popen(
                [sys.executable, "-P", "-c", command],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C goes to the parent only, which then ends its workers
            )
            theirs.close()
            ours.send_bytes(payload)
        return self

    def ready(self) -> bool:
        """Return True if `next` would return without waiting."""
        return bool(wait(list(self._processes), timeout=0))

    def next(self) -> None:
        """Wait until one more episode is saved."""
        if self._count:
            self._receive()
            return
        settings, paths = self._arguments
        if self._demonstrator is None:
            with _not_of_the_output():
                self._demonstrator = Demonstrator(settings)
        slot = self._queue.pop()
        self._count_in(slot, _play(self._demonstrator, slot, paths[slot]))

    def _count_in(self, slot: int, attempts: int) -> None:
        self.attempts += attempts
        self.successes += 1
        self.pending.remove(slot)

    def _receive(self) -> None:
        while True:
            for connection in wait(list(self._processes)):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    code = self._processes[connection].wait()
                    raise RuntimeError(
                        f"a worker died (exit code {code}; -9 means not enough memory: use fewer workers); "
                        "the same command goes on where it stopped"
                    ) from None
                match message:
                    case _Failed(error, text):
                        if isinstance(error, OSError | ExpertFailedError):
                            raise error
                        raise RuntimeError(f"a worker failed:\n{text}") from error
                    case _Ready():
                        self._hand_out(connection)
                    case _Recorded(slot, attempts):
                        self._count_in(slot, attempts)
                        self._hand_out(connection)
                        return

    def _hand_out(self, connection: Connection) -> None:
        if not self._queue:
            self._close(connection)
            return
        try:
            connection.send(self._queue.pop())
        except (BrokenPipeError, ConnectionResetError):
            return  # the process died; the next receive reports it

    def _close(self, connection: Connection) -> None:
        process = self._processes.pop(connection)
        connection.close()
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()  # unfinished episodes are of no use
        for connection in list(self._processes):
            self._close(connection)
        if self._demonstrator is not None:
            self._demonstrator.close()


def _play(demonstrator: Demonstrator, slot: int, path: str) -> int:
    """Record and save an episode; return the number of attempts."""
    with _not_of_the_output():
        episode, attempts = demonstrator.record(slot)
    episode.save(Path(path))
    return attempts


@contextmanager
def _not_of_the_output() -> Iterator[None]:
    """Turn an OSError of the environment into a RuntimeError; the recorder reports an OSError as a full disk."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"the environment failed: {error}") from error


def serve(descriptor: int) -> None:
    """Run the main loop of a worker, until the other end of the pipe closes."""
    connection = Connection(descriptor)
    try:
        settings, paths = pickle.loads(connection.recv_bytes())
        with _not_of_the_output():
            demonstrator = Demonstrator(settings)
        connection.send(_Ready())
        while True:
            slot = connection.recv()
            connection.send(_Recorded(slot, _play(demonstrator, slot, paths[slot])))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the recorder has ended, or has no more work
    except Exception as error:  # the recorder raises it again
        connection.send(
            _Failed(error if isinstance(error, OSError | ExpertFailedError) else None, traceback.format_exc())
        )
