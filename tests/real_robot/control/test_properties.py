"""Whatever arrives in whatever order: what a control loop must never do, and that it does not starve when it need not.

Each was seen to fail, with these taken away one at a time: the checks of epoch, deadline, shape and finite numbers in
`deliver`; the one request in flight; the clearing of the plan in a new epoch; each clamp, the braking distance, braking
in a hold and the gripper's range in `safety`; the stop in `estop` and `deactivate`; the latched fault; the margin, the
latency and the rounding up in `prefetch`; the dropping of passed actions in `chunk_queue`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cogvla.policy.interface import ActionChunk
from cogvla.real_robot.control.control_loop import ChunkRequest, Command, ControlLoop, Kind, State
from cogvla.real_robot.control.settings import LoopSettings, SafetyLimits
from cogvla.tests.support.control_robot import HZ, PERIOD, ROBOT, Driver, constant, image

STEP, CHANGE, LOW, HIGH = 0.08, 0.05, -0.3, 0.25
"""Per tick, and the box; for both arm dimensions, in physical units."""
BOX: dict[str, Any] = {
    "state_index": (0, 1),
    "position_low": (LOW, LOW),
    "position_high": (HIGH, HIGH),
    "velocity": (STEP * HZ, STEP * HZ),
    "acceleration": (CHANGE * HZ**2, CHANGE * HZ**2),
    "gripper_step": 0.5,
}
LIMITS = {
    "absolute": SafetyLimits(kind="absolute", **BOX),
    "delta": SafetyLimits(kind="delta", scale=(0.1, 0.1), lead=(1.0, 1.0), **BOX),
    "reject": SafetyLimits(kind="absolute", reject=("velocity",), **BOX),
}
TINY = 1e-9


class Anything(RuleBasedStateMachine):
    """A front end, a policy and a robot that do anything at any time. The arm is where it was told to be."""

    @initialize(
        limits=st.sampled_from(sorted(LIMITS)),
        overlap=st.sampled_from(["replace", "ensemble", "real_time"]),
        execute=st.sampled_from([None, 3]),
    )
    def build(self, limits: str, overlap: str, execute: int | None) -> None:
        self.kind = LIMITS[limits].kind
        loop = LoopSettings(overlap=overlap, execute_steps=execute, hold_limit_s=0.4, deadline_s=0.3, retry_s=0.05)
        self.loop = ControlLoop(ROBOT, LIMITS[limits], loop)
        self.now = 50.0
        self.arm: np.ndarray = np.zeros(2)
        self.moved: np.ndarray | None = None  # in the last tick; None where nothing was sent before
        self.last: Command | None = None
        self.asked: list[ChunkRequest] = []
        self.answered: set[int] = set()
        self.usable: set[int] = set()  # epochs of which a good chunk was taken
        self.teleoperable = False  # the teleoperator's last action was taken
        self.dead = False  # e-stopped or deactivated, and not activated since
        self.jumps_at: dict[int, int] = {}  # clock jumps when a request was made
        self.jumps = 0  # when a command was sent last
        self.loop.set_instruction("pick")
        self.loop.activate()

    # --- the world ----------------------------------------------------------------------------------------------------

    @rule(age=st.sampled_from([0.0, 0.0, 0.0, 0.02, 0.05, 0.5, -0.005, -1.0]), bad=st.integers(0, 9))
    def observe(self, age: float, bad: int) -> None:
        state = np.append(self.arm, 0.0)
        if bad == 0:
            state[1] = np.nan
        for camera in ROBOT.camera_names:
            picture = image(camera) if bad != 1 else np.zeros((5, 5, 3), np.uint8)
            self.loop.observe_image(camera, picture, self.now - age, self.now)
        self.loop.observe_state(state, self.now - age, self.now)

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.05, 0.35]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.sampled_from([-100.0, -0.1, 0.7, 100.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.now += seconds

    @rule(text=st.sampled_from(["pick", "place", ""]))
    def instruct(self, text: str) -> None:
        self.loop.set_instruction(text)

    # --- the policy ---------------------------------------------------------------------------------------------------

    @rule()
    def ask(self) -> None:
        request = self.loop.request_due(self.now)
        if request is None:
            return
        assert self.loop.state in (State.HOLDING, State.RUNNING)
        assert not self.loop.teleoperated
        for earlier in self.asked:
            waits = earlier.id not in self.answered and earlier.deadline >= self.loop._clock.now
            assert not waits or self.jumps_at[earlier.id] < self.jump_count, "one request in flight"
        request.observation.validate(ROBOT)
        self.asked.append(request)
        self.jumps_at[request.id] = self.jump_count

    @property
    def jump_count(self) -> int:
        return self.loop.measurements.counts["clock_jumps"]

    @precondition(lambda self: self.asked)
    @rule(
        back=st.sampled_from([1, 1, 1, 2, 3]),
        reach=st.sampled_from([0.1, 1.0, 1e9, 1e300]),
        bad=st.sampled_from([None] * 6 + [math.nan, math.inf, "shape"]),
        seed=st.integers(0, 99),
    )
    def deliver(self, back: int, reach: float, bad: Any, seed: int) -> None:
        """The newest request's answer, or an older one's; early, late, twice, of an older epoch or broken."""
        request = self.asked[-min(back, len(self.asked))]
        actions = np.random.default_rng(seed).uniform(-1, 1, (1, ROBOT.chunk, ROBOT.action_dim)) * reach
        if bad == "shape":
            actions = actions[..., :2]
        elif bad is not None:
            actions[0, seed % ROBOT.chunk, seed % 3] = bad
        twice = request.id in self.answered
        refused = self.loop.deliver(ActionChunk(actions), request, self.now)
        self.answered.add(request.id)
        if refused is None:
            assert bad is None
            assert not twice
            assert request.epoch == self.loop.epoch
            assert self.now <= request.deadline
            self.usable.add(request.epoch)

    @precondition(lambda self: self.asked)
    @rule()
    def fail(self) -> None:
        self.loop.fail(self.asked[-1], "lost", self.now)
        self.answered.add(self.asked[-1].id)

    @rule(ticks=st.integers(1, 6), reach=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99))
    def all_goes_well(self, ticks: int, reach: float, seed: int) -> None:
        """So that the arm is in motion when something happens."""
        for index in range(ticks):
            self.observe(age=0.0, bad=9)
            asked = len(self.asked)
            self.ask()
            if len(self.asked) > asked:
                self.deliver(back=1, reach=reach, bad=None, seed=seed + index)
            self.tick(wait=PERIOD)

    # --- the operator -------------------------------------------------------------------------------------------------

    @rule(action=st.sampled_from(["estop", "deactivate", "reset"]))
    def interrupt(self, action: str) -> None:
        match action:
            case "estop":
                self.loop.estop(True)
            case "deactivate":
                self.loop.deactivate()
            case "reset":
                self.loop.reset()
        self.dead = True

    @rule(active=st.booleans())
    def take_over(self, active: bool) -> None:
        if not active:
            self.loop.hand_back(self.now)
        elif self.loop.take_over(self.now):
            assert not len(self.loop._queue.plan(self.loop._clock.next_tick))

    @rule(
        reach=st.sampled_from([0.1, 1.0, 30.0, 1e300]),
        bad=st.sampled_from([None] * 4 + [math.nan, math.inf, "shape"]),
        age=st.sampled_from([0.0, 0.0, 0.0, 0.1, 1.0, -1.0]),
        seed=st.integers(0, 99),
    )
    def teleoperate(self, reach: float, bad: Any, age: float, seed: int) -> None:
        action = np.random.default_rng(seed).uniform(-1, 1, ROBOT.action_dim) * reach
        if bad == "shape":
            action = action[:2]
        elif bad is not None:
            action[seed % 3] = bad
        refused = self.loop.observe_teleop(action, self.now - age, self.now)
        self.teleoperable = refused is None
        assert refused is not None or bad is None

    @rule()
    def bring_back(self) -> None:
        """What an operator does after a stop, in order."""
        self.loop.estop(False)
        if self.loop.state is State.STOPPED:
            assert self.loop.reset()
        if self.loop.state is State.IDLE:  # the arm is at rest, and seen
            self.moved = None
            self.now += 0.6
        assert self.loop.activate()
        self.observe(age=0.0, bad=9)
        self.dead = False

    # --- the control tick, and what must hold -------------------------------------------------------------------------

    @rule(wait=st.sampled_from([PERIOD, PERIOD, PERIOD, 0.0, 0.03, 0.2]))
    def tick(self, wait: float) -> None:
        before, teleoperated = self.loop.epoch, self.loop.teleoperated
        command = self.loop.tick(self.now)
        assert self.last is None or command.tick == self.last.tick + 1
        self.last = command
        self.now += wait
        if self.dead:
            assert command.kind is Kind.NONE, "stopped by the operator"
        assert (command.action_A is None) == (command.kind is Kind.NONE)
        assert (command.reason == "") == (command.kind in (Kind.ACTION, Kind.TELEOP))
        if command.action_A is None:
            self.moved = None if self.loop.state in (State.IDLE, State.STOPPED) else self.moved
            return
        if command.kind is Kind.ACTION:
            assert before == self.loop.epoch
            assert before in self.usable, "an action of an older epoch"
            assert not teleoperated
        if command.kind is Kind.TELEOP:
            assert teleoperated
            assert self.teleoperable, "the action before a refused one"
        self.inside(command.action_A)

    def inside(self, action_A: np.ndarray) -> None:
        assert np.isfinite(action_A).all()
        assert -1 <= action_A[1] <= 1, "the gripper's range"
        arm = action_A[[0, 2]]
        moved = arm * 0.1 if self.kind == "delta" else arm - self.arm
        assert (np.abs(moved) <= STEP + TINY).all(), "velocity"
        assert ((self.arm + moved <= HIGH + TINY) & (self.arm + moved >= LOW - TINY)).all(), "position"
        # after a jump of the clock the arm is at rest, and nobody knows for how long: it starts from there
        before = np.zeros(2) if self.moved is None or self.jump_count > self.jumps else self.moved
        assert (np.abs(moved - before) <= CHANGE + TINY).all(), "acceleration"
        self.jumps = self.jump_count
        self.moved, self.arm = moved, self.arm + moved

    @invariant()
    def what_is_planned_is_finite_and_of_this_epoch(self) -> None:
        if not hasattr(self, "loop"):
            return
        plan_NA = self.loop._queue.plan(self.loop._clock.next_tick)
        assert not len(plan_NA) or self.loop.epoch in self.usable
        if self.loop.state is State.STOPPED:
            assert self.loop.fault
            assert not len(plan_NA)


TestAnything = Anything.TestCase
TestAnything.settings = settings(
    deadline=None, max_examples=50, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)


@settings(deadline=None, max_examples=20)
@given(
    assumed=st.integers(1, 3),
    margin=st.integers(0, 1),
    execute=st.sampled_from([None, 2, 4]),
    overlap=st.sampled_from(["replace", "ensemble", "real_time"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_never_starves_while_the_latency_bound_holds(
    assumed: int, margin: int, execute: int | None, overlap: str, seed: int
) -> None:
    """The bound is what the loop asks ahead: the running 95th percentile in ticks and the margin.

    A chunk must last for two answers, the one that brings it and the one that replaces it: K >= 2 * bound.
    """
    loop = LoopSettings(
        latency_s=assumed * PERIOD, margin_ticks=margin, execute_steps=execute, overlap=overlap, deadline_s=5.0
    )
    driver = Driver(loop).start()
    rng = np.random.default_rng(seed)
    driver.give()
    pending: tuple[ChunkRequest, float] | None = None
    for _ in range(80):
        driver.observe()
        if pending is not None and driver.now >= pending[1] - 1e-6:
            assert driver.loop.deliver(constant(rng.uniform(-1, 1)), pending[0], driver.now) is None
            pending = None
        request = driver.loop.request_due(driver.now)
        if request is not None:
            bound = min(request.delay_ticks + margin, assumed + margin)
            pending = request, driver.now + rng.integers(1, max(bound, 1) + 1) * PERIOD
        assert driver.tick(observe=False).kind is Kind.ACTION
    assert driver.counts["starvations"] == 0
    assert driver.counts["chunks"] > 10


@pytest.mark.parametrize("excess", [0, 1])
def test_one_tick_more_than_the_bound_starves(excess: int) -> None:
    """So the property above is as strong as it can be."""
    driver = Driver(LoopSettings(latency_s=2 * PERIOD, margin_ticks=1)).start()
    driver.give()
    pending: tuple[ChunkRequest, float] | None = None
    for _ in range(20):
        driver.observe()
        if pending is not None and driver.now >= pending[1] - 1e-6:
            driver.loop.deliver(constant(0.1), pending[0], driver.now)
            pending = None
        request = driver.loop.request_due(driver.now)
        if request is not None:
            pending = request, driver.now + (3 + excess) * PERIOD
        driver.tick(observe=False)
    assert (driver.counts["starvations"] > 0) == bool(excess)
