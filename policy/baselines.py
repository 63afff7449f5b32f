"""Baseline policies without training, to compare with."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cogvla.policy.interface import ActionChunk, Embodiment, Observation


class RandomPolicy:
    """Return random actions, uniform in [-1, 1]. The same observation always gives the same actions, in any batch."""

    def __init__(self, embodiment: Embodiment, seed: int = 0) -> None:
        self._embodiment = embodiment
        self._seed = seed

    @property
    def embodiment(self) -> Embodiment:
        return self._embodiment

    def describe(self) -> dict[str, Any]:
        """See `Policy.describe`."""
        return {"preset": "random", "parameters": 0, "seed": self._seed, "embodiment": self._embodiment.name}

    def reset(self) -> None:
        """Do nothing: there is no memory."""

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Do nothing: there is nothing to prepare."""

    def act(self, observation: Observation) -> ActionChunk:
        """See `Policy.act`."""
        started = time.perf_counter()
        shape = (self._embodiment.chunk, self._embodiment.action_dim)
        rows = range(observation.batch_size)
        actions_BKA = np.stack([self._generator(observation, row).uniform(-1, 1, shape) for row in rows])
        return ActionChunk(actions_BKA.astype(np.float32), {"inference_ms": (time.perf_counter() - started) * 1e3})

    def _generator(self, observation: Observation, row: int) -> np.random.Generator:
        parts = [np.ascontiguousarray(observation.state[row]).tobytes(), observation.instruction[row].encode()]
        parts += [np.ascontiguousarray(observation.images[name][row]).tobytes() for name in sorted(observation.images)]
        return np.random.default_rng([self._seed, *(zlib.crc32(part) for part in parts)])
