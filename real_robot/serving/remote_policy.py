"""A policy that lives in a server, behind the `Policy` contract: rollouts and evaluations play through the wire.

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
    """Each sample of a batch goes over a connection of its own, so the server batches them like any clients.

    Args:
        uri: `ws://HOST:PORT` or `wss://HOST:PORT`.
        api_key: of the server; None: it has none.
        answer_s: deadline of an answer; it should allow for a full queue.

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
        """What the policy in the server says about itself."""
        return dict(self.info.policy)

    def reset(self) -> None:
        """Nothing to forget here; the server serves others too."""

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Open a connection for each observation; the server warmed up when it started."""
        self._loop.run(self._connect(batch))

    def act(self, observation: Observation) -> ActionChunk:
        """See `Policy.act`; UnavailableError when the server is lost."""
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
        while len(self._clients) < count:
            client = await AsyncPolicyClient.connect(self._uri, self._settings)
            if client.info != self.info:
                await client.close()
                raise ValueError(f"{self._uri} serves another policy now than when this run began")
            self._clients.append(client)

    async def _close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))


def _row(observation: Observation, row: int) -> Observation:
    """One sample, as a batch of size 1."""
    return replace(
        observation,
        images={name: image[row : row + 1] for name, image in observation.images.items()},
        state=observation.state[row : row + 1],
        instruction=[observation.instruction[row]],
    )
