"""Workers of a rollout: run a player in this process or in a separate process.

Processes are started as `python -c` and spoken to over a pipe instead of with `multiprocessing.Process`, which would
import the parent's main module, and torch with it, in every environment process. Images go through the pipe: with two
cameras of 128x128 that is 0.2 ms per observation, against 0.15 ms through shared memory and 8 ms to render them.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol

from cogvla.envs.rollout.player import Failed, Player, PlayerSettings, Reply, Request

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS"), "1")
"""Environment variables of a worker. Without them, Mesa's software renderer (LP) uses every core in every process."""


class Worker(Protocol):
    """Interface of a worker: it takes one request at a time and answers it."""

    @property
    def connection(self) -> Connection | None:
        """Connection that becomes readable when the reply is ready; None: the reply is ready when `send` returns."""
        ...

    def send(self, request: Request) -> None:
        """Send a request."""
        ...

    def receive(self) -> Reply:
        """Wait for the answer to the last request."""
        ...

    def kill(self) -> None:
        """End a player that does not answer."""
        ...

    def close(self) -> None:
        """End the player."""
        ...


class LocalWorker:
    """A player in this process."""

    connection: Connection | None = None

    def __init__(self, settings: PlayerSettings) -> None:
        self._player = Player(settings)
        self._reply: Reply = self._player.ready()

    def send(self, request: Request) -> None:
        """Carry out the request at once; `receive` returns the reply."""
        self._reply = self._player.handle(request)

    def receive(self) -> Reply:
        """Return the reply to the last request."""
        return self._reply

    def kill(self) -> None:
        """Do nothing: this worker has always replied."""

    def close(self) -> None:
        """Close the environment."""
        self._player.close()


class ProcessWorker:
    """A player in a separate process, which ends when this object is closed or this process dies."""

    def __init__(self, settings: PlayerSettings) -> None:
        try:
            payload = pickle.dumps(settings)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the suite's `make` cannot be sent to another process ({error}): make it a function of a module, "
                "or a functools.partial of one, or roll out with workers=0"
            ) from error
        connection, theirs = Pipe()
        self.connection: Connection = connection
        command = f"from cogvla.envs.rollout.workers import serve; serve({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", command],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C goes to the parent only, which then closes its workers in order
        )
        theirs.close()
        self._send_bytes(payload)

    def send(self, request: Request) -> None:
        """Send a request and return at once."""
        self._send_bytes(pickle.dumps(request))

    def _send_bytes(self, payload: bytes) -> None:
        try:
            self.connection.send_bytes(payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            logging.getLogger(__name__).debug("worker %d is gone: %s", self.process.pid, error)  # `receive` reports it

    def receive(self) -> Reply:
        """Wait for the reply to the last request; `Failed` with `died` if the process has died."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return Failed(f"the environment's process died: {self._cause_of_death()}", died=True)

    def _cause_of_death(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"it exited with code {code}"
        return f"{signal.Signals(-code).name} (a crash of the simulator, or not enough memory)"

    def kill(self) -> None:
        """End a process that does not answer."""
        self.process.kill()

    def close(self) -> None:
        """End the process; it closes its environment when the pipe closes."""
        self.connection.close()
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(descriptor: int) -> None:
    """Run the main loop of a worker process, until the other end of the pipe closes."""
    connection = Connection(descriptor)
    try:
        player = Player(pickle.loads(connection.recv_bytes()))
    except (ImportError, AttributeError, pickle.UnpicklingError):
        connection.send(Failed(traceback.format_exc()))
        return
    try:
        connection.send(player.ready())
        while True:
            connection.send(player.handle(pickle.loads(connection.recv_bytes())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has finished or died
    finally:
        player.close()
