"""Wrap a policy so that a function sees all its observations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from cogvla.policy.interface import (
    ActionChunk,
    Embodiment,
    Observation,
    Policy,
    begin_episode,
    end_episode,
    reads_committed,
)


class WatchedPolicy:
    """Policy that passes each observation to a function and then to the wrapped policy.

    Args:
        policy: the wrapped policy.
        watch: function that gets each observation first.
    """

    def __init__(self, policy: Policy, watch: Callable[[Observation], None]) -> None:
        self._policy, self._watch = policy, watch

    @property
    def embodiment(self) -> Embodiment:
        return self._policy.embodiment

    @property
    def reads_committed(self) -> bool:
        return reads_committed(self._policy)

    def describe(self) -> dict[str, Any]:
        return self._policy.describe()

    def reset(self) -> None:
        self._policy.reset()

    def begin(self, slots: Sequence[Hashable]) -> None:
        begin_episode(self._policy, slots)

    def end(self, slots: Sequence[Hashable]) -> None:
        end_episode(self._policy, slots)

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        self._policy.warm_up(batch, instructions)

    def act(self, observation: Observation) -> ActionChunk:
        self._watch(observation)
        return self._policy.act(observation)
