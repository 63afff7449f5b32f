"""Workers of a rollout in a Ray cluster: environments on many machines.

The policy stays in the process of the rollout. Every machine of the cluster needs this package and the suite. No shared
file system is necessary: videos come back over the network.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from cogvla.envs.rollout.player import (
    Build,
    Failed,
    PlayerReply,
    PlayerRequest,
    PlayerSettings,
    Record,
    Recorded,
)
from cogvla.files import write_atomic
from cogvla.processes import ONE_THREAD

UV_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
LOCAL = "local"
"""Address for a cluster of this machine alone, which ends with the rollout."""


@contextmanager
def ray_cluster(address: str) -> Iterator[Callable[[PlayerSettings], RayWorker]]:
    """Connect to a cluster and yield a function that starts a worker, for `rollout`.

    Args:
        address: `auto` (the cluster that this machine belongs to), HOST:PORT, ray://HOST:PORT, or `local`.

    Raises:
        ValueError: Ray is not installed, or no cluster answers there.
    """
    # If this process runs under `uv run`, Ray would start its workers so too: without extras, and in the same .venv.
    os.environ.setdefault(UV_HOOK, "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("ray=... needs the extra: `uv sync --extra ray`, on every machine of the cluster") from error
    ours = not ray.is_initialized()
    if ours:
        try:
            own: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
            ray.init(log_to_driver=False, **own)
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`") from error
    try:
        yield RayWorker
    finally:
        if ours:
            ray.shutdown()


class RayWorker:
    """A player in an actor, which ends when this object is closed."""

    def __init__(self, settings: PlayerSettings) -> None:
        import ray

        # It requests almost no CPU, so that the replacement of a worker on a lost machine fits on another machine.
        environment = {"env_vars": {**ONE_THREAD, **_gl()}}
        actor: Any = ray.remote(num_cpus=0.01, scheduling_strategy="SPREAD", runtime_env=environment)
        self._ray: Any = ray
        self._actor: Any = actor(_Remote).remote(settings)
        # One byte arrives when the reply is ready, so that `wait` works for actors as for processes.
        self.connection, self._done = Pipe()
        self._path: Path | None = None
        self._ask(self._actor.handle.remote(Build()))

    def send(self, request: PlayerRequest) -> None:
        """Send a request and return at once."""
        self._path = request.path if isinstance(request, Record) else None
        self._ask(self._actor.handle.remote(request))

    def _ask(self, answer: Any) -> None:
        self._answer = answer
        answer.future().add_done_callback(lambda _: self._tell())

    def _tell(self) -> None:
        if not self._done.closed:
            self._done.send_bytes(b"\0")

    def receive(self) -> PlayerReply:
        """Wait for the reply to the last request; `Failed` with `died` if the actor has died."""
        self.connection.recv_bytes()
        try:
            reply, video = self._ray.get(self._answer)
        except self._ray.exceptions.RayActorError as error:
            return Failed(f"the environment's actor died: {error}", died=True)
        except self._ray.exceptions.RayError as error:
            return Failed(str(error))
        if video is None or self._path is None:
            return reply
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, video)
        except OSError as error:
            return Failed(f"{self._path}: {error}")
        return Recorded(self._path)

    def kill(self) -> None:
        """End an actor that does not answer."""
        self._ray.kill(self._actor)

    def close(self) -> None:
        """End the actor and its environment."""
        self._ray.kill(self._actor)
        self._done.close()
        self.connection.close()


class _Remote:
    """The actor: a player that returns its videos as bytes."""

    def __init__(self, settings: PlayerSettings) -> None:
        self._player = settings.build()

    def handle(self, request: PlayerRequest) -> tuple[PlayerReply, bytes | None]:
        if not isinstance(request, Record):
            return self._player.handle(request), None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / request.path.name
            reply = self._player.handle(replace(request, path=path))
            return reply, path.read_bytes() if isinstance(reply, Recorded) else None


def _gl() -> dict[str, str]:
    """Return the environment variables of this process that choose the rendering backend."""
    return {name: os.environ[name] for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM") if name in os.environ}
