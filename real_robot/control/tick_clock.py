"""The time that a control loop was told, and the ticks that really happened in it.

Ticks are counted, not estimated from the time: a late tick delays the plan, it does not skip actions that nobody
executed. When the time itself cannot be trusted (a step back, or a gap in which the process was suspended), that is a
jump, and everything that is known about the robot is void.
"""

from __future__ import annotations

import math
from collections import deque

from cogvla.real_robot.control.chunk_queue import KEEP_PASSED


class TickClock:
    """Times in seconds.

    Args:
        period_s: of the control loop.
        gap_s: `LoopSettings.clock_gap_s`.

    Attributes:
        now: the newest time that was told.
        next_tick: absolute number of the next tick.
    """

    def __init__(self, period_s: float, gap_s: float) -> None:
        self._period_s = period_s
        self._gap_s = gap_s
        self._ticked_at: deque[float] = deque(maxlen=KEEP_PASSED)
        self.now = -math.inf
        self.next_tick = 0

    def tell(self, now: float) -> bool:
        """Take the time of a call; True for a jump back. By less than `gap_s` it never goes back, it stands still."""
        if not math.isfinite(now):
            raise ValueError(f"now must be a time in seconds, got {now}")
        jumped = now < self.now - self._gap_s
        if jumped:
            self._ticked_at.clear()
        self.now = now if jumped else max(self.now, now)
        return jumped

    def tick(self) -> float | None:
        """Count a tick at `now`; seconds since the one before, None where there is none to compare with."""
        gap = self.now - self._ticked_at[-1] if self._ticked_at else None
        if gap is not None and gap > self._gap_s:
            self._ticked_at.clear()
        self._ticked_at.append(self.now)
        self.next_tick += 1
        return gap

    def pause(self) -> None:
        """The next tick follows none."""
        self._ticked_at.clear()

    def tick_of(self, stamp: float) -> int:
        """The tick nearest to a time, for times after the last tick the next one if it is nearer.

        Half a period is the least that an action can be off. "The first tick after the stamp" would let an observation
        that is made just after a tick wait for the next one, although it shows nothing of what that tick has sent yet.
        """
        tick = self.next_tick
        due = self._ticked_at[-1] + self._period_s if self._ticked_at else stamp
        for ticked_at in reversed(self._ticked_at):
            if ticked_at < stamp:
                return tick - 1 if stamp - ticked_at < due - stamp else tick
            tick -= 1
            due = ticked_at
        return tick
