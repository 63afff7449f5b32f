"""Output types of the control loop: commands to the controller, and requests to the policy.

Shape legend: A action dimension, N ticks of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from cogvla.policy.interface import Observation


class Kind(Enum):
    """Kind of a command.

    An action of the policy, one of the teleoperator, a hold (come to rest and stay there), or nothing to send.
    """

    ACTION = "action"
    TELEOP = "teleop"
    HOLD = "hold"
    NONE = "none"


@dataclass(frozen=True, eq=False, slots=True)
class Command:
    """Command of one tick.

    Attributes:
        kind: action of the policy or of the teleoperator, hold or nothing.
        tick: absolute number of the tick.
        action_A: command to send, float64 [A], within all limits; None if nothing is to be sent.
        reason: why this is no action; empty for an action.
        coming_NA: for a controller that executes plans, the commands [N,A] of the following ticks until the arm rests;
            None if they are what it has been given before, or if nothing is to be sent.
    """

    kind: Kind
    tick: int
    action_A: np.ndarray | None
    reason: str = ""
    coming_NA: np.ndarray | None = None


@dataclass(frozen=True, eq=False, slots=True)
class ChunkRequest:
    """Request to the policy. The loop matches the answer with it. All times are seconds on the loop's clock.

    Attributes:
        id: running number of the request.
        epoch: epoch of the request; the loop uses the answer in this epoch only.
        observation: observation of batch size 1, with the plan from `tick` on (`Observation.committed`).
        stamp: time of the observation.
        tick: control tick of the observation; action 0 of the chunk belongs to it.
        asked_at: time of the request.
        deadline: time after which the loop does not use the answer.
        delay_ticks: expected number of ticks that pass from the observation until the answer arrives.
    """

    id: int
    epoch: int
    observation: Observation
    stamp: float
    tick: int
    asked_at: float
    deadline: float
    delay_ticks: int
