"""Bridge between a robot and a policy server: run a `ControlLoop` in real time, for any kind of robot.

    front end (ROS 2, lerobot, ...)                   Bridge                                  policy server
      any thread:   observe_image, observe_state --> +------------------+ -- infer --> thread "policy client"
                    instruct, estop, reset, activate | ControlLoop      | <-- answer --
      send, show    <------------------------------- | under one lock   |
                                                     +------------------+ <-- thread "control ticks", control_hz

A robot is a `FrontEnd`: it hands over its sensors' samples and sends the commands. It knows nothing about policies,
chunks or time. `run_trials`, recorders and displays observe the bridge through `on_tick`.

The bridge sends under the lock, so it sends nothing after `estop` has returned. For this reason a front end's `send`
must be quick and must not wait for the robot.

Shape legend: A action dimension, N coming ticks, S state dimension, H, W image size.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from cogvla.policy.interface import ActionChunk, Embodiment, Observation
from cogvla.real_robot.control.camera_watch import EpisodeMonitor
from cogvla.real_robot.control.control_loop import ChunkRequest, Command, ControlLoop, State
from cogvla.real_robot.control.measurements import Measurements
from cogvla.real_robot.control.settings import LoopSettings, RobotConfig
from cogvla.real_robot.serving.async_client import Answer, UnavailableError
from cogvla.real_robot.serving.client import EventLoopThread

_log = logging.getLogger(__name__)


class FrontEnd(Protocol):
    """Interface of a robot: its sensors, its controller and its operator's buttons."""

    def start(self, bridge: Bridge) -> None:
        """Start to call the bridge with every sample and every button, from any thread."""
        ...

    @property
    def ahead(self) -> bool:
        """True if the controller gets all commands that are known, and executes them by itself."""
        ...

    def send(self, action_A: np.ndarray, coming_NA: np.ndarray | None, dry_run: bool) -> None:
        """Send a command [A] to the controller; in a dry run only show it.

        The bridge calls this under its lock, so it must be quick. With `ahead`, `coming_NA` are the commands of the
        following ticks until the arm rests; None if they are those of the last call.
        """
        ...

    def stop(self, dry_run: bool) -> None:
        """End the motion of a controller that goes on without commands. The bridge calls this under its lock."""
        ...

    def show(self, diagnostics: Mapping[str, Any]) -> None:
        """Publish the values of `Bridge.diagnostics`."""
        ...

    def close(self) -> None:
        """Stop calling the bridge, and leave the robot as it is."""
        ...


class AsksPolicy(Protocol):
    """Interface of a policy client: `ReconnectingClient`, `LocalPolicy` or a stand-in of a test."""

    async def infer(
        self,
        observation: Observation,
        *,
        timeout_s: float | None = None,
        observation_id: int | None = None,
        episode_id: int | None = None,
    ) -> Answer: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class BridgeSettings:
    """Settings of a bridge.

    Attributes:
        dry_run: compute, check and show commands, but never send them.
        activate: activate the loop at the start, without a call of `Bridge.activate`.
        diagnostics_s: seconds between two diagnostics.
    """

    dry_run: bool = True
    activate: bool = False
    diagnostics_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0.01 <= self.diagnostics_s <= 3600:
            raise ValueError(f"diagnostics_s must be 0.01 to 3600 seconds, got {self.diagnostics_s}")


@dataclass(frozen=True, eq=False)
class Tick:
    """Record of one control tick, for recorders and displays.

    Attributes:
        command: command of the tick.
        images: camera -> newest image, uint8 [H,W,3].
        state_S: newest joint state [S], or None.
        instruction: current instruction.
        now: time of the tick, in seconds on the bridge's clock.
    """

    command: Command
    images: dict[str, np.ndarray]
    state_S: np.ndarray | None
    instruction: str
    now: float


