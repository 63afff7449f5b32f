"""State machine of the control loop: idle, holding, running, stopped.

                activate                  a command is due
        IDLE --------------> HOLDING <----------------------> RUNNING
         ^                     |      starved, stale, clock      |
         |                     | held too long                   | past a limit
         |  reset              v                                 v
         +---------------- STOPPED <---- e-stop from anywhere ---+        deactivate: IDLE, but not from STOPPED

IDLE sends nothing. HOLDING keeps the arm at its commanded position and recovers by itself. STOPPED sends nothing and
keeps its first fault; only the operator's reset leaves it, after the e-stop is released, and the loop must then be
activated again. A reset is allowed in every state and leads to IDLE.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """State of the control loop, see the module docstring."""

    IDLE = "idle"
    HOLDING = "holding"
    RUNNING = "running"
    STOPPED = "stopped"


class Event(Enum):
    """Events of the state machine. Every event is allowed in every state."""

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
    """State of a control loop, and the fault that stopped it.

    Attributes:
        state: current state.
        fault: first reason why the loop stopped; None unless stopped.
        estop: True while the emergency stop is engaged.
    """

    def __init__(self) -> None:
        self.state = State.IDLE
        self.fault: str | None = None
        self.estop = False

    def on(self, event: Event, reason: str = "") -> State:
        """Apply an event and return the new state. A reset while the e-stop is engaged changes nothing."""
        if event is Event.RESET and self.estop:
            return self.state
        before, self.state = self.state, TRANSITIONS[self.state][event]
        if self.state is not State.STOPPED:
            self.fault = None
        elif before is not State.STOPPED:
            self.fault = reason
        return self.state

    def set_estop(self, engaged: bool) -> None:
        """Engage the e-stop, which is a fault, or release it; the fault stays until the reset."""
        self.estop = engaged
        if engaged:
            self.on(Event.FAULT, "emergency stop")
