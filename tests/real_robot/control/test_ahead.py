"""Plans for a controller that executes them by itself: what it is given is what the loop would have sent tick by tick.

Shape legend: A action dimension, K actions of a chunk, N ticks.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from cogvla.policy.interface import ActionChunk
from cogvla.real_robot.control.control_loop import Command, ControlLoop, Kind
from cogvla.real_robot.control.settings import LoopSettings, SafetyLimits
from cogvla.tests.support.control_robot import ABSOLUTE, DELTA, PERIOD, ROBOT, Driver, chunk_of
from cogvla.tests.support.trajectory_controller import TrajectoryController

TOLERANT = LoopSettings(image_age_s=9, state_age_s=9, sync_tolerance_s=9, hold_limit_s=90, clock_gap_s=0.5)
LIMITS = SafetyLimits(
    kind="absolute", state_index=(0, 1), velocity=(1.0, 1.0), acceleration=(8.0, 8.0), position_high=(0.5, None)
)
WORST = (1.5 + 0.4) / 1.5 + 1e-6
"""Of the allowed speed of 1: the first point of a plan is 1.5 periods away, and the plan before may be 0.4 late."""


class Ahead(Driver):
    """A driver of a loop whose controller executes plans."""

    def __post_init__(self) -> None:
        self.loop = ControlLoop(ROBOT, self.limits, self.settings, ahead=True)


def ramp(step: float, length: int = 8, start: float = 0.0) -> ActionChunk:
    return chunk_of(*((start + step * (i + 1), 0.0, -step * (i + 1)) for i in range(length)))


@pytest.mark.parametrize("limits", [ABSOLUTE, LIMITS])
def test_one_plan_per_chunk_holds_the_commands_of_all_ticks(limits: SafetyLimits) -> None:
    driver, ticked = Ahead(TOLERANT, limits).start(), Driver(TOLERANT, limits).start()
    for each in (driver, ticked):
        each.observe()
        each.give(ramp(0.04))
    commands = [driver.tick() for _ in range(12)]
    wanted = np.array([ticked.tick().action_A for _ in range(12)])
    first = commands[0]
    assert first.coming_NA is not None
    np.testing.assert_allclose([first.action_A, *first.coming_NA][:8], wanted[:8])
    assert np.allclose(np.array([command.action_A for command in commands]), wanted)
    assert [command.coming_NA is not None for command in commands].count(True) == 1, "only what is new is given"


def test_a_new_chunk_replaces_the_rest_of_the_plan() -> None:
    driver = Ahead(TOLERANT, ABSOLUTE).start()
    driver.give(ramp(0.01))
    assert [driver.tick().coming_NA is not None for _ in range(6)] == [True] + [False] * 5
    driver.give(ramp(0.02))
    command = driver.tick()
    assert command.coming_NA is not None
    np.testing.assert_allclose(command.coming_NA[0], [0.04, 0, -0.04], atol=1e-6)
    assert driver.tick().coming_NA is None


def test_a_hold_and_a_teleoperator_end_the_plan() -> None:
    for end in ("instruction", "take over"):
        driver = Ahead(TOLERANT, LIMITS).start()
        driver.give(ramp(0.04))
        for _ in range(4):
            driver.tick()
        assert driver.tick().coming_NA is None
        if end == "instruction":
            driver.loop.set_instruction("")
        else:
            driver.loop.take_over(driver.now)
            driver.loop.observe_teleop(np.array([0.0, 0.0, 0.0]), driver.now, driver.now)
        command = driver.tick()
        assert command.kind is (Kind.HOLD if end == "instruction" else Kind.TELEOP)
        assert command.coming_NA is not None, "the controller would go on with the old plan"
        steps = np.diff([command.action_A, *command.coming_NA], axis=0)
        assert len(steps) <= 3
        assert not steps[-1].any(), "it brakes and rests"


def test_an_action_past_a_limit_that_rejects_ends_the_plan_before_it() -> None:
    limits = SafetyLimits(kind="absolute", state_index=(0, 1), step=(0.1, 0.1), reject=("step",))
    driver = Ahead(TOLERANT, limits).start()
    driver.give(chunk_of((0.05, 0, 0), (0.1, 0, 0), (0.9, 0, 0)))
    command = driver.tick()
    assert command.coming_NA is not None
    assert np.max(command.coming_NA) == pytest.approx(0.1)
    driver.tick()
    assert driver.tick().kind is Kind.NONE
    assert "past the step limit" in str(driver.loop.fault)


def test_displacements_have_no_plan() -> None:
    with pytest.raises(ValueError, match=r"limits\.kind must be absolute"):
        ControlLoop(ROBOT, DELTA, TOLERANT, ahead=True)


@pytest.mark.parametrize("missed", [1, 3, 7, 30])
def test_ticks_that_were_missed_have_passed(missed: int) -> None:
    """0.5 s is the longest gap: past it, everything is forgotten but where the controller has gone to."""
    driver = Ahead(TOLERANT, ABSOLUTE).start()
    driver.give(ramp(0.01))
    driver.tick()
    driver.now += missed * PERIOD
    command = driver.tick()
    reached = min(2 + missed, 8)
    assert command.action_A is not None
    np.testing.assert_allclose(command.action_A[0], 0.01 * reached, atol=1e-6)
    assert command.coming_NA is None or np.allclose(command.coming_NA, command.action_A)


@pytest.mark.parametrize("seed", range(40))
def test_a_controller_of_plans_keeps_the_limits_whatever_comes_late(seed: int) -> None:
    """Chunks at any time, holds, ticks late by a part of a period or by many: it never moves faster than allowed."""
    chance = random.Random(seed)
    driver = Ahead(TOLERANT, LIMITS).start()
    controller = TrajectoryController(np.zeros(2))
    times, desired, due = [driver.now], [controller.desired(driver.now)], driver.now
    for _ in range(60):
        due += PERIOD * (chance.randint(2, 30) if chance.random() < 0.1 else 1)
        late = PERIOD * chance.uniform(0.0, 0.4)
        if chance.random() < 0.3:
            driver.loop.set_instruction(chance.choice(["", "pick", "pick"]))
        times += list(np.linspace(driver.now, due + late, 20)[1:])
        desired += [controller.desired(when) for when in times[-19:]]
        driver.now = due + late
        driver.observe()
        request = driver.loop.request_due(driver.now)
        if request is not None:
            aims = [chance.uniform(-1, 1) for _ in range(chance.randint(1, 12))]
            driver.loop.deliver(chunk_of(*((aim, 0.0, -aim) for aim in aims)), request, driver.now)
        took(controller, driver.loop.tick(driver.now), driver.now)
    speeds = np.abs(np.diff(desired, axis=0)) / np.diff(times)[:, None]
    assert controller.received > 5
    assert speeds.max() <= WORST


def took(controller: TrajectoryController, command: Command, now: float) -> None:
    if command.action_A is not None and command.coming_NA is not None:
        actions_NA = np.concatenate([command.action_A[None], command.coming_NA])
        controller.take([PERIOD * (1.5 + i) for i in range(len(actions_NA))], actions_NA[:, [0, 2]], now)
