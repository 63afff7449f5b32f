"""Clock of the control loop: count ticks, detect jumps, and find the tick of an observation.

Ticks are counted, not computed from the time. So a late tick delays the plan; it does not skip actions, unless the
robot's controller has the plan and executes it by itself (`skip`). A step back of the clock, or a long gap in which the
process was suspended, is a jump: the loop discards what it knows about the robot.
"""

from __future__ import annotations

import math
from collections import deque

from cogvla.policy.chunk_queue import KEEP_PASSED


class TickClock:
    """Clock and tick counter. All times are seconds.

    Args:
        period_s: period of the control loop.
        gap_s: `LoopSettings.clock_gap_s`; ValueError if each tick would be a jump.

    Attributes:
        now: newest time passed to `tell`.
        next_tick: absolute number of the next tick.
    """

    def __init__(self, period_s: float, gap_s: float) -> None:
        if gap_s <= period_s:
            raise ValueError(f"loop: clock_gap_s must be longer than a control period of {period_s:g} s, got {gap_s:g}")
        self._period_s = period_s
        self._gap_s = gap_s
        self._ticked_at: deque[float] = deque(maxlen=KEEP_PASSED)
        self.now = -math.inf
        self.next_tick = 0

    def tell(self, now: float) -> bool:
        """Set the time and return True if it jumped back by more than `gap_s`.

        The clock ignores a smaller step back: `now` stays the same.
        """
        if not math.isfinite(now):
            raise ValueError(f"now must be a time in seconds, got {now}")
        jumped = now < self.now - self._gap_s
        if jumped:
            self._ticked_at.clear()
        self.now = now if jumped else max(self.now, now)
        return jumped

    def tick(self, skip: int = 0) -> float | None:
        """Count a tick at `now`. Return the seconds since the last tick; None for the first one after a pause.

        Args:
            skip: largest number of missed ticks to count, too, because the controller went on in them by itself.
        """
        last = self._ticked_at[-1] if self._ticked_at else None
        gap = None if last is None else self.now - last
        if skip and last is not None:
            missed = min(max(round((self.now - last) / self._period_s) - 1, 0), skip)
            self._ticked_at.extend(last + self._period_s * (i + 1) for i in range(missed))
            self.next_tick += missed
        if gap is not None and gap > self._gap_s:
            self._ticked_at.clear()
        self._ticked_at.append(self.now)
        self.next_tick += 1
        return gap

    def pause(self) -> None:
        """Forget the times of past ticks, so that the next tick is compared with none."""
        self._ticked_at.clear()

    def tick_of(self, stamp: float) -> int:
        """Return the tick nearest to a time, which may be the next one.

        The nearest tick is at most half a period off. The first tick after the stamp would be a worse choice: an
        observation made just after a tick does not yet show the effect of that tick's command, so it belongs to it.
        """
        tick = self.next_tick
        due = self._ticked_at[-1] + self._period_s if self._ticked_at else stamp
        for ticked_at in reversed(self._ticked_at):
            if ticked_at < stamp:
                return tick - 1 if stamp - ticked_at < due - stamp else tick
            tick -= 1
            due = ticked_at
        return tick
