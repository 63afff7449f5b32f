"""What goes out of a control loop: commands to the controller, and requests to the policy.

Shape legend: A action dimension, N ticks of the old plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from cogvla.policy.interface import Observation


class Kind(Enum):
    """What a tick sends: an action of the policy, a command that brings the arm to rest and keeps it there, nothing."""

    ACTION = "action"
    HOLD = "hold"
    NONE = "none"


@dataclass(frozen=True, eq=False, slots=True)
class Command:
    """What is sent at one tick.

    Attributes:
        kind: see `Kind`.
        tick: absolute number of this tick.
        action_A: float64 [A], what to send, inside of all limits; None exactly where nothing is to be sent.
        reason: why this is no action of the policy; empty for an action.
    """

    kind: Kind
    tick: int
    action_A: np.ndarray | None
    reason: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """What the policy is asked, and what its answer is matched with.

    Attributes:
        id: counts requests.
        epoch: an answer is used in this epoch only.
        observation: batch of one.
        stamp: time of the observation.
        tick: the control tick of the observation, which action 0 of the chunk belongs to.
        asked_at, deadline: times; after the deadline an answer is not used.
        committed_NA: what the queue holds from `tick` on, N may be 0; for real-time chunking at the policy.
        delay_ticks: so many actions of the chunk will have passed when it arrives; for the same.
    """

    id: int
    epoch: int
    observation: Observation
    stamp: float
    tick: int
    asked_at: float
    deadline: float
    committed_NA: np.ndarray
    delay_ticks: int
