"""Evaluate a policy that runs in a policy server: the `Policy` contract over a websocket.

Shape legend: B batch, K chunk, A action.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
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
        try:
            self._clients = [self._loop.run(AsyncPolicyClient.connect(uri, self._settings))]
        except BaseException:
            self._loop.close()
            raise
        self.info = self._clients[0].info

    @property
    def embodiment(self) -> Embodiment:
        return self.info.embodiment

    def describe(self) -> dict[str, Any]:
        """Return the description of the policy as the server sent it."""
        return dict(self.info.policy)

    def reset(self) -> None:
        """Do nothing: this object keeps no state between episodes, and the server has other clients."""

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
        await self._connect(observation.batch_size)
        rows = range(observation.batch_size)
        return await asyncio.gather(*(self._clients[row].infer(_row(observation, row)) for row in rows))

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


def _row(observation: Observation, row: int) -> Observation:
    """Return one sample of a batch as a batch of size 1."""
    return replace(
        observation,
        images={name: image[row : row + 1] for name, image in observation.images.items()},
        state=observation.state[row : row + 1],
        instruction=[observation.instruction[row]],
    )
