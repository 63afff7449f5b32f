"""Policy servers for tests: in a thread, or in a process that can be killed; and a network that can stall."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from cogvla.policy.interface import ActionChunk, Camera, Embodiment, InstructionError, Observation
from cogvla.real_robot.serving.batching import BatchSettings
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.real_robot.serving.server import PolicyServer, ServerSettings
from cogvla.tests.support.waiting import until

ROBOT = Embodiment(
    name="toy_arm",
    cameras=(Camera("agentview", 8, 8), Camera("wrist", 8, 8)),
    state_dim=4,
    action_dim=3,
    chunk=5,
    control_hz=20,
    gripper_index=2,
)
LIBERO_KEYS = RequestKeys(
    state="observation/state", images={"agentview": "observation/image", "wrist": "observation/wrist_image"}
)


class SumPolicy:
    """Actions that depend on every input, in float32 without rounding; instructions can ask for trouble."""

    def __init__(self, embodiment: Embodiment = ROBOT, sleep_s: float = 0.0, reads_committed: bool = False) -> None:
        self.embodiment = embodiment
        self.reads_committed = reads_committed
        self.sleep_s = sleep_s
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def describe(self) -> dict[str, Any]:
        return {"preset": "sum", "parameters": 0}

    def reset(self) -> None:
        """Nothing to forget."""

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        self.act(self.embodiment.fake_observation(batch))

    def act(self, observation: Observation) -> ActionChunk:
        self.batches.append(observation.batch_size)
        self.go.wait()
        time.sleep(self.sleep_s)
        observation.validate(self.embodiment)
        if any(not any(c.isprintable() for c in text) for text in observation.instruction):
            raise InstructionError("the instruction has no words")
        if "raise" in observation.instruction:
            raise ZeroDivisionError("a secret of this machine")
        shape = (self.embodiment.chunk, self.embodiment.action_dim)
        actions_BKA = np.stack([self._one(observation, row, shape) for row in range(observation.batch_size)])
        return ActionChunk(actions_BKA.astype(np.float32), {"inference_ms": 1.0})

    @staticmethod
    def _one(observation: Observation, row: int, shape: tuple[int, int]) -> np.ndarray:
        if observation.instruction[row] == "nan":
            return np.full(shape, np.nan)
        total = sum(
            i * int(observation.images[name][row].sum()) for i, name in enumerate(sorted(observation.images), 1)
        )
        total += len(observation.instruction[row])
        if observation.committed is not None and (committed := observation.committed[row]) is not None:
            total += int(committed.actions.sum()) + 100 * committed.delay
        return total % 1000 + observation.state[row].sum() + np.arange(shape[0] * shape[1]).reshape(shape)


def observation(seed: int = 0, instruction: str = "pick up the red cube", robot: Embodiment = ROBOT) -> Observation:
    return replace(robot.fake_observation(seed=seed), instruction=[instruction])


def libero_request(seed: int = 0, /, **changes: Any) -> dict[str, Any]:
    """What openpi's LIBERO client sends for `observation(seed)`; None removes a key."""
    seen = observation(seed)
    request = {
        "observation/image": seen.images["agentview"][0],
        "observation/wrist_image": seen.images["wrist"][0],
        "observation/state": seen.state[0],
        "prompt": seen.instruction[0],
    }
    return {key: value for key, value in (request | changes).items() if value is not None}


@contextlib.contextmanager
def serving(
    policy: Any,
    settings: ServerSettings | None = None,
    batching: BatchSettings | None = None,
    keys: RequestKeys = LIBERO_KEYS,
    wait: bool = True,
) -> Iterator[tuple[str, PolicyServer]]:
    """A server in a thread, on a free port: its address and itself."""
    settings = replace(settings or ServerSettings(), port=0, shutdown_s=1.0)
    server = PolicyServer(policy, settings, batching, keys)
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        await server.run(stop, lambda port: started.set_result((loop, stop, port)))

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    loop, stop, port = started.result(10)
    scheme = "ws" if settings.tls.cert is None else "wss"
    uri = f"{scheme}://127.0.0.1:{port}"
    try:
        if wait:
            until(lambda: get(uri, "/healthz")[0] == 200 if scheme == "ws" else server._batcher.healthy)
        yield uri, server
    finally:
        if isinstance(policy, SumPolicy):
            policy.go.set()
        loop.call_soon_threadsafe(stop.set)
        thread.join(120)
        assert not thread.is_alive(), "the server did not stop"


def get(uri: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and body of an HTTP request to a server's address; status 0 if nobody is there."""
    try:
        with urlopen(Request(uri.replace("ws", "http", 1) + path, headers=headers or {}), timeout=10) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_for_server(process: subprocess.Popen[bytes], uri: str) -> None:
    """Return once a server's process answers; SystemExit if it has ended."""
    until(lambda: process.poll() is not None or get(uri, "/healthz")[0] == 200)
    if process.poll() is not None:
        raise SystemExit("the server did not start")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """A server of a `SumPolicy` in a process of its own; `log` is a file for what it writes."""

    def __init__(
        self, port: int, sleep_s: float = 0.0, log: IO[bytes] | None = None, reads_committed: bool = False
    ) -> None:
        self.uri = f"ws://127.0.0.1:{port}"
        command = [sys.executable, __file__, str(port), str(sleep_s), *(["committed"] if reads_committed else [])]
        self.process = subprocess.Popen(command, stderr=log)
        until(lambda: get(self.uri, "/healthz")[0] == 200)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(120)


class StallingProxy:
    """Passes bytes between a client and a server until it is told to stall; then both sides hear nothing at all.

    Attributes:
        delay_s: answers are held back for so long.
    """

    def __init__(self, uri: str) -> None:
        self.delay_s = 0.0
        self._ends: list[socket.socket] = []
        self.lead_to(uri)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._flows = threading.Event()
        self._flows.set()
        self.uri = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, uri: str) -> None:
        """Where new connections end; those that are there stay."""
        self._target = ("127.0.0.1", int(uri.rpartition(":")[2]))

    def stall(self) -> None:
        self._flows.clear()

    def resume(self) -> None:
        self._flows.set()

    def cut(self) -> None:
        """End all connections."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._flows.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:  # nobody is there, as the client must see
                    client.close()
                    continue
                self._ends += [client, server]
                for source, sink, slow in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass_on, args=(source, sink, slow), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay_s if slow else 0.0)
                self._flows.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


async def _main(port: int, sleep_s: float, reads_committed: bool) -> None:
    policy = SumPolicy(sleep_s=sleep_s, reads_committed=reads_committed)
    await PolicyServer(policy, ServerSettings(port=port), keys=LIBERO_KEYS).run(asyncio.Event())


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2]), "committed" in sys.argv))
