"""Start Python processes of our own, and speak with each over a pipe.

    Child   one process that runs a function of a module with its end of the pipe
    Pool    several of them, which take one item after the other and answer each; or none, then this process answers

A process finds this package as this one does, leaves Ctrl-C to this one, has one thread for each of its libraries, and
ends when its pipe closes: also when this process is killed. It is started as `python -c`, because
`multiprocessing.Process` would import the main module of this process in each of them, and torch with it. This file
imports nothing of ours, so that `policy` and `envs` can use it.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS"), "1")
"""Environment variables. Mesa's software renderer (LP) would take every core in every process."""
PATIENCE_S = 3.0
"""How long a process may take to end by itself."""
HUNG_UP = (EOFError, BrokenPipeError, ConnectionResetError)
ATTEMPTS = 2
"""Number of processes that a pool tries an item with, should they die."""


class WorkersDiedError(RuntimeError):
    """Workers died several times; the message says what helps."""


class ProcessDiedError(RuntimeError):
    """A process ended before it answered; the text says how."""


class Child:
    """A process that runs `serve(connection, *descriptors)`.

    Args:
        serve: a function of a module. When the pipe closes, `connection.recv` raises EOFError in it: it need not be
            caught.
        first: sent at once; `serve` receives it first.
        descriptors: open files that the process inherits under the same numbers.

    Raises:
        ValueError: `first` cannot be pickled.
    """

    def __init__(self, serve: Callable[..., None], first: Any, descriptors: Sequence[int] = ()) -> None:
        try:
            payload = pickle.dumps(first)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"cannot be sent to another process: {error}. Make a suite's `make` or an expert a function or class "
                "of a module, or a functools.partial of one; or give workers=0"
            ) from error
        connection, theirs = Pipe()
        self.connection: Connection = connection
        numbers = [theirs.fileno(), *descriptors]
        name = serve.__name__
        code = f"from cogvla.processes import run; from {serve.__module__} import {name}; run({name}, *{numbers})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=numbers,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for this process, which then ends the others in order
        )
        theirs.close()
        self._send_bytes(payload)

    def send(self, content: Any) -> None:
        """Send and return; if the process is gone, `receive` says so."""
        self._send_bytes(pickle.dumps(content))

    def _send_bytes(self, payload: bytes) -> None:
        try:
            self.connection.send_bytes(payload)
        except HUNG_UP as error:
            logging.getLogger(__name__).debug("process %d is gone: %s", self.process.pid, error)

    def receive(self) -> Any:
        """Wait for the next answer; ProcessDiedError if the process is gone."""
        try:
            return self.connection.recv()
        except HUNG_UP:
            code = self.process.wait()
        if code >= 0:
            raise ProcessDiedError(f"it exited with code {code}")
        raise ProcessDiedError(f"{signal.Signals(-code).name} (a crash, or not enough memory)")

    def kill(self) -> None:
        """End the process now."""
        self.process.kill()

    def close(self) -> None:
        """Close the pipe, so that the process ends; kill it if it does not."""
        self.connection.close()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run(serve: Callable[..., None], descriptor: int, *descriptors: int) -> None:
    """Run `serve` in the process of a `Child`, until the other end of the pipe closes."""
    with Connection(descriptor) as connection:
        try:
            serve(connection, *descriptors)
        except HUNG_UP:
            return  # the parent is done, or gone


def send(connection: Connection, content: Any) -> None:
    """Send from a `serve`, as `Child.send` does. `Connection.send` would share the memory of tensors, not copy it."""
    connection.send_bytes(pickle.dumps(content))


@dataclass(frozen=True)
class _Ready:
    """The process has begun."""


@dataclass(frozen=True)
class _Answer:
    value: Any


@dataclass(frozen=True)
class _Failure:
    """An exception to be raised as it is, or the text of another one."""

    error: Exception | None
    text: str


