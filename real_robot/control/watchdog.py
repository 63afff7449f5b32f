"""The states of a control loop, and every way from one to another.

                activate                  a command is due
        IDLE --------------> HOLDING <----------------------> RUNNING
         ^                     |      starved, stale, clock      |
         |                     | held too long                   | past a limit
         |  reset              v                                 v
         +---------------- STOPPED <---- e-stop from anywhere ---+        deactivate: IDLE, but not from STOPPED

IDLE sends nothing. HOLDING keeps the arm where it was told to be and recovers by itself. STOPPED sends nothing, keeps
its first fault, and is left by the operator's reset only, once the e-stop is released; then the loop must be activated
again. A reset is also allowed everywhere else, and ends in IDLE too.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """See the module docstring."""

    IDLE = "idle"
    HOLDING = "holding"
    RUNNING = "running"
    STOPPED = "stopped"


class Event(Enum):
    """What may happen in every state."""

    ACTIVATE = "activate"
    DEACTIVATE = "deactivate"
    RESET = "reset"
    COMMAND = "command"
    HOLD = "hold"
    FAULT = "fault"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.IDLE: {
        Event.ACTIVATE: State.HOLDING,
        Event.DEACTIVATE: State.IDLE,
        Event.RESET: State.IDLE,
        Event.COMMAND: State.IDLE,
        Event.HOLD: State.IDLE,
        Event.FAULT: State.STOPPED,
    },
    State.HOLDING: {
        Event.ACTIVATE: State.HOLDING,
        Event.DEACTIVATE: State.IDLE,
        Event.RESET: State.IDLE,
        Event.COMMAND: State.RUNNING,
        Event.HOLD: State.HOLDING,
        Event.FAULT: State.STOPPED,
    },
    State.RUNNING: {
        Event.ACTIVATE: State.RUNNING,
        Event.DEACTIVATE: State.IDLE,
        Event.RESET: State.IDLE,
        Event.COMMAND: State.RUNNING,
        Event.HOLD: State.HOLDING,
        Event.FAULT: State.STOPPED,
    },
    State.STOPPED: {
        Event.ACTIVATE: State.STOPPED,
        Event.DEACTIVATE: State.STOPPED,
        Event.RESET: State.IDLE,
        Event.COMMAND: State.STOPPED,
        Event.HOLD: State.STOPPED,
        Event.FAULT: State.STOPPED,
    },
}


class Watchdog:
    """Where the loop is, and the fault that stopped it.

    Attributes:
        state: see the module docstring.
        fault: why the loop stopped, the first reason; None unless stopped.
        estop: whether the emergency stop is engaged.
    """

    def __init__(self) -> None:
        self.state = State.IDLE
        self.fault: str | None = None
        self.estop = False

    def on(self, event: Event, reason: str = "") -> State:
        """Take the event and answer the new state. A reset while the e-stop is engaged changes nothing."""
        if event is Event.RESET and self.estop:
            return self.state
        before, self.state = self.state, TRANSITIONS[self.state][event]
        if self.state is not State.STOPPED:
            self.fault = None
        elif before is not State.STOPPED:
            self.fault = reason
        return self.state

    def set_estop(self, engaged: bool) -> None:
        """Engage (a latched fault) or release (the fault stays until the reset)."""
        self.estop = engaged
        if engaged:
            self.on(Event.FAULT, "emergency stop")
