"""Blocking clients of the policy server, for code without an event loop.

They run the async clients in a thread, so that every deadline holds. A blocking socket could not keep a deadline: when
the network stalls, a write to it can block for minutes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Self, TypeVar

from cogvla.policy.interface import Observation
from cogvla.real_robot.serving.async_client import Answer, AsyncPolicyClient, ClientSettings
from cogvla.real_robot.serving.reconnecting import Backoff, ReconnectingClient
from cogvla.real_robot.serving.server_info import ServerInfo

T = TypeVar("T")


class EventLoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="policy client", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine and return its future without waiting."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and return its result; cancel it on Ctrl-C."""
        future = self.submit(work)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the client was closed during this call") from None
        finally:
            future.cancel()

    def close(self) -> None:
        """Stop the event loop and end the thread. No coroutine may be running."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Blocking:
    """Methods that both blocking clients share; each forwards to the async client."""

    _loop: EventLoopThread
    _client: AsyncPolicyClient | ReconnectingClient

    def infer(
        self,
        observation: Observation,
        *,
        timeout_s: float | None = None,
        observation_id: int | None = None,
        episode_id: int | None = None,
    ) -> Answer:
        """Ask the policy for the action chunk of one observation. Arguments and errors: `AsyncPolicyClient.infer`."""
        return self._loop.run(
            self._client.infer(observation, timeout_s=timeout_s, observation_id=observation_id, episode_id=episode_id)
        )

    def close(self) -> None:
        """Close the connection, if there is one."""
        self._loop.run(self._client.close())
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PolicyClient(_Blocking):
    """Blocking client with one connection. Once it is lost, every call raises UnavailableError.

    Arguments and errors: `AsyncPolicyClient.connect`.

    with PolicyClient("ws://127.0.0.1:8000", ClientSettings(robot=embodiment)) as client:
        answer = client.infer(observation)
    """

    def __init__(self, uri: str, settings: ClientSettings | None = None) -> None:
        self._loop = EventLoopThread()
        try:
            self._client: AsyncPolicyClient = self._loop.run(AsyncPolicyClient.connect(uri, settings))
        except BaseException:
            self._loop.close()
            raise

    @property
    def info(self) -> ServerInfo:
        return self._client.info


class ReconnectingPolicyClient(_Blocking):
    """Blocking client that connects again after a loss, see `ReconnectingClient`. It connects at the first call."""

    def __init__(self, uri: str, settings: ClientSettings | None = None, backoff: Backoff | None = None) -> None:
        self._loop = EventLoopThread()
        self._client: ReconnectingClient = ReconnectingClient(uri, settings or ClientSettings(), backoff or Backoff())

    @property
    def connections(self) -> int:
        """Number of connections made so far."""
        return self._client.connections

    def info(self, timeout_s: float | None = None) -> ServerInfo:
        """Return the server's metadata, see `ReconnectingClient.info`."""
        return self._loop.run(self._client.info(timeout_s))
