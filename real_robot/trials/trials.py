"""Play evaluation episodes on a robot that a `Bridge` drives; each gives an `EpisodeResult` like a simulated rollout.

    hold -> set up the scene -> look -> instruct, activate -> ... -> over, or a fault -> hold

A `TrialScene` sets up the episode and judges it: `SimulatedScene` for the simulated robot, over its topics;
`operator_scene.OperatorScene` for a real robot.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import count, islice
from typing import Any, Protocol

from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.real_robot.bridge.bridge import Bridge
from cogvla.real_robot.control.control_loop import State
from cogvla.real_robot.ros.node import STRING, Delivery, RosNode
from cogvla.real_robot.simulated.simulated_arm import SceneStart, SceneStatus

POLL_S = 0.01
STOPPED = "stopped: "
"""Prefix of an episode's error if a fault of the control loop ended it."""


class EpisodeAbortedError(RuntimeError):
    """The judge discarded the episode, so it must not count for or against the policy."""


class TrialScene(Protocol):
    """Interface of a scene: it sets up episodes and judges them."""

    def set_up(self, spec: EpisodeSpec) -> SceneStatus:
        """Bring scene and arm to their start, and return the status with the instruction; TimeoutError if it fails."""
        ...

    def status(self) -> SceneStatus:
        """Return the progress of the episode; `steps` is 0 if the scene does not count them.

        Raises:
            EpisodeAbortedError: the episode must not count.
        """
        ...


class SimulatedScene:
    """Scene of a simulated robot (`sim_robot`), controlled over its topics.

    Args:
        node: any node on the robot's network.
        robot: name of the robot's node.
        timeout_s: longest time to set up a scene, in seconds.
    """

    def __init__(self, node: RosNode, robot: str = "/sim_robot", timeout_s: float = 30.0) -> None:
        self._timeout_s = timeout_s
        # A robot that goes on shows the last scene of the session before: its number must not come again.
        self._numbers = count(time.time_ns())
        self._condition = threading.Condition()
        self._status = SceneStatus(0, "")
        self._ask = node.advertise(f"{robot}/scene", STRING, Delivery.EVENTS)
        node.subscribe(f"{robot}/status", STRING, Delivery.LATCHED, self._hear)

    def _hear(self, message: Any) -> None:
        with self._condition:
            self._status = SceneStatus(**json.loads(message.data))
            self._condition.notify()

    def set_up(self, spec: EpisodeSpec) -> SceneStatus:
        """Ask the robot for a scene and wait for it; TimeoutError after `timeout_s`."""
        assert spec.asked != "swap", "the caller must replace swap by a task"
        start = SceneStart(next(self._numbers), spec.task, spec.initial_state, spec.seed, spec.asked)
        last = time.monotonic() + self._timeout_s
        with self._condition:
            while self._status.number != start.number:
                if time.monotonic() > last:
                    raise TimeoutError(f"the simulated robot did not set up {spec} within {self._timeout_s:g} s")
                self._ask({"data": json.dumps(asdict(start))})  # again, if it was not listening yet
                self._condition.wait(1.0)
            return self._status

    def status(self) -> SceneStatus:
        """Return the last status that the robot sent."""
        with self._condition:
            return self._status


def play(
    bridge: Bridge,
    scene: TrialScene,
    spec: EpisodeSpec,
    timeout_s: float,
    on_start: Callable[[SceneStatus], None] = lambda _: None,
) -> EpisodeResult:
    """Play one episode. A fault of the bridge, or no end within `timeout_s`, is an error and not a failure.

    The loop is deactivated at the end, also after an exception.

    Args:
        bridge: bridge of the robot, started.
        scene: sets up and judges the episode.
        spec: task, initial state and seed.
        timeout_s: limit in seconds, first for new samples of all sensors, then for the episode.
        on_start: callback with the status of the scene, just before the arm moves.

    Raises:
        BaseException: the error that ended the bridge.
    """
    bridge.activate(False)
    bridge.instruct("")
    bridge.reset()
    started = time.monotonic()
    try:
        status = scene.set_up(spec)
    except TimeoutError as late:
        bridge.wait(0)
        wall_s = time.monotonic() - started
        return EpisodeResult(spec.task, spec.initial_state, spec.seed, error=str(late), wall_s=wall_s)
    on_start(status)
    began = bridge.now()
    measured = bridge.measurements
    before = len(measured.loop_ms), len(measured.inference_ms), _commands(bridge)
    error = _look(bridge, began, timeout_s)
    reset_s = time.monotonic() - started
    if error is None:
        bridge.instruct(status.instruction)
        bridge.activate()
        try:
            status, error = _follow(bridge, scene, status, timeout_s)
        finally:
            bridge.activate(False)
        if error is None and not status.success and _commands(bridge) == before[2]:
            error = f"the robot was never commanded: {bridge.diagnostics()['last_failure'] or 'no answer'}"
    inference_ms = tuple(islice(measured.inference_ms, before[1], None))
    return EpisodeResult(
        task=spec.task,
        initial_state=spec.initial_state,
        seed=spec.seed,
        asked=spec.asked if isinstance(spec.asked, int) else None,
        instruction=status.instruction,
        success=status.success and error is None,
        scene_task_success=None if spec.asked is None else status.scene_task_success,
        steps=status.steps or _commands(bridge) - before[2],
        reward=float(status.success),
        error=error,
        reset_s=reset_s,
        wall_s=time.monotonic() - started,
        inference_ms=inference_ms,
        loop_ms=tuple(islice(measured.loop_ms, before[0], None)),
        batch=(1,) * len(inference_ms),
    )


def _follow(bridge: Bridge, scene: TrialScene, status: SceneStatus, timeout_s: float) -> tuple[SceneStatus, str | None]:
    """Wait until the scene is over. Return its status, and the error that ended the episode or None.

    Where somebody else, such as a topic, ends the motion or gives another instruction, it is no trial of the policy.
    """
    last, instruction = time.monotonic() + timeout_s, status.instruction.strip()
    try:
        while not (status := scene.status()).over:
            if bridge.state is State.STOPPED:
                return status, f"{STOPPED}{bridge.fault}"
            if bridge.state is State.IDLE:
                return status, "deactivated or reset during the trial"
            if bridge.instruction != instruction:
                return status, f"the instruction was changed to {bridge.instruction!r} during the trial"
            if time.monotonic() > last:
                reason = bridge.diagnostics()["stale"] or bridge.state.value
                return status, f"not over within {timeout_s:g} s: {reason}"
            if bridge.wait(POLL_S):
                return status, "the bridge has ended"
    except EpisodeAbortedError as error:
        return status, str(error)
    return status, None


def _commands(bridge: Bridge) -> int:
    counts = bridge.measurements.counts
    return counts["action"] + counts["hold"]


def _look(bridge: Bridge, began: float, timeout_s: float) -> str | None:
    """Wait until every sensor has sent a sample of the new scene. Return an error after the timeout, else None."""
    while not bridge.wait(POLL_S):
        ages: dict[str, float | None] = bridge.diagnostics()["ages_s"]
        since = bridge.now() - began
        blind = [name for name, age in ages.items() if age is None or age > since - 0.05]
        if not blind:
            return None
        if since > timeout_s:
            return f"no new {', '.join(blind)} within {timeout_s:g} s"
    return "the bridge has ended"