class Bridge:
    """Real-time driver of one robot. Use it as a context manager, or call `start` and `close`.

    Args:
        robot: safety limits and settings of the control loop.
        embodiment: embodiment of the policy, but with the image sizes that the robot's cameras send.
        client: client that asks the policy.
        front_end: the robot.
        settings: settings of the bridge; None for the defaults, which are a dry run.
        on_tick: callback with every tick; it runs in the control thread, so it must be quick.
        clock: monotonic clock in seconds; the stamps of `observe_*` are times of this clock.
        monitor: watches the cameras, see `ControlLoop`; it runs in the control thread.
    """

    def __init__(
        self,
        robot: RobotConfig,
        embodiment: Embodiment,
        client: AsksPolicy,
        front_end: FrontEnd,
        settings: BridgeSettings | None = None,
        on_tick: Callable[[Tick], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        monitor: EpisodeMonitor | None = None,
    ) -> None:
        self.settings = settings or BridgeSettings()
        self.now = clock
        self.embodiment = embodiment
        # in a dry run the arm does not follow the commands, which must not count as a fault
        limits = replace(robot.limits, lead=None) if self.settings.dry_run else robot.limits
        self._loop = ControlLoop(embodiment, limits, robot.loop, front_end.ahead, monitor)
        self._driving = False
        self._client, self._front_end, self._on_tick = client, front_end, on_tick
        self._lock = threading.RLock()
        self._stop, self._closed = threading.Event(), threading.Event()
        self._ended: Future[None] = Future()
        self._failure: BaseException | None = None
        self._asking: asyncio.Lock | None = None
        self._policy_thread: EventLoopThread | None = None
        self._tick_thread = threading.Thread(target=self._run, name="control ticks", daemon=True)

    # --- start and end ------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the threads and the front end."""
        self._policy_thread = EventLoopThread()
        self._front_end.start(self)
        if self.settings.activate:
            self.activate()
        self._submit(self._show_diagnostics())
        self._tick_thread.start()
        return self

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the bridge. Return False after the timeout; raise the error that ended it."""
        if not wait([self._ended], timeout_s).done:
            return False
        self._ended.result()  # outside of the wait: what ended the bridge may be a TimeoutError, too
        return True

    def close(self) -> None:
        """Stop sending commands, and end threads, front end and client."""
        self._stop.set()
        self._closed.set()
        with self._lock:
            self._loop.deactivate()
            self._stop_driving()
        if self._tick_thread.is_alive():
            self._tick_thread.join()
        self._front_end.close()
        if self._policy_thread is not None:
            self._policy_thread.run(self._close_client())
            self._policy_thread.close()
            self._policy_thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- calls of the front end, from any thread ----------------------------------------------------------------------

    def observe_image(self, camera: str, image_HW3: np.ndarray, stamp: float) -> str | None:
        """Add an image, uint8 [H,W,3] RGB, upright, taken at `stamp` on the bridge's clock (seconds).

        Return the reason if it is refused, else None. The bridge keeps the array: do not write into it afterwards.
        """
        with self._lock:
            refusal = self._loop.observe_image(camera, image_HW3, stamp, self.now())
            self._ask_if_due()
        return refusal

    def observe_state(self, state_S: np.ndarray, stamp: float) -> str | None:
        """Add a joint state [S] in physical units. Return the reason if it is refused, else None."""
        with self._lock:
            refusal = self._loop.observe_state(state_S, stamp, self.now())
            self._ask_if_due()
        return refusal

    def observe_teleop(self, action_A: np.ndarray, stamp: float) -> str | None:
        """Add an action [A] of the teleoperator. Return the reason if it is refused, else None."""
        with self._lock:
            return self._loop.observe_teleop(action_A, stamp, self.now())

    def refuse(self, sensor: str, kind: str, reason: str) -> None:
        """Count a sample that could not be read; `sensor` is a camera, "state" or "teleop"."""
        with self._lock:
            self._loop.refuse(sensor, kind, reason)

    def fail(self, error: BaseException) -> None:
        """Report that the robot or a thread of the bridge is lost.

        The bridge is stopped for good: it sends nothing more, refuses `activate` and `reset`, and goes on to show the
        reason. `wait` raises the error.
        """
        with self._lock:
            if self._failure is None:
                self._failure = error
                self._loop.stop(f"the bridge has failed: {type(error).__name__}: {error}")
                self._stop.set()
                try:
                    self._stop_driving()
                except Exception:  # what has failed may be the way to the robot
                    _log.exception("the robot could not be stopped")

    def instruct(self, text: str) -> None:
        """Set the instruction; empty text holds the arm."""
        with self._lock:
            self._loop.set_instruction(text)

    def activate(self, active: bool = True) -> tuple[bool, str]:
        """Activate the loop, or deactivate it without a fault.

        Returns:
            True if it worked, and the new state as text; or False, and the reason.
        """
        with self._lock:
            if not active:
                self._loop.deactivate()
                self._stop_driving()
                return True, self._loop.state.value
            if self._loop.activate():
                return True, "dry run: commands are not sent" if self.settings.dry_run else self._loop.state.value
            return False, self._stopped()

    def estop(self, engaged: bool) -> tuple[bool, str]:
        """Engage or release the emergency stop; returns like `activate`.

        It ends the motion (`FrontEnd.stop`), and sends nothing after this has returned, until the stop is released,
        reset and activated again.
        """
        with self._lock:
            self._loop.estop(engaged)
            self._stop_driving()
            return True, "engaged" if engaged else f"released; {self._loop.state.value}, reset to go on"

    def reset(self) -> tuple[bool, str]:
        """Clear a fault, after which the loop is idle; returns like `activate`."""
        with self._lock:
            if self._failure is not None:
                return False, f"{self._loop.fault}; start it again"
            done = self._loop.reset()
            self._stop_driving()
        return done, "idle; activate to go on" if done else "the emergency stop is engaged"

    def take_over(self, active: bool = True) -> tuple[bool, str]:
        """Let the operator drive with the teleoperator, or hand back to the policy; returns like `activate`."""
        with self._lock:
            if not active:
                self._loop.hand_back(self.now())
                self._ask_if_due()
                return True, "the policy drives"
            if self._loop.take_over(self.now()):
                return True, "the operator drives"
            return False, self._stopped()

    # --- state, from any thread ---------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._loop.state

    @property
    def teleoperated(self) -> bool:
        """True while the operator drives."""
        return self._loop.teleoperated

    @property
    def instruction(self) -> str:
        """Instruction that the policy follows; empty: the arm holds."""
        return self._loop.instruction

    @property
    def loop_settings(self) -> LoopSettings:
        return self._loop.settings

    @property
    def failure(self) -> BaseException | None:
        """Error that stopped the bridge for good, see `fail`; None while it works."""
        return self._failure

    @property
    def fault(self) -> str | None:
        """Reason why the loop stopped, or None."""
        return self._loop.fault

    @property
    def measurements(self) -> Measurements:
        """Counters and latency samples of the whole run; the control thread goes on adding to them."""
        return self._loop.measurements

    def diagnostics(self) -> dict[str, Any]:
        """Return the state for an operator as plain values, see `ControlLoop.diagnostics`."""
        with self._lock:
            return {"dry_run": self.settings.dry_run, **self._loop.diagnostics(self.now())}

    def _stop_driving(self) -> None:
        """End the motion if the loop sends no more commands. Call it under the lock."""
        if self._driving and self._loop.state in (State.IDLE, State.STOPPED):
            self._driving = False
            self._front_end.stop(self.settings.dry_run)

    def _stopped(self) -> str:
        what_to_do = "reset first" if self._failure is None else "start it again"
        return f"stopped: {self._loop.fault}; {what_to_do}"

    # --- threads ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._tick_until_stopped()
        except BaseException as error:  # `wait` raises it
            self.fail(error)
        if self._failure is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(self._failure)

    def _tick_until_stopped(self) -> None:
        """Tick at absolute times: a late tick does not delay the following ones, and missed ticks are skipped."""
        period = 1.0 / self.embodiment.control_hz
        due = self.now() + period
        while not self._stop.wait(max(due - self.now(), 0.0)):
            now = self.now()
            missed = int((now - due) / period)
            due += (missed + 1) * period
            with self._lock:
                if missed:
                    self._loop.measurements.counts["late_ticks"] += 1
                command = self._loop.tick(now)
                if command.action_A is not None:
                    if self.settings.dry_run:
                        self._loop.measurements.counts["dry_run"] += 1
                    self._driving = True
                    self._front_end.send(command.action_A, command.coming_NA, self.settings.dry_run)
                self._stop_driving()
                self._ask_if_due()
                seen = Tick(command, self._loop.newest_images, self._loop.newest_state, self._loop.instruction, now)
            if self._on_tick is not None:
                self._on_tick(seen)

    def _ask_if_due(self) -> None:
        """Send a request to the policy if one is due. Call it under the lock."""
        if self._policy_thread is None or self._stop.is_set():
            return
        request = self._loop.request_due(self.now())
        if request is not None:
            self._submit(self._ask(request))

    def _submit(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._policy_thread is not None, "the bridge has started"
        self._policy_thread.submit(work).add_done_callback(self._check)

    def _check(self, done: Future[None]) -> None:
        """End the bridge with an error of the policy thread; `wait` raises it."""
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self.fail(error)

    async def _ask(self, request: ChunkRequest) -> None:
        self._asking = self._asking or asyncio.Lock()
        async with self._asking:  # one at a time: a request that the loop gave up may still wait for its deadline
            left_s = request.deadline - self.now()
            try:
                answer = await self._client.infer(
                    request.observation,
                    timeout_s=max(left_s, 1e-3),
                    observation_id=request.id,
                    episode_id=request.epoch,
                )
            except (UnavailableError, ValueError) as error:
                with self._lock:
                    self._loop.fail(request, str(error), self.now())
                return
        with self._lock:
            self._loop.deliver(ActionChunk(answer.actions[None], answer.timing), request, self.now())
            self._ask_if_due()

    async def _show_diagnostics(self) -> None:
        while not self._closed.is_set():
            self._front_end.show(self.diagnostics())
            await asyncio.sleep(self.settings.diagnostics_s)

    async def _close_client(self) -> None:
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()
