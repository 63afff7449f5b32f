"""The bridge in real time, with a robot and a policy server made of Python: who may send what, and when."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from cogvla.policy.interface import Embodiment, Observation
from cogvla.real_robot.bridge.bridge import Bridge, BridgeSettings, Tick
from cogvla.real_robot.control.control_loop import Kind, State
from cogvla.real_robot.control.measurements import latency_table
from cogvla.real_robot.control.settings import LoopSettings, RobotConfig
from cogvla.real_robot.serving.async_client import Answer, UnavailableError
from cogvla.tests.support.control_robot import ABSOLUTE, DELTA, ROBOT, image
from cogvla.tests.support.waiting import until, wait_ticks

TOLERANT = LoopSettings(image_age_s=1.0, state_age_s=1.0, sync_tolerance_s=0.5, hold_limit_s=30.0, clock_gap_s=5.0)


@dataclass
class Client:
    """Answers at once with small actions, or raises."""

    error: Exception | None = None
    asked: int = 0
    closed: bool = False

    async def infer(
        self,
        observation: Observation,
        *,
        timeout_s: float | None = None,
        observation_id: int | None = None,
        episode_id: int | None = None,
    ) -> Answer:
        self.asked += 1
        await asyncio.sleep(0.001)
        if self.error is not None:
            raise self.error
        now = time.monotonic()
        return Answer(np.full((ROBOT.chunk, ROBOT.action_dim), 0.1, np.float32), now, now, observation_id or 0, {})

    async def close(self) -> None:
        self.closed = True


@dataclass
class Front:
    """A robot whose sensors speak a hundred times a second."""

    sent: list[tuple[float, np.ndarray, bool]] = field(default_factory=list)
    shown: list[Mapping[str, Any]] = field(default_factory=list)
    error: Exception | None = None
    closed: bool = False
    bridge: Bridge | None = None
    ahead: bool = False
    stops: int = 0

    def start(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._stop = threading.Event()
        threading.Thread(target=self._sense, daemon=True).start()

    def _sense(self) -> None:
        assert self.bridge is not None
        while not self._stop.wait(0.01):
            now = self.bridge.now()
            for camera in ROBOT.camera_names:
                self.bridge.observe_image(camera, image(camera), now)
            self.bridge.observe_state(np.zeros(3), now)

    def stop(self, dry_run: bool) -> None:
        self.stops += 1

    def send(self, action_A: np.ndarray, coming_NA: np.ndarray | None, dry_run: bool) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append((time.monotonic(), action_A, dry_run))

    def show(self, diagnostics: Mapping[str, Any]) -> None:
        self.shown.append(diagnostics)

    def close(self) -> None:
        self.closed = True
        self._stop.set()


@contextmanager
def running(
    client: Client | None = None,
    front: Front | None = None,
    limits: Any = DELTA,
    on_tick: Callable[[Tick], None] | None = None,
    embodiment: Embodiment = ROBOT,
    **settings: Any,
) -> Iterator[tuple[Bridge, Client, Front]]:
    client, front = client or Client(), front or Front()
    settings = {"dry_run": False, "activate": True, "diagnostics_s": 0.02} | settings
    robot = RobotConfig("two_joints", limits, TOLERANT)
    with Bridge(robot, embodiment, client, front, BridgeSettings(**settings), on_tick) as bridge:
        bridge.instruct("pick")
        yield bridge, client, front


def test_observations_become_commands() -> None:
    ticks: list[Tick] = []
    with running(on_tick=ticks.append) as (bridge, client, front):
        until(lambda: len(front.sent) > 20)
        until(lambda: front.shown and front.shown[-1]["state"] == "running")
        assert bridge.state is State.RUNNING
        assert all(not dry and np.isfinite(action_A).all() for _, action_A, dry in front.sent)
        assert client.asked > 1
    assert front.closed
    assert client.closed
    acted = [tick for tick in ticks if tick.command.kind is Kind.ACTION]
    assert len(acted) == len([1 for tick in ticks if tick.command.action_A is not None])
    assert set(acted[-1].images) == set(ROBOT.camera_names)
    assert acted[-1].instruction == "pick"
    table = latency_table(bridge.measurements, 20)
    assert table.splitlines()[1].startswith("observation to command")
    assert f"action {len(acted)}  " in table


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ([0.03] * 6, [1, 2, 3, 4, 5, 6]),  # 0.6 of a period: no tick is delayed
        ([0, 0.12, 0, 0, 0, 0], [1, 2, 4.4, 5, 6, 7]),  # the third comes late, the fourth is not made up for
    ],
)
def test_ticks_keep_their_rate_although_those_who_watch_are_slow(busy: list[float], expected: list[float]) -> None:
    """Time passes only while the bridge waits and while its ticks are watched."""
    now = 100.0
    ticked: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal now
            assert timeout is not None
            now += timeout
            return len(ticked) == len(busy)

    def watch(tick: Tick) -> None:
        nonlocal now
        now += busy[len(ticked)]
        ticked.append(tick.now)

    robot = RobotConfig("two_joints", DELTA, TOLERANT)
    bridge = Bridge(robot, ROBOT, Client(), Front(), on_tick=watch, clock=lambda: now)
    bridge._stop = Stop()
    bridge._tick_until_stopped()
    np.testing.assert_allclose((np.array(ticked) - 100) * ROBOT.control_hz, expected, rtol=1e-9)
    late = [tick for tick in expected if tick % 1]
    assert bridge.measurements.counts["late_ticks"] == len(late)


def test_a_dry_run_sends_nothing_and_shows_everything() -> None:
    with running(dry_run=True, limits=replace(ABSOLUTE, lead=(0.01, 0.01))) as (bridge, _, front):
        until(lambda: len(front.sent) > 10)
        assert all(dry for _, _, dry in front.sent)
        assert bridge.activate() == (True, "dry run: commands are not sent")
        assert bridge.fault is None, "an arm that is not moved does not follow, and that is no fault"
    assert bridge.measurements.counts["dry_run"] == len(front.sent)


def test_nothing_is_sent_after_an_emergency_stop_has_returned() -> None:
    with running() as (bridge, _, front):
        for _ in range(5):
            until(lambda: bridge.state is State.RUNNING)
            bridge.estop(True)
            stopped = time.monotonic()
            wait_ticks(bridge)
            assert not [when for when, _, _ in front.sent if when > stopped]
            assert bridge.reset() == (False, "the emergency stop is engaged")
            bridge.estop(False)
            assert bridge.activate() == (False, "stopped: emergency stop; reset first")
            assert bridge.reset() == (True, "idle; activate to go on")
            bridge.activate()


def test_an_emergency_stop_at_any_of_a_thousand_moments_is_the_last_word() -> None:
    """At 500 Hz, so that the moments fall into every part of a tick: waiting, deciding, sending, asking, watching."""
    chance = random.Random(0)
    with running(embodiment=replace(ROBOT, control_hz=500.0)) as (bridge, _, front):
        for _ in range(1000):
            sent = len(front.sent)
            until(lambda sent=sent: len(front.sent) > sent)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.004))
            assert bridge.estop(True) == (True, "engaged")
            sent = len(front.sent)
            assert bridge.state is State.STOPPED
            time.sleep(0.005 * (chance.random() < 0.1))
            bridge.estop(False)
            assert len(front.sent) == sent
            assert bridge.reset()[0]
            assert bridge.activate()[0]


def test_it_starts_idle_unless_told_otherwise() -> None:
    assert BridgeSettings() == BridgeSettings(dry_run=True, activate=False)
    with running(activate=False) as (bridge, client, front):
        wait_ticks(bridge)
        assert bridge.state is State.IDLE
        assert not front.sent
        assert not client.asked
        bridge.activate()
        until(lambda: front.sent)
        bridge.activate(False)
        sent = len(front.sent)
        wait_ticks(bridge)
        assert len(front.sent) == sent


@pytest.mark.parametrize("error", [UnavailableError("away"), ValueError("another robot")])
def test_a_server_without_answers_is_asked_again_and_the_arm_left_alone(error: Exception) -> None:
    with running(Client(error)) as (bridge, client, front):
        until(lambda: client.asked > 3)
        assert not front.sent
        assert bridge.diagnostics()["last_failure"] == str(error)
        client.error = None
        until(lambda: front.sent)


@pytest.mark.parametrize("broken", ["send", "on_tick", "client"])
def test_what_breaks_a_thread_stops_the_bridge_for_good_and_is_shown(broken: str) -> None:
    """Without `wait`, as in a node of ROS 2: the state says what has happened, and nothing starts it again."""
    breaks = threading.Event()

    def watch(_: Tick) -> None:
        if breaks.is_set() and broken == "on_tick":
            raise OSError("the cable is out")

    with running(on_tick=watch) as (bridge, client, front):
        until(lambda: bridge.state is State.RUNNING)
        breaks.set()
        if broken == "send":
            front.error = OSError("the cable is out")
        elif broken == "client":
            client.error = OSError("the cable is out")
        until(lambda: bridge.failure is not None)
        sent, fault = len(front.sent), "the bridge has failed: OSError: the cable is out"
        assert bridge.activate() == (False, f"stopped: {fault}; start it again")
        assert bridge.reset() == (False, f"{fault}; start it again")
        assert bridge.estop(True) == (True, "engaged")
        bridge.estop(False)
        assert bridge.take_over()[0] is False
        shown = len(front.shown)
        until(lambda: len(front.shown) > shown + 1)
        assert (front.shown[-1]["state"], front.shown[-1]["fault"]) == ("stopped", fault)
        assert len(front.sent) == sent
        with pytest.raises(OSError, match="the cable is out"):
            bridge.wait(20)


def test_a_client_that_breaks_ends_the_bridge() -> None:
    with running(Client(ZeroDivisionError("a mistake"))) as (bridge, _, front):
        with pytest.raises(ZeroDivisionError, match="a mistake"):
            bridge.wait(20)
        assert not front.sent


def test_a_timeout_of_the_robot_ends_the_bridge_too() -> None:
    with running() as (bridge, _, _):
        bridge.fail(TimeoutError("no answer of the arm"))
        with pytest.raises(TimeoutError, match="no answer of the arm"):
            bridge.wait(20)


def test_wait_says_whether_the_bridge_has_ended() -> None:
    with running() as (bridge, _, _):
        assert bridge.wait(0.05) is False
    assert bridge.wait(1) is True


def test_bad_settings_are_refused() -> None:
    for seconds in (0, -1.0, 1e-9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"diagnostics_s must be 0\.01 to 3600 seconds"):
            BridgeSettings(diagnostics_s=seconds)
