"""Tell a monitor of the cameras what a control loop sees and executes, once per horizon of executed actions.

Shape legend: A action dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np

from cogvla.policy.interface import Observation

ARM = "arm"


class EpisodeMonitor(Protocol):
    """A monitor, such as `cogvla.policy.foresight.monitor.Monitor`; this file needs no torch."""

    horizon: int

    def begin(self, slots: Sequence[Hashable]) -> None: ...

    def interrupt(self, slot: Hashable) -> None: ...

    def look(self, slots: Sequence[Hashable], observation: Observation) -> None: ...

    def executed(self, slots: Sequence[Hashable], actions_BTA: np.ndarray) -> None: ...

    def alarm(self, slot: Hashable) -> str | None: ...


class CameraWatch:
    """The watch of one robot; without a monitor it sees nothing.

    Args:
        monitor: the monitor, or None.
    """

    def __init__(self, monitor: EpisodeMonitor | None) -> None:
        self._monitor = monitor
        self._steps: int | None = None  # actions since the observation that is to be compared; None: there is none

    @property
    def alarm(self) -> str | None:
        """Why the arm must hold until an operator acts, or None."""
        return None if self._monitor is None else self._monitor.alarm(ARM)

    def begin(self) -> None:
        """Forget everything, also an alarm."""
        self._steps = None
        if self._monitor is not None:
            self._monitor.begin([ARM])

    def before_action(self, observe: Callable[[], Observation | None]) -> None:
        """Look at the cameras, if a horizon is over or begins; call it before each action of the policy."""
        if self._monitor is None or self._steps not in (None, self._monitor.horizon):
            return
        observation = observe()
        if observation is None:
            self.interrupt()
            return
        self._monitor.look([ARM], observation)
        self._steps = 0

    def sent(self, action_A: np.ndarray) -> None:
        """Tell that this action of the policy was sent."""
        if self._monitor is not None and self._steps is not None:
            self._monitor.executed([ARM], action_A[None, None])
            self._steps += 1

    def interrupt(self) -> None:
        """Tell that the arm did something else: what was seen before it is not compared."""
        if self._monitor is not None and self._steps is not None:
            self._monitor.interrupt(ARM)
        self._steps = None
