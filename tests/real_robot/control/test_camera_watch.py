"""The loop holds on an alarm of a monitor and says why, until the operator acts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from cogvla.policy.interface import Observation
from cogvla.real_robot.control.camera_watch import ARM
from cogvla.real_robot.control.control_loop import ControlLoop, Kind, State
from cogvla.real_robot.control.settings import LoopSettings
from cogvla.tests.support.control_robot import DELTA, ROBOT, Driver, constant


class Listed:
    """A monitor with a horizon of 3 that notes what it is told, and alarms once it has compared `good` times."""

    horizon = 3

    def __init__(self, good: int) -> None:
        self.good, self.windows, self.sent, self.said = good, 0, 0, ""
        self.executions: list[float] = []

    def begin(self, slots: Sequence[Hashable]) -> None:
        self.said, self.sent = "", 0

    def interrupt(self, slot: Hashable) -> None:
        self.sent = 0

    def look(self, slots: Sequence[Hashable], observation: Observation) -> None:
        assert list(slots) == [ARM]
        observation.validate(ROBOT)
        assert self.sent in (0, self.horizon)
        self.windows += self.sent == self.horizon
        self.said = "monitor: wrist: it stands still" if self.windows > self.good else ""
        self.sent = 0

    def executed(self, slots: Sequence[Hashable], actions_BTA: np.ndarray) -> None:
        assert actions_BTA.shape == (1, 1, ROBOT.action_dim)
        self.sent += 1
        self.executions.append(float(actions_BTA[0, 0, 0]))

    def alarm(self, slot: Hashable) -> str | None:
        return self.said or None


def driver(monitor: Listed, **settings: float | str) -> Driver:
    found = Driver(LoopSettings(**settings))  # type: ignore[arg-type]
    found.loop = ControlLoop(ROBOT, DELTA, found.settings, monitor=monitor)
    return found.start()


def drive(robot: Driver, ticks: int) -> None:
    for _ in range(ticks):
        robot.observe()
        request = robot.loop.request_due(robot.now)
        if request is not None:
            robot.loop.deliver(constant(0.1), request, robot.now)
        robot.tick()


def test_an_alarm_holds_says_why_and_stays_until_the_operator_acts() -> None:
    monitor = Listed(good=1)
    robot = driver(monitor)
    drive(robot, 6)
    assert [command.kind for command in robot.sent] == [Kind.ACTION] * 6
    np.testing.assert_allclose(monitor.executions, [c.action_A[0] for c in robot.sent if c.action_A is not None])
    drive(robot, 4)
    assert {command.kind for command in robot.sent[6:]} == {Kind.HOLD}
    assert {command.reason for command in robot.sent[6:]} == {"monitor: wrist: it stands still"}
    seen = robot.loop.diagnostics(robot.now)
    assert seen["holds"] == seen["alarm"] == "monitor: wrist: it stands still"
    assert robot.loop.measurements.counts["alarms"] == 1
    assert robot.loop.request_due(robot.now) is None, "the policy is not asked meanwhile"
    monitor.good = 100
    robot.loop.set_instruction("place")
    drive(robot, 2)
    assert robot.sent[-1].kind is Kind.ACTION


def test_a_long_alarm_is_a_fault_that_names_it() -> None:
    robot = driver(Listed(good=0), hold_limit_s=0.3)
    drive(robot, 14)
    assert robot.loop.state is State.STOPPED
    assert robot.loop.fault == "held for more than 0.3 s: monitor: wrist: it stands still"
    assert robot.loop.reset()
    assert robot.loop.diagnostics(robot.now)["alarm"] is None


def test_the_operator_drives_in_spite_of_an_alarm() -> None:
    robot = driver(Listed(good=0))
    drive(robot, 5)
    assert robot.sent[-1].kind is Kind.HOLD
    assert robot.loop.take_over(robot.now)
    robot.loop.observe_teleop(np.zeros(ROBOT.action_dim), robot.now, robot.now)
    assert robot.tick().kind is Kind.TELEOP
    robot.loop.hand_back(robot.now)
    assert robot.loop.diagnostics(robot.now)["alarm"] is None


def test_a_rest_between_two_chunks_is_no_interruption() -> None:
    monitor = Listed(good=0)
    robot = driver(monitor, ask="after", execute_steps=2)
    for _ in range(12):
        robot.observe()
        request = robot.loop.request_due(robot.now)
        robot.tick()
        if request is not None:  # the answer takes a tick, in which the arm rests
            robot.loop.deliver(constant(0.1), request, robot.now)
    kinds = [command.kind for command in robot.sent if command.kind is not Kind.NONE]
    assert kinds[:4] == [Kind.ACTION, Kind.ACTION, Kind.HOLD, Kind.ACTION]
    assert Kind.ACTION not in kinds[4:]
    assert robot.sent[-1].reason == "monitor: wrist: it stands still", "after three actions, the horizon"


def test_a_hold_interrupts_what_is_compared() -> None:
    monitor = Listed(good=100)
    robot = driver(monitor)
    drive(robot, 2)
    robot.loop.set_instruction("")
    robot.tick()
    robot.loop.set_instruction("pick")
    drive(robot, 3)
    assert monitor.windows == 0
    drive(robot, 1)
    assert monitor.windows == 1
