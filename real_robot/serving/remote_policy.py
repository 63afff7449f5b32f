"""Evaluate a policy that runs in a policy server: the `Policy` contract over a websocket.

Shape legend: B batch, K chunk, A action.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from cogvla.policy.interface import ActionChunk, Embodiment, Observation
from cogvla.real_robot.serving.async_client import Answer, AsyncPolicyClient, ClientSettings
from cogvla.real_robot.serving.client import EventLoopThread


class RemotePolicy:
    """Policy behind a policy server.

    Each sample of a batch goes over its own connection, so the server batches them like requests of several robots.

    Args:
        uri: address of the server, `ws://HOST:PORT` or `wss://HOST:PORT`.
        api_key: API key of the server; None if it needs none.
        answer_s: deadline of an answer in seconds; allow for a full queue.

    Raises:
        UnavailableError, ValueError: see `AsyncPolicyClient.connect`.
    """

    def __init__(self, uri: str, *, api_key: str | None = None, answer_s: float = 60.0) -> None:
        self._uri, self._settings = uri, ClientSettings(api_key=api_key, answer_s=answer_s)
        self._loop = EventLoopThread()
        self._of_connection: dict[Hashable, AsyncPolicyClient] = {}
        self._of_slot: dict[Hashable, int] = {}  # the episode of each robot
        self._count = self._of_all = 0
        try:
            self._clients = [self._loop.run(AsyncPolicyClient.connect(uri, self._settings))]
        except BaseException:
            self._loop.close()
            raise
        self.info = self._clients[0].info

    @property
    def embodiment(self) -> Embodiment:
        return self.info.embodiment

    @property
    def reads_committed(self) -> bool:
        """True if the server's policy reads `Observation.committed`."""
        return self.info.committed

    def describe(self) -> dict[str, Any]:
        """Return the description of the policy as the server sent it."""
        return dict(self.info.policy)

    def reset(self) -> None:
        """Begin a new episode in all connections, for a policy that remembers."""
        self._count += 1
        self._of_all, self._of_slot, self._of_connection = self._count, {}, {}

    def begin(self, slots: Sequence[Hashable]) -> None:
        """See `Remembering.begin`."""
        self._count += 1
        self._of_slot |= dict.fromkeys(slots, self._count)

    def end(self, slots: Sequence[Hashable]) -> None:
        """See `Remembering.end`."""
        for slot in slots:
            self._of_slot.pop(slot, None)
            self._of_connection.pop(slot, None)

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Open one connection per sample. The server has warmed the policy up when it started."""
        self._loop.run(self._connect(batch))

    def act(self, observation: Observation) -> ActionChunk:
        """Return the action chunks [B,K,A] of a batch, see `Policy.act`; UnavailableError if the server is lost."""
        started = time.perf_counter()
        answers = self._loop.run(self._act(observation))
        timing = {
            "inference_ms": max(float(answer.timing.get("infer_ms", 0.0)) for answer in answers),
            "round_trip_ms": (time.perf_counter() - started) * 1e3,
        }
        return ActionChunk(np.stack([answer.actions for answer in answers]), timing)

    def close(self) -> None:
        """Close all connections."""
        self._loop.run(self._close())
        self._loop.close()

    async def _act(self, observation: Observation) -> list[Answer]:
        slots = range(observation.batch_size) if observation.slots is None else observation.slots
        await self._connect(len(set(slots) | self._of_connection.keys()))
        free = [client for client in self._clients if client not in self._of_connection.values()]
        for slot in slots:  # each robot keeps its connection, in which the server remembers it
            if self._of_connection.get(slot) not in self._clients:
                self._of_connection[slot] = free.pop(0)
        asked = [
            self._of_connection[slot].infer(observation.row(row), episode_id=self._of_slot.get(slot, self._of_all))
            for row, slot in enumerate(slots)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)  # all: the next call finds none busy
        for error in answers:
            if isinstance(error, BaseException):
                raise error
        return [answer for answer in answers if isinstance(answer, Answer)]

    async def _connect(self, count: int) -> None:
        self._clients = [client for client in self._clients if client.open]  # the server closes idle connections
        while len(self._clients) < count:
            client = await AsyncPolicyClient.connect(self._uri, self._settings)
            if client.info != self.info:
                await client.close()
                raise ValueError(f"{self._uri} now serves another policy than at the start of this run")
            self._clients.append(client)

    async def _close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))