class Pool:
    """Processes that take items in order and answer each; use it with `with`.

    A process that dies (simulators crash) is replaced, and its item is tried again.

    Args:
        begin: a function of a module; in each process, `with begin(settings) as answer` gives what answers an item.
        settings: for `begin`.
        items: what to answer.
        processes: how many; 0: this process answers, and begins with the first item.
        passed_on: exceptions of a process that are raised here as they are.
    """

    def __init__(
        self,
        begin: Callable[[Any], AbstractContextManager[Callable[[Any], Any]]],
        settings: Any,
        items: Iterable[Any],
        processes: int,
        passed_on: tuple[type[Exception], ...] = (),
    ) -> None:
        self._begin, self._settings, self._passed_on = begin, settings, passed_on
        self._queue = deque((item, 1) for item in items)
        self._count = min(processes, len(self._queue))
        self._here: Callable[[Any], Any] | None = None
        self._stack = ExitStack()
        self._children: dict[Connection, Child] = {}
        self._given: dict[Connection, tuple[Any, int]] = {}  # item, and which attempt this is
        self._lost = 0  # processes that died before they had an item

    def __enter__(self) -> Pool:
        for _ in range(self._count):
            self._start()
        return self

    def _start(self) -> None:
        child = Child(_serve, (self._begin, self._settings, self._passed_on))
        self._children[child.connection] = child

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.kill()  # an item that is not finished is worth nothing
            child.close()
        self._stack.close()

    def ready(self) -> bool:
        """Return True if `next` would not wait."""
        return bool(wait(list(self._children), timeout=0))

    def next(self) -> Any:
        """Wait for the next answer, in no fixed order; call it at most once per item.

        Raises:
            RuntimeError: a second process died with the same item, or before it had one; or one failed with an
                exception that is not passed on.
        """
        if not self._count:
            if self._here is None:
                self._here = self._stack.enter_context(self._begin(self._settings))
            return self._here(self._queue.popleft()[0])
        while True:
            for connection in wait(list(self._children)):
                assert isinstance(connection, Connection)
                child = self._children[connection]
                try:
                    message = child.receive()
                except ProcessDiedError as error:
                    self._replace(child, error)
                    continue
                match message:
                    case _Failure():
                        raise message.error or RuntimeError(f"a worker failed:\n{message.text}")
                    case _Ready():
                        self._hand_out(child)
                    case _Answer(value):
                        self._hand_out(child)
                        return value

    def _hand_out(self, child: Child) -> None:
        if self._queue:
            self._given[child.connection] = self._queue.popleft()
            child.send(self._given[child.connection][0])
        else:
            self._remove(child)

    def _remove(self, child: Child) -> None:
        del self._children[child.connection]
        self._given.pop(child.connection, None)
        child.close()

    def _replace(self, dead: Child, error: ProcessDiedError) -> None:
        item, attempt = self._given.get(dead.connection, (None, 0))
        self._lost += attempt == 0
        if ATTEMPTS in (attempt, self._lost):
            raise WorkersDiedError(
                f"a worker died: {error}. Use fewer workers if memory is short; the same command goes on where it "
                "stopped"
            ) from None
        logging.getLogger(__name__).warning("a worker died and is replaced: %s", error)
        self._remove(dead)
        if attempt:
            self._queue.appendleft((item, attempt + 1))
        if self._queue:
            self._start()


def _serve(connection: Connection) -> None:
    received = _attempt((), connection.recv)
    if isinstance(received, _Failure):
        send(connection, received)
        return
    begin, settings, passed_on = received.value
    with ExitStack() as stack:
        begun = _attempt(passed_on, stack.enter_context, begin(settings))
        send(connection, begun if isinstance(begun, _Failure) else _Ready())
        while isinstance(begun, _Answer):
            answer = _attempt(passed_on, begun.value, connection.recv())
            send(connection, answer)
            if isinstance(answer, _Failure):
                break


def _attempt(
    passed_on: tuple[type[Exception], ...], function: Callable[..., Any], *arguments: Any
) -> _Answer | _Failure:
    try:
        return _Answer(function(*arguments))
    except passed_on as error:
        return _Failure(error, "")
    except Exception:
        return _Failure(None, traceback.format_exc())
