"""The operator takes over from the policy and hands back: who drives, and that the same rules hold for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cogvla.real_robot.control.control_loop import Kind, State
from cogvla.real_robot.control.observations import TELEOP
from cogvla.real_robot.control.settings import LoopSettings, SafetyLimits
from cogvla.tests.support.control_robot import ABSOLUTE, PERIOD, Driver, constant

SETTINGS = LoopSettings(teleop_age_s=2.5 * PERIOD, hold_limit_s=0.5)
REJECTING = SafetyLimits(kind="absolute", state_index=(0, 1), step=(0.15, 0.15), velocity=(1.0, 1.0), reject=("step",))
"""0.05 in one tick; more than 0.15 is rejected."""


def driving(limits: SafetyLimits = ABSOLUTE, settings: LoopSettings = SETTINGS) -> Driver:
    """A loop that the policy has moved to 0.1, with more actions in its plan."""
    driver = Driver(settings, limits).start()
    driver.give(constant(0.1))
    for _ in range(3):
        assert driver.tick().kind is Kind.ACTION
    return driver


def same(action_A: np.ndarray | None, expected: list[float]) -> None:
    """Allow for the policy's float32."""
    assert action_A is not None
    np.testing.assert_allclose(action_A, np.array(expected), rtol=1e-6, atol=1e-9)


def teleoperate(driver: Driver, *action: float) -> str | None:
    return driver.loop.observe_teleop(np.array(action), driver.now, driver.now)


def test_take_over_drops_the_plan_and_hand_back_starts_from_a_fresh_observation() -> None:
    driver = driving()
    pending = driver.loop.request_due(driver.now + PERIOD)
    for _ in range(3):
        pending = pending or driver.loop.request_due(driver.now)
        driver.tick()
    assert pending is not None, "a request is on its way when the operator takes over"
    assert driver.loop.take_over(driver.now)
    assert driver.loop.diagnostics(driver.now)["remaining"] == 0
    assert "epoch" in str(driver.loop.deliver(constant(9.0), pending, driver.now))
    assert teleoperate(driver, 0.3, 0.5, 0.2) is None
    command = driver.tick()
    assert command.kind is Kind.TELEOP
    assert command.reason == ""
    same(command.action_A, [0.3, 0.5, 0.2])
    assert driver.loop.request_due(driver.now) is None, "the policy is not asked"
    driver.observe()
    driver.now += 0.01
    driver.loop.hand_back(driver.now)
    assert driver.loop.request_due(driver.now) is None, "the newest observation is older than the hand-back"
    command = driver.tick(observe=False)
    assert command.kind is Kind.HOLD
    same(command.action_A, [0.3, 0.5, 0.2])
    request = driver.give(constant(0.4))
    assert request.stamp > driver.now - PERIOD / 2
    assert request.observation.committed is None
    command = driver.tick()
    assert command.kind is Kind.ACTION
    same(command.action_A, [0.4] * 3)
    assert (driver.counts["teleop"], driver.counts["take_overs"]) == (1, 1)


@pytest.mark.parametrize("values", [(np.nan, 0, 0), (0.1, np.inf, 0), (0.1, 0.1), (), ((0.1, 0.1, 0.1),), ("a", 0, 0)])
def test_a_broken_action_is_refused_and_the_arm_holds_at_once(values: Any) -> None:
    driver = driving()
    driver.loop.take_over(driver.now)
    teleoperate(driver, 0.3, 0.5, 0.2)
    assert driver.tick().kind is Kind.TELEOP
    refusal = driver.loop.observe_teleop(np.array(values), driver.now, driver.now)
    assert refusal is not None
    assert refusal.startswith("teleop: ")
    command = driver.tick()
    assert (command.kind, command.reason) == (Kind.HOLD, refusal)
    same(command.action_A, [0.3, 0.5, 0.2])
    assert teleoperate(driver, 0.3, 0.5, 0.2) is None
    assert driver.tick().kind is Kind.TELEOP, "it recovers by itself"


@pytest.mark.parametrize("age", [-1.0, 1.0, np.nan])
def test_an_action_of_another_time_is_refused(age: float) -> None:
    driver = driving()
    assert driver.loop.observe_teleop(np.zeros(3), driver.now - age, driver.now) is not None
    driver.loop.take_over(driver.now)
    assert driver.tick().kind is Kind.HOLD


def test_silent_the_arm_holds_and_then_stops_until_the_operator_resets() -> None:
    driver = driving()
    driver.loop.take_over(driver.now)
    teleoperate(driver, 0.3, 0.5, 0.2)
    kinds = [driver.tick().kind for _ in range(16)]
    held = kinds.count(Kind.HOLD)
    assert kinds == [Kind.TELEOP] * 3 + [Kind.HOLD] * held + [Kind.NONE] * (13 - held)
    assert held in (10, 11), "0.5 s"
    assert driver.loop.state is State.STOPPED
    assert "teleop: 0." in str(driver.loop.fault)
    assert "held for more than 0.5 s" in str(driver.loop.fault)
    assert not driver.loop.take_over(driver.now), "a fault must be reset first"
    assert driver.loop.reset()
    assert driver.loop.activate()
    assert not driver.loop.teleoperated
    driver.give()
    assert driver.tick().kind is Kind.ACTION


