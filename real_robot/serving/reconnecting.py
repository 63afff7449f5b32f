"""Client that reconnects to the policy server: exponential backoff with jitter, within each call's deadline."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cogvla.policy.interface import Observation
from cogvla.real_robot.serving.async_client import Answer, AsyncPolicyClient, ClientSettings, UnavailableError
from cogvla.real_robot.serving.server_info import ServerInfo

HOW = ("device", "dtype", "engine", "float8")
"""Entries of a policy's description that say how it is computed, and not which one it is."""


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts to connect.

    They double after each failure. A random part keeps many robots from returning at the same moment.

    Attributes:
        first_s: longest pause after the first failure, in seconds.
        most_s: upper limit of all pauses, in seconds.
        jitter: random share of a pause, 0 to 1.
    """

    first_s: float = 0.05
    most_s: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.most_s or not 0 <= self.jitter <= 1:
            raise ValueError(f"need 0 < first_s <= most_s and a jitter of 0 to 1, got {self!r}")

    def pause_s(self, failures: int, chance: float) -> float:
        """Return the pause in seconds after `failures` failures in a row; `chance` is a random number from 0 to 1."""
        longest = min(self.first_s * 2.0 ** min(failures - 1, 32), self.most_s)
        return longest * (1 - self.jitter * chance)


@dataclass
class ReconnectingClient:
    """Like `AsyncPolicyClient`, but connects again after a loss. The first call makes the first connection.

    A server that comes back must serve the same embodiment as before, and the same `policy` if one is named; otherwise
    calls raise ValueError.

    Attributes:
        uri: address of the server.
        settings: settings of each connection.
        backoff: pauses between attempts to connect.
        policy: description of the only policy that may answer, as in `ServerInfo`; its device, precision and engine may
            differ. None: any.
        random: source of the jitter.
        connections: number of connections made so far; more than 1 means that the connection was lost in between.
    """

    uri: str
    settings: ClientSettings = field(default_factory=ClientSettings)
    backoff: Backoff = field(default_factory=Backoff)
    policy: Mapping[str, Any] | None = None
    random: random.Random = field(default_factory=random.Random)
    connections: int = field(default=0, init=False)
    _client: AsyncPolicyClient | None = field(default=None, init=False)
    _failures: int = field(default=0, init=False)
    _reasons: list[str] = field(default_factory=list, init=False)
    _next_attempt_s: float = field(default=0.0, init=False)

    async def info(self, timeout_s: float | None = None) -> ServerInfo:
        """Return the server's metadata.

        Raises:
            UnavailableError: the server cannot be reached within `timeout_s` (None: `ClientSettings.connect_s`).
        """
        last_s = time.monotonic() + (self.settings.connect_s if timeout_s is None else timeout_s)
        return (await self._connected(last_s)).info

    async def infer(
        self,
        observation: Observation,
        *,
        timeout_s: float | None = None,
        observation_id: int | None = None,
        episode_id: int | None = None,
    ) -> Answer:
        """Ask the policy for the action chunk of one observation, see `AsyncPolicyClient.infer`.

        The deadline covers connecting and all attempts together.
        """
        last_s = time.monotonic() + (self.settings.answer_s if timeout_s is None else timeout_s)
        while True:
            client = await self._connected(last_s)
            try:
                answer = await client.infer(
                    observation,
                    timeout_s=max(last_s - time.monotonic(), 1e-3),
                    observation_id=observation_id,
                    episode_id=episode_id,
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
            await self._check_policy(self._client)
            self.connections += 1
            self._failures = 0
            # a server that comes back later must fit the embodiment that the caller has seen
            self.settings = replace(self.settings, robot=self.settings.robot or self._client.info.embodiment)
        return self._client

    async def _check_policy(self, client: AsyncPolicyClient) -> None:
        """Close a connection to a server of another policy, and raise a ValueError."""
        if self.policy is None:
            return
        there = client.info.policy
        changed = [k for k in {**self.policy, **there} if k not in HOW and self.policy.get(k) != there.get(k)]
        if changed:
            self._client = None
            await client.close()
            raise ValueError(
                f"{self.uri} now serves another policy than at the start of this run (another {', '.join(changed)})"
            )

    def _failed(self, error: UnavailableError) -> None:
        self._failures += 1
        # keep several reasons: the last attempt is often cut off by the deadline, which says nothing about the cause
        self._reasons = [*(reason for reason in self._reasons if reason != str(error)), str(error)][-3:]
        self._next_attempt_s = time.monotonic() + self.backoff.pause_s(self._failures, self.random.random())

    def _gave_up(self) -> UnavailableError:
        return UnavailableError("; ".join(self._reasons) or f"{self.uri}: no time to connect")


async def check_server(uri: str, settings: ClientSettings) -> str | None:
    """Check the address, the certificate and the policy of a server; return why it cannot be reached yet, or None.

    Raises:
        ValueError: another try would fail, too: address or certificate are wrong, the server's policy is for another
            robot, or it refuses this client.
    """
    try:
        client = await AsyncPolicyClient.connect(uri, settings)
    except UnavailableError as error:
        return str(error)
    await client.close()
    return None
