"""Where players run: in this process, or each in a process of its own.

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
"""Environment variables of a worker. Mesa's software renderer (LP) would take every core in every process."""


class Worker(Protocol):
    """Whatever plays: takes one request at a time and answers it."""

    @property
    def connection(self) -> Connection | None:
        """Becomes readable when the answer is there; None: it is there as soon as `send` returns."""
        ...

    def send(self, request: Request) -> None:
        """Hand the request over."""
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
        """Carry the request out at once; `receive` gives the answer."""
        self._reply = self._player.handle(request)

    def receive(self) -> Reply:
        """The answer to the last request."""
        return self._reply

    def kill(self) -> None:
        """Nothing to end: it has always answered."""

    def close(self) -> None:
        """Free the environment."""
        self._player.close()


class ProcessWorker:
    """A player in a process of its own, which ends when this object is closed or this process dies."""

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
            start_new_session=True,  # Ctrl-C is for the parent, which then closes its workers in order
        )
        theirs.close()
        self._send_bytes(payload)

    def send(self, request: Request) -> None:
        """Hand the request over and return."""
        self._send_bytes(pickle.dumps(request))

    def _send_bytes(self, payload: bytes) -> None:
        try:
            self.connection.send_bytes(payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            logging.getLogger(__name__).debug("worker %d is gone: %s", self.process.pid, error)  # `receive` reports it

    def receive(self) -> Reply:
        """Wait for the answer to the last request; `Failed` with `died` when the process is gone."""
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
        """End the process; it frees its environment when the pipe closes."""
        self.connection.close()
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(descriptor: int) -> None:
    """Main loop of an environment's process, until the other end of the pipe closes."""
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
        return  # the parent is done, or gone
    finally:
        player.close()
