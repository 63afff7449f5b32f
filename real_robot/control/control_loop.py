"""Control loop of a robot: turn observations and action chunks into one safe command per tick.

`ControlLoop` is the only object that a robot's front end calls. It has no I/O, no threads and no clock of its own.

      front end                                   ControlLoop                                    policy client
    camera, joints  --observe_image/_state-->  Observations --+
    instruction     --set_instruction------->                 +--request_due--> Request ------------> act(observation)
                                               ChunkQueue  <---- deliver / fail <------------------------- answer
    every period    --tick------------------>     |
    controller      <--Command---------------  SafetyLimiter        Watchdog: activate, deactivate, estop, reset
    teleoperator    --observe_teleop-------->     |  instead of the queue, from take_over to hand_back

How a front end uses it; `now` is the time of one monotonic clock in seconds:

    loop = ControlLoop(embodiment, config.limits, config.loop)
    loop.set_instruction("pick up the red cube")
    loop.activate()
    # when a sample arrives:       loop.observe_image("wrist", image, stamp, now); loop.observe_state(state, stamp, now)
    # after that, and every tick:  request = loop.request_due(now); if request is not None, give it to the policy client
    # when the client answers:     loop.deliver(chunk, request, now), or loop.fail(request, reason, now)
    # control_hz times a second:   command = loop.tick(now); if command.action_A is not None, send it

Make all calls from one thread or under one lock. No call waits or does I/O, so an e-stop takes effect at once. The loop
keeps the image arrays that it receives: do not write into them afterwards.

Epochs: activate, deactivate, reset, e-stop, a fault, a new instruction, a stale sensor, a jump of the clock, take-over
and hand-back start a new epoch. The loop then forgets its plan, and discards a chunk of an older epoch.

Take-over: the operator drives with the actions of a teleoperator; limits, holds and stops are those of the policy's
actions. As long as the teleoperator asks for a motion past a limit that rejects (`SafetyLimits.reject`), for instance
because its pose is far from the arm's, the arm holds; once it has moved the arm, such a motion is a fault, as for the
policy. Deactivate, reset, e-stop and faults end the take-over. After a hand-back, the policy gets no observation that
is older than it.

Shape legend: A action dimension, N ticks of a plan, S state dimension, H, W image size, K chunk length.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from cogvla.policy.chunk_queue import ChunkQueue
from cogvla.policy.interface import ActionChunk, Committed, Embodiment, Observation
from cogvla.real_robot.control.camera_watch import CameraWatch, EpisodeMonitor
from cogvla.real_robot.control.loop_types import ChunkRequest, Command, Kind
from cogvla.real_robot.control.measurements import RECENT, Measurements
from cogvla.real_robot.control.observations import Observations, Synchronised
from cogvla.real_robot.control.prefetch import Prefetch
from cogvla.real_robot.control.safety import LimitError, SafetyLimiter
from cogvla.real_robot.control.settings import LoopSettings, SafetyLimits
from cogvla.real_robot.control.tick_clock import TickClock
from cogvla.real_robot.control.watchdog import Event, State, Watchdog

__all__ = ["ChunkRequest", "Command", "ControlLoop", "Kind", "State"]


class ControlLoop:
    """Control loop of one robot. The module docstring shows how to use it.

    Args:
        embodiment: robot as the policy sees it, but with the image sizes that the cameras send; the policy may resize
            them.
        limits: safety limits of every command.
        settings: timing, blending and limits of the loop; None for the defaults.
        ahead: the robot's controller executes the coming commands (`Command.coming_NA`) by itself. Ticks that are late
            by whole periods have passed then. Absolute targets only.
        monitor: watches the cameras while the policy drives. On an alarm the loop holds, and says why, until it is
            activated again or reset, the instruction changes or the operator hands back.

    Attributes:
        embodiment: as given.
        settings: as given.
        measurements: counters and latency samples for reports.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        limits: SafetyLimits,
        settings: LoopSettings | None = None,
        ahead: bool = False,
        monitor: EpisodeMonitor | None = None,
    ) -> None:
        settings = settings or LoopSettings()
        if ahead and limits.kind != "absolute":
            raise ValueError("a plan for the controller needs absolute targets: limits.kind must be absolute")
        if (settings.execute_steps or 0) > embodiment.chunk:
            raise ValueError(
                f"loop: execute_steps={settings.execute_steps} changes nothing with chunks of {embodiment.chunk} "
                "actions: lower it"
            )
        self._ahead = ahead
        # What the controller executes from the last tick on.
        self._given_NA: np.ndarray = np.empty((0, embodiment.action_dim))
        self.embodiment = embodiment
        self.settings = settings
        self.measurements = Measurements()
        self._counts = self.measurements.counts
        self._period = 1.0 / embodiment.control_hz
        self._observations = Observations(embodiment, settings)
        self._queue = ChunkQueue(embodiment.action_dim, settings.overlap, settings.ensemble_m)
        self._prefetch = Prefetch(
            embodiment.control_hz,
            settings.latency_s,
            settings.margin_ticks,
            settings.retry_s,
            settings.execute_steps,
        )
        self._limiter = SafetyLimiter(embodiment, limits)
        self._watchdog = Watchdog()
        self._watch = CameraWatch(monitor)
        self._clock = TickClock(self._period, settings.clock_gap_s)
        self._instruction = ""
        self._epoch = 0
        self._sent_epoch = -1  # epoch of the last action that was sent
        self._requests = 0
        self._observed_tick = 0  # tick of the newest chunk's observation
        self._moved_tick = -1  # last tick whose command moved the arm
        self._rests_at = -math.inf  # time at which the last command that moved the arm has taken effect
        self._held_since = 0.0
        self._last_failure: str | None = None  # why the last request has no usable answer, until one has
        self._unasked: str | None = None  # why there is no request although one is due
        self._stale = False
        self._hold_reason = ""
        self._teleoperated = False
        self._handed_back_at = -math.inf
        self._unsent_stamp: float | None = None  # stamp of the newest chunk's observation, until it is used

    # --- calls of the front end ---------------------------------------------------------------------------------------

    def observe_image(self, camera: str, image_HW3: np.ndarray, stamp: float, now: float) -> str | None:
        """Add an image, uint8 [H,W,3] RGB, upright. Return the reason if it is refused, else None.

        Args:
            camera: name of the camera in the embodiment.
            image_HW3: the image; kept, not copied.
            stamp: when it was taken, in seconds on the loop's clock.
            now: time of this call.
        """
        return self._observations.add_image(camera, image_HW3, stamp, self._at(now))

    def observe_state(self, state_S: np.ndarray, stamp: float, now: float) -> str | None:
        """Add a joint state [S] in physical units. Return the reason if it is refused, else None."""
        return self._observations.add_state(state_S, stamp, self._at(now))

    def observe_teleop(self, action_A: np.ndarray, stamp: float, now: float) -> str | None:
        """Add an action [A] of the teleoperator, wanted at `stamp`; it is used while the operator drives.

        Return the reason if it is refused, else None. Then the action before is not used any more either.
        """
        return self._observations.add_teleop(action_A, stamp, self._at(now))

    def refuse(self, sensor: str, kind: str, reason: str) -> str:
        """Count a sample that could not be read, and return the reason with the name of sensor or teleoperator."""
        return self._observations.refuse(sensor, kind, reason)

    def set_instruction(self, text: str) -> None:
        """Set the instruction and start a new epoch. Empty text holds the arm without a time limit.

        The same text again changes nothing.
        """
        text = text.strip()
        if text != self._instruction:
            self._instruction = text
            self._watch.begin()
            self._new_epoch()

    def activate(self) -> bool:
        """Start to ask the policy and to send commands. Return False if a fault must be reset first."""
        if self.state is State.IDLE:
            self._watch.begin()
            self._new_epoch()
            self._limiter.forget()
            self._given_NA = self._given_NA[:0]
            self._clock.pause()
        return self._watchdog.on(Event.ACTIVATE) is not State.STOPPED

    def deactivate(self) -> None:
        """Stop sending commands. A fault stays."""
        self._watchdog.on(Event.DEACTIVATE)
        self._teleoperated = False
        self._new_epoch()

    def estop(self, engaged: bool = True) -> None:
        """Engage or release the emergency stop.

        Once engaged, the loop sends nothing. After the release the fault stays until the reset.
        """
        self._counts["faults"] += engaged and self.state is not State.STOPPED
        self._watchdog.set_estop(engaged)
        if engaged:
            self._teleoperated = False
            self._new_epoch()

    def stop(self, fault: str) -> None:
        """Stop with a fault that was found outside the loop."""
        self._stop(self._clock.next_tick, fault)

    def reset(self) -> bool:
        """Clear a fault and go to IDLE, from any state. Return False while the e-stop is engaged."""
        self._teleoperated = False
        self._watch.begin()
        self._new_epoch()
        return self._watchdog.on(Event.RESET) is State.IDLE

    def take_over(self, now: float) -> bool:
        """Let the operator drive, with the teleoperator's actions. Return False if a fault must be reset first."""
        now = self._at(now)
        if self.state is not State.STOPPED and not self._teleoperated:
            self._teleoperated = True
            self._counts["take_overs"] += 1
            self._held_since = now
            self._new_epoch()
        return self._teleoperated

    def hand_back(self, now: float) -> None:
        """Let the policy drive again; it starts from an observation made after this."""
        now = self._at(now)
        if self._teleoperated:
            self._teleoperated = False
            self._held_since = self._handed_back_at = now
            self._watch.begin()
            self._new_epoch()

    # --- the policy ---------------------------------------------------------------------------------------------------

    def request_due(self, now: float) -> ChunkRequest | None:
        """Return the request to send to the policy now, or None. Call it after observations, answers and ticks."""
        now = self._at(now)
        self._expire(now)
        if self.state not in (State.HOLDING, State.RUNNING) or not self._instruction or self._teleoperated:
            return None
        if self._watch.alarm is not None:
            return None
        next_tick = self._clock.next_tick
        remaining = self._queue.remaining(next_tick)
        if self._pauses and (remaining or not self._limiter.stops):
            return None
        if not self._prefetch.due(remaining, next_tick - self._observed_tick, now):
            return None
        if self._observations.stale(now) is not None:
            return None
        found = self._observations.synchronised()
        self._unasked = found if isinstance(found, str) else None
        if isinstance(found, str) or found.stamp < self._handed_back_at:
            return None
        if self._pauses and found.stamp < self._rests_at:
            return None
        tick = self._clock.tick_of(found.stamp)
        committed = self._committed(tick, next_tick - tick + self._prefetch.latency_ticks)
        self._requests += 1
        self._counts["requests"] += 1
        request = ChunkRequest(
            id=self._requests,
            epoch=self._epoch,
            observation=replace(self._observation(found), committed=None if committed is None else [committed]),
            stamp=found.stamp,
            tick=tick,
            asked_at=now,
            deadline=now + self.settings.deadline_s,
            delay_ticks=next_tick - tick + self._prefetch.latency_ticks,
        )
        self._prefetch.in_flight = request
        return request

    def _committed(self, tick: int, delay: int) -> Committed | None:
        """Return the plan from this tick on, of which `delay` actions pass until the answer; None without a plan."""
        plan_NA = self._queue.plan(tick)
        if not len(plan_NA):
            return None
        return Committed(plan_NA.astype(np.float32), min(delay, len(plan_NA), self.embodiment.chunk - 1))

    def deliver(self, chunk: ActionChunk, request: ChunkRequest, now: float) -> str | None:
        """Add the policy's answer, actions [1,K,A]. Return the reason if it is not used, else None."""
        now = self._at(now)
        self._expire(now)
        latency = self._prefetch.answered(request, now)
        if latency is None:
            return self._discard("unexpected_chunks", f"request {request.id} was answered or given up before")
        self.measurements.inference_ms.append(latency * 1e3)
        self._last_failure = None
        if request.epoch != self._epoch:
            return self._discard("old_epoch_chunks", f"asked in epoch {request.epoch}, now it is epoch {self._epoch}")
        actions, action_dim = chunk.actions, self.embodiment.action_dim
        if actions.ndim != 3 or len(actions) != 1 or actions.shape[2] != action_dim:
            return self._refuse("refused_chunks", f"expected actions [1,K,A={action_dim}], got {actions.shape}")
        if actions.dtype.kind != "f" or not (np.abs(actions) <= np.finfo(np.float32).max).all():  # told to the policy
            return self._refuse("refused_chunks", f"actions are NaN, infinite or not floating point ({actions.dtype})")
        actions_KA = actions[0].astype(np.float64)
        next_tick = self._clock.next_tick
        # while the arm rests, no action of the chunk has passed
        observed_tick = request.tick if self._moved_tick >= request.tick else max(request.tick, next_tick)
        if self._pauses:  # the arm has not moved since the observation, so no action of the chunk has passed
            actions_KA = actions_KA[: self.settings.execute_steps]
            self._queue.clear()
            self._queue.add(actions_KA, next_tick, next_tick)
            usable = len(actions_KA)
        else:
            usable = self._queue.add(actions_KA, observed_tick, next_tick)
        if not usable:
            return self._refuse("late_chunks", f"all {len(actions_KA)} ticks of the chunk have passed")
        self._counts["chunks"] += 1
        self._counts["late_actions"] += len(actions_KA) - usable
        self._observed_tick = observed_tick
        self._unsent_stamp = request.stamp
        return None

    def fail(self, request: ChunkRequest, reason: str, now: float) -> None:
        """Report that the policy client gave up a request. The loop asks again after `retry_s`."""
        now = self._at(now)
        if self._prefetch.failed(request, now):
            self._counts["failures"] += 1
        if request.id == self._requests:  # after the deadline, too: the client knows more about it than the clock
            self._last_failure = reason

    # --- the control tick ---------------------------------------------------------------------------------------------

    def tick(self, now: float) -> Command:
        """Return the command of this tick. Call it `control_hz` times a second; it never waits."""
        now = self._at(now)
        self._expire(now)
        due = self._clock.next_tick
        gap = self._clock.tick(skip=max(len(self._given_NA) - 1, 0))
        tick = self._clock.next_tick - 1
        if gap is not None and gap > self.settings.clock_gap_s:
            self._void()
        elif gap is not None:
            self.measurements.jitter_ms.append(abs(gap - self._period) * 1e3)
        if len(self._given_NA) > 1:  # else the controller rests
            now_due = 1 + tick - due
            self._limiter.passed(self._given_NA[1:now_due])
            self._given_NA = self._given_NA[min(now_due, len(self._given_NA) - 1) :]
        command = self._decide(tick, now)
        if self._ahead and command.action_A is not None:
            command = self._with_coming(command, command.action_A)
        if command.action_A is not None and (command.kind is not Kind.HOLD or not self._limiter.at_rest):
            self._moved_tick = tick
        self._counts[command.kind.value] += 1
        if command.kind is Kind.ACTION and command.action_A is not None:
            self._watch.sent(command.action_A)
        elif not (self._pauses and command.kind is Kind.HOLD and self._sent_epoch == self._epoch):
            self._watch.interrupt()  # an arm that rests between two chunks changes nothing
        return command

    def _with_coming(self, command: Command, action_A: np.ndarray) -> Command:
        """Return the command with those that follow it, unless the controller has all of them."""
        plan_NA = self._queue.plan(command.tick + 1) if command.kind is Kind.ACTION else self._given_NA[:0]
        given_NA = np.concatenate([action_A[None], self._limiter.ahead(plan_NA)])
        old_NA, self._given_NA = self._given_NA, given_NA
        if given_NA.shape == old_NA.shape and np.allclose(given_NA, old_NA, rtol=0, atol=1e-9):
            return command
        return replace(command, coming_NA=given_NA[1:])

    def _decide(self, tick: int, now: float) -> Command:
        state = self.state
        if state is State.IDLE or state is State.STOPPED:
            return Command(Kind.NONE, tick, None, self._watchdog.fault or "not active")
        stale = self._observations.stale(now)
        if stale is not None:
            if not self._stale:
                self._stale = True
                self._counts["stale"] += 1
                self._new_epoch()
            return self._hold(tick, now, stale)
        self._stale = False
        moving = state is State.RUNNING and self._sent_epoch == self._epoch
        if not self._instruction:
            return self._hold(tick, now, "no instruction")
        action_A = self._observations.teleop(now) if self._teleoperated else self._planned(tick, moving)
        if isinstance(action_A, str):
            return self._hold(tick, now, self._alarm or action_A)
        if not self._teleoperated:
            self._watch.before_action(self._seen)
            if (alarm := self._alarm) is not None:
                self._counts["alarms"] += 1
                self._new_epoch()
                return self._hold(tick, now, alarm)
        state_S = self._observations.newest_state
        assert state_S is not None, "no sensor is stale, so there is a state"
        try:
            if self._teleoperated and not moving and (far := self._limiter.rejects(action_A, state_S)):
                self._held_since = now  # the operator may take any time to bring the teleoperator to the arm's pose
                return self._hold(tick, now, f"teleop: past the {' and '.join(far)} limit; bring it to the arm's pose")
            sent_A = self._limiter.move(action_A, state_S)
        except LimitError as error:
            return self._stop(tick, str(error))
        for name in self._limiter.limited:
            self._counts[f"limited_{name}"] += 1
        self._watchdog.on(Event.COMMAND)
        self._sent_epoch = self._epoch
        self._rests_at = now + self._period
        if self._unsent_stamp is not None:
            self.measurements.loop_ms.append((now - self._unsent_stamp) * 1e3)
            self._unsent_stamp = None
        return Command(Kind.TELEOP if self._teleoperated else Kind.ACTION, tick, sent_A)

    def _planned(self, tick: int, moving: bool) -> np.ndarray | str:
        """Return the policy's action [A] of this tick, or the reason why there is none."""
        action_A = self._queue.get(tick)
        if action_A is not None:
            return action_A
        if moving and not self._pauses:
            self._counts["starvations"] += 1
        waiting = "waiting for the policy" if self._pauses else "no action for this tick"
        return waiting if self._trouble is None else f"{waiting}: {self._trouble}"

    @property
    def _trouble(self) -> str | None:
        return self._unasked or self._last_failure

    @property
    def _alarm(self) -> str | None:
        """The monitor's alarm, while the policy drives."""
        return None if self._teleoperated else self._watch.alarm

    def _seen(self) -> Observation | None:
        """Return what the policy would be shown now, or None if the samples do not belong together."""
        found = self._observations.synchronised()
        return None if isinstance(found, str) else self._observation(found)

    def _observation(self, found: Synchronised) -> Observation:
        return Observation(
            images={name: image_HW3[None] for name, image_HW3 in found.images.items()},
            state=found.state_S[None].astype(np.float32),
            instruction=[self._instruction],
        )

    def _hold(self, tick: int, now: float, reason: str) -> Command:
        if self.state is State.RUNNING or not self._instruction:
            self._held_since = now
        self._watchdog.on(Event.HOLD)
        self._hold_reason = reason
        sent_A = self._limiter.hold(self._observations.newest_state)
        if sent_A is None:  # the loop has not moved the arm yet: nothing to hold, and the time limit does not start
            self._held_since = now
            return Command(Kind.NONE, tick, None, reason)
        if not self._limiter.at_rest:
            self._rests_at = now + self._period
        if now - self._held_since > self.settings.hold_limit_s:
            return self._stop(tick, f"held for more than {self.settings.hold_limit_s:g} s: {reason}")
        return Command(Kind.HOLD, tick, sent_A, reason)

    def _stop(self, tick: int, fault: str) -> Command:
        self._watchdog.on(Event.FAULT, fault)
        self._counts["faults"] += 1
        self._teleoperated = False
        self._new_epoch()
        return Command(Kind.NONE, tick, None, fault)

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._watchdog.state

    @property
    def fault(self) -> str | None:
        """Reason why the loop stopped, or None."""
        return self._watchdog.fault

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def teleoperated(self) -> bool:
        """True while the operator drives."""
        return self._teleoperated

    @property
    def instruction(self) -> str:
        return self._instruction

    @property
    def newest_images(self) -> dict[str, np.ndarray]:
        """Newest image of each camera that has sent one, uint8 [H,W,3]."""
        return self._observations.newest_images

    @property
    def newest_state(self) -> np.ndarray | None:
        """Newest joint state [S], or None."""
        return self._observations.newest_state

    def diagnostics(self, now: float) -> dict[str, Any]:
        """Return the state of the loop, sensor ages, counters and latency percentiles as plain values."""
        return {
            "state": self.state.value,
            "fault": self.fault,
            "estop": self._watchdog.estop,
            "epoch": self._epoch,
            "tick": self._clock.next_tick,
            "instruction": self._instruction,
            "teleoperated": self._teleoperated,
            "remaining": self._queue.remaining(self._clock.next_tick),
            "in_flight": self._prefetch.in_flight is not None,
            "last_failure": self._trouble,
            "p95_latency_ms": self._prefetch.latency.p95 * 1e3,
            "ages_s": self._observations.ages(now),
            "stale": self._observations.stale(now),
            "alarm": self._watch.alarm,
            "holds": self._hold_reason if self.state is State.HOLDING else None,
            "refusals": dict(self._observations.refusals),
            "last_refusal": dict(self._observations.last_refusal),
            **self.measurements.summary(RECENT),
        }

    @property
    def _pauses(self) -> bool:
        return self.settings.ask == "after"

    def _at(self, now: float) -> float:
        """Tell the clock the time of a call and return the loop's time, which never goes back except after a jump."""
        if self._clock.tell(now):
            self._void()
        return self._clock.now

    def _void(self) -> None:
        """Forget samples, requests and plan after a jump of the clock, because their ages are unknown."""
        self._counts["clock_jumps"] += 1
        self._held_since = self._clock.now
        self._rests_at = self._handed_back_at = -math.inf
        self._observations.clear()
        self._prefetch.forget()
        self._limiter.halt()
        self._new_epoch()

    def _new_epoch(self) -> None:
        self._epoch += 1
        self._counts["epochs"] += 1
        self._queue.clear()
        self._unsent_stamp = self._unasked = None

    def _refuse(self, count: str, reason: str) -> str:
        """Discard an answer of this epoch, and keep the reason for those who wonder why the arm holds."""
        self._last_failure = reason
        return self._discard(count, reason)

    def _discard(self, count: str, reason: str) -> str:
        self._counts[count] += 1
        return reason

    def _expire(self, now: float) -> None:
        if self._prefetch.expire(now):
            self._counts["deadline_misses"] += 1
            self._last_failure = f"no answer within {self.settings.deadline_s:g} s"
