"""A client that outlives its server: it connects again, with growing and random pauses, within each call's deadline."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field, replace

from cogvla.policy.interface import Observation
from cogvla.real_robot.serving.async_client import Answer, AsyncPolicyClient, ClientSettings, UnavailableError
from cogvla.real_robot.serving.server_info import ServerInfo


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts to connect: they double, and are random so that many robots do not return at once.

    Attributes:
        first_s: longest pause after the first failure.
        most_s: no pause is longer.
        jitter: share of a pause that is random.
    """

    first_s: float = 0.05
    most_s: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.most_s or not 0 <= self.jitter <= 1:
            raise ValueError(f"need 0 < first_s <= most_s and a jitter of 0 to 1, got {self!r}")

    def pause_s(self, failures: int, chance: float) -> float:
        """The pause after so many failures in a row, with `chance` from 0 to 1."""
        longest = min(self.first_s * 2.0 ** min(failures - 1, 32), self.most_s)
        return longest * (1 - self.jitter * chance)


@dataclass
class ReconnectingClient:
    """Like `AsyncPolicyClient`, on as many connections as it takes. Nothing is connected before the first call.

    A server that comes back must serve the same kind of robot as before, or calls raise ValueError.

    Attributes:
        uri: of the server.
        settings: of each connection.
        backoff: pauses between attempts.
        random: source of the jitter.
        connections: how often it has connected; more than 1 means that the server was away.
    """

    uri: str
    settings: ClientSettings = field(default_factory=ClientSettings)
    backoff: Backoff = field(default_factory=Backoff)
    random: random.Random = field(default_factory=random.Random)
    connections: int = field(default=0, init=False)
    _client: AsyncPolicyClient | None = field(default=None, init=False)
    _failures: int = field(default=0, init=False)
    _reasons: list[str] = field(default_factory=list, init=False)
    _next_attempt_s: float = field(default=0.0, init=False)

    async def info(self, timeout_s: float | None = None) -> ServerInfo:
        """The server's metadata; UnavailableError if it cannot be reached in time."""
        last_s = time.monotonic() + (self.settings.connect_s if timeout_s is None else timeout_s)
        return (await self._connected(last_s)).info

    async def infer(
        self, observation: Observation, *, timeout_s: float | None = None, observation_id: int | None = None
    ) -> Answer:
        """See `AsyncPolicyClient.infer`; the deadline covers connecting and every attempt."""
        last_s = time.monotonic() + (self.settings.answer_s if timeout_s is None else timeout_s)
        while True:
            client = await self._connected(last_s)
            try:
                answer = await client.infer(
                    observation, timeout_s=max(last_s - time.monotonic(), 1e-3), observation_id=observation_id
                )
                self._reasons.clear()
                return answer
            except UnavailableError as error:
                self._failed(error)
                if time.monotonic() >= last_s:
                    raise self._gave_up() from error
            finally:
                if not client.open:
                    self._client = None

    async def close(self) -> None:
        """Close the connection, if there is one."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _connected(self, last_s: float) -> AsyncPolicyClient:
        while self._client is None or not self._client.open:
            now_s = time.monotonic()
            if max(self._next_attempt_s, now_s) >= last_s:
                await asyncio.sleep(max(last_s - now_s, 0))
                raise self._gave_up()
            await asyncio.sleep(max(self._next_attempt_s - now_s, 0))
            left_s = last_s - time.monotonic()
            settings = replace(self.settings, connect_s=max(min(self.settings.connect_s, left_s), 1e-3))
            try:
                self._client = await AsyncPolicyClient.connect(self.uri, settings)
            except UnavailableError as error:
                self._failed(error)
                if time.monotonic() >= last_s:
                    raise self._gave_up() from error
                continue
            self.connections += 1
            self._failures = 0
            # whatever comes back there later must still fit what the caller has seen
            self.settings = replace(self.settings, robot=self.settings.robot or self._client.info.embodiment)
        return self._client

    def _failed(self, error: UnavailableError) -> None:
        self._failures += 1
        # the attempt that the deadline cuts off would hide why those before it failed
        self._reasons = [*(reason for reason in self._reasons if reason != str(error)), str(error)][-3:]
        self._next_attempt_s = time.monotonic() + self.backoff.pause_s(self._failures, self.random.random())

    def _gave_up(self) -> UnavailableError:
        return UnavailableError("; ".join(self._reasons) or f"{self.uri}: no time to connect")