def test_one_that_gives_nothing_holds_from_the_take_over_on() -> None:
    driver = driving()
    driver.loop.take_over(driver.now)
    command = driver.tick()
    assert (command.kind, command.reason) == (Kind.HOLD, "teleop: nothing received yet")
    driver.loop.refuse(TELEOP, "unreadable", "it is unplugged")
    assert driver.tick().reason == "teleop: it is unplugged"
    driver.loop.hand_back(driver.now)
    driver.give()
    assert driver.tick().kind is Kind.ACTION


@pytest.mark.parametrize("end", ["estop", "deactivate", "reset"])
def test_what_stops_the_policy_stops_the_operator(end: str) -> None:
    driver = driving()
    driver.loop.take_over(driver.now)
    teleoperate(driver, 0.3, 0.5, 0.2)
    assert driver.tick().kind is Kind.TELEOP
    getattr(driver.loop, end)()
    for _ in range(3):
        teleoperate(driver, 0.3, 0.5, 0.2)
        assert driver.tick().action_A is None
    assert not driver.loop.teleoperated
    driver.loop.estop(False)
    driver.loop.reset()
    driver.loop.activate()
    assert driver.tick().kind is Kind.NONE, "after a stop the operator has to take over anew"


def silence(driver: Driver) -> None:
    driver.now += 1.0
    driver.loop.tick(driver.now - PERIOD)


def no_instruction(driver: Driver) -> None:
    driver.loop.set_instruction("")


@pytest.mark.parametrize("change", [silence, no_instruction])
def test_what_holds_the_policy_holds_the_operator(change: Callable[[Driver], None]) -> None:
    driver = driving()
    driver.loop.take_over(driver.now)
    teleoperate(driver, 0.3, 0.5, 0.2)
    assert driver.tick().kind is Kind.TELEOP
    change(driver)
    teleoperate(driver, 0.9, 0.5, 0.9)
    command = driver.tick(observe=False)
    assert command.kind in (Kind.HOLD, Kind.NONE)
    assert command.action_A is None or np.allclose(command.action_A, [0.3, 0.5, 0.2])
    assert driver.loop.teleoperated or driver.loop.state is State.STOPPED


def test_the_limits_of_the_policy_hold_for_the_operator() -> None:
    limits = SafetyLimits(
        kind="absolute", state_index=(0, 1), position_high=(0.2, None), velocity=(0.4, 1.0), gripper_step=0.5
    )
    driver = driving(limits)
    before_A = driver.sent[-1].action_A
    assert before_A is not None
    driver.loop.take_over(driver.now)
    for tick in range(1, 12):
        teleoperate(driver, 5.0, 5.0, 0.1)
        action_A = driver.tick().action_A
        assert action_A is not None
        expected = [min(before_A[0] + 0.02 * tick, 0.2), min(before_A[1] + 0.5 * tick, 1.0), before_A[2]]
        same(action_A, [*expected[:2], 0.1])


def test_far_from_the_arm_it_holds_until_the_teleoperator_is_brought_there() -> None:
    driver = driving(REJECTING)
    at_A = driver.sent[-1].action_A
    assert at_A is not None
    driver.loop.take_over(driver.now)
    for _ in range(40):  # four times the limit of a hold
        teleoperate(driver, 0.9, 0.0, at_A[2])
        command = driver.tick()
        assert command.kind is Kind.HOLD
        assert "past the step limit; bring it to the arm's pose" in command.reason
    teleoperate(driver, at_A[0] + 0.04, 0.0, at_A[2])
    command = driver.tick()
    assert command.kind is Kind.TELEOP
    same(command.action_A, [at_A[0] + 0.04, 0.0, at_A[2]])
    teleoperate(driver, 0.9, 0.0, at_A[2])
    assert driver.tick().action_A is None
    assert driver.loop.fault is not None
    assert driver.loop.fault.startswith("an action is past the step limit"), "in motion it is a fault as ever"


def test_the_operator_may_begin_before_the_policy() -> None:
    driver = Driver(SETTINGS, ABSOLUTE)
    driver.loop.set_instruction("pick")
    assert driver.loop.take_over(driver.now)
    assert driver.tick().kind is Kind.NONE, "not active"
    driver.loop.activate()
    teleoperate(driver, 0.1, 0.5, 0.0)
    command = driver.tick()
    assert command.kind is Kind.TELEOP
    same(command.action_A, [0.1, 0.5, 0.0])


def test_a_jump_of_the_clock_forgets_what_the_operator_wanted() -> None:
    driver = driving()
    driver.loop.take_over(driver.now)
    teleoperate(driver, 0.3, 0.5, 0.2)
    driver.now -= 100.0
    assert driver.tick().reason == "teleop: nothing received yet"
