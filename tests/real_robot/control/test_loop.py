"""The control loop, one situation after the other: states, holds, epochs, late answers, clocks and what is counted."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from cogvla.policy.interface import ActionChunk
from cogvla.real_robot.control.control_loop import ControlLoop, Kind, State
from cogvla.real_robot.control.settings import LoopSettings, SafetyLimits
from cogvla.real_robot.control.watchdog import TRANSITIONS, Event, Watchdog
from cogvla.tests.support.control_robot import ABSOLUTE, DELTA, PERIOD, ROBOT, Driver, chunk_of, constant, image

# --- the table of states -------------------------------------------------------------------------------------------

IDLE, HOLDING, RUNNING, STOPPED = State.IDLE, State.HOLDING, State.RUNNING, State.STOPPED
TABLE = [
    (IDLE, Event.ACTIVATE, HOLDING),
    (IDLE, Event.DEACTIVATE, IDLE),
    (IDLE, Event.RESET, IDLE),
    (IDLE, Event.COMMAND, IDLE),
    (IDLE, Event.HOLD, IDLE),
    (IDLE, Event.FAULT, STOPPED),
    (HOLDING, Event.ACTIVATE, HOLDING),
    (HOLDING, Event.DEACTIVATE, IDLE),
    (HOLDING, Event.RESET, IDLE),
    (HOLDING, Event.COMMAND, RUNNING),
    (HOLDING, Event.HOLD, HOLDING),
    (HOLDING, Event.FAULT, STOPPED),
    (RUNNING, Event.ACTIVATE, RUNNING),
    (RUNNING, Event.DEACTIVATE, IDLE),
    (RUNNING, Event.RESET, IDLE),
    (RUNNING, Event.COMMAND, RUNNING),
    (RUNNING, Event.HOLD, HOLDING),
    (RUNNING, Event.FAULT, STOPPED),
    (STOPPED, Event.ACTIVATE, STOPPED),
    (STOPPED, Event.DEACTIVATE, STOPPED),
    (STOPPED, Event.RESET, IDLE),
    (STOPPED, Event.COMMAND, STOPPED),
    (STOPPED, Event.HOLD, STOPPED),
    (STOPPED, Event.FAULT, STOPPED),
]
WAY = {
    IDLE: [],
    HOLDING: [Event.ACTIVATE],
    RUNNING: [Event.ACTIVATE, Event.COMMAND],
    STOPPED: [Event.FAULT],
}


@pytest.mark.parametrize(("state", "event", "expected"), TABLE)
def test_every_row_of_the_table(state: State, event: Event, expected: State) -> None:
    watchdog = Watchdog()
    for step in WAY[state]:
        watchdog.on(step, "first")
    assert watchdog.state is state
    assert watchdog.on(event, "second") is expected
    first = "first" if state is STOPPED else "second"
    assert watchdog.fault == (first if expected is STOPPED else None)


def test_the_table_is_complete() -> None:
    rows = {(state, event): after for state, event, after in TABLE}
    assert rows == {(state, event): after for state, row in TRANSITIONS.items() for event, after in row.items()}
    assert len(rows) == len(State) * len(Event)


@pytest.mark.parametrize("state", list(State))
def test_estop_from_any_state_and_reset_only_after_its_release(state: State) -> None:
    watchdog = Watchdog()
    for step in WAY[state]:
        watchdog.on(step, "first")
    watchdog.set_estop(True)
    assert watchdog.state is STOPPED
    assert watchdog.on(Event.RESET) is STOPPED
    watchdog.set_estop(False)
    assert watchdog.state is STOPPED, "the release alone moves nothing"
    assert watchdog.fault == ("first" if state is STOPPED else "emergency stop")
    assert watchdog.on(Event.RESET) is IDLE


# --- running -------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_or_sent_before_activation() -> None:
    driver = Driver()
    driver.loop.set_instruction("pick")
    driver.observe()
    assert driver.loop.request_due(driver.now) is None
    command = driver.tick()
    assert (command.kind, command.action_A, command.reason) == (Kind.NONE, None, "not active")


def test_a_request_carries_the_observation_and_the_action_of_its_tick_is_sent() -> None:
    driver = Driver(state=np.array([0.1, 0.2, 0.3])).start()
    request = driver.ask()
    request.observation.validate(ROBOT)
    assert request.observation.instruction == ["pick"]
    np.testing.assert_allclose(request.observation.state, [[0.1, 0.2, 0.3]], rtol=1e-6)
    assert (request.tick, request.asked_at, request.deadline) == (0, 100.0, 101.0)
    assert driver.loop.request_due(driver.now) is None, "one in flight"
    driver.tick()
    driver.tick()
    actions = [(0.1 * i, 0.0, 0.0) for i in range(5)]
    assert driver.loop.deliver(chunk_of(*actions), request, driver.now) is None
    first = [driver.tick().action_A[0] for _ in range(2)]  # type: ignore[index]
    assert first == pytest.approx([0.0, 0.1]), "the arm has not moved since the observation: no action has passed"
    request = driver.ask()
    driver.tick()
    assert driver.loop.deliver(chunk_of(*actions), request, driver.now) is None
    then = [driver.tick().action_A[0] for _ in range(3)]  # type: ignore[index]
    assert then == pytest.approx([0.1, 0.2, 0.3]), "it has moved for one tick"
    assert driver.loop.state is RUNNING
    assert driver.counts["late_actions"] == 1


def test_the_tick_of_an_observation_counts_the_ticks_that_happened_since() -> None:
    driver = Driver().start()
    for _ in range(4):
        driver.tick()
    driver.observe()
    made = driver.now
    driver.tick(observe=False)
    driver.now += 3 * PERIOD  # late, but one tick is one tick
    driver.tick(observe=False)
    driver.now -= PERIOD
    request = driver.loop.request_due(driver.now - 0.01)
    assert request is None, "the state is too old by now"
    loop = replace(LoopSettings(), state_age_s=1.0, image_age_s=1.0)
    driver = Driver(loop, now=made).start()
    driver.tick()
    stamp = driver.now
    driver.observe()
    driver.tick(observe=False)
    driver.now += 3 * PERIOD
    driver.tick(observe=False)
    request = driver.loop.request_due(driver.now)
    assert request is not None
    assert (request.stamp, request.tick, request.delay_ticks) == (stamp, 1, 2 + 2)


def test_asking_again_at_the_threshold() -> None:
    driver = Driver(LoopSettings(latency_s=0.1, margin_ticks=1)).start()
    driver.give()
    asked = []
    for _ in range(8):
        driver.observe()
        asked.append(driver.loop.request_due(driver.now) is not None)
        driver.tick(observe=False)
    assert asked == [False, False, False, False, False, True, False, False], "3 = 2 ticks of latency + 1 remain"


def test_a_request_carries_the_old_plan_for_real_time_chunking() -> None:
    driver = Driver(LoopSettings(latency_s=0.1)).start()
    driver.give(chunk_of(*[(0.1 * i, 0.0, 0.0) for i in range(8)]))
    for _ in range(5):
        driver.tick()
    request = driver.ask()
    assert request.observation.committed is not None
    (committed,) = request.observation.committed
    assert committed is not None
    np.testing.assert_allclose(committed.actions[:, 0], [0.5, 0.6, 0.7], rtol=1e-6)
    assert committed.delay == 2
    assert request.delay_ticks == 2


def test_the_robot_does_what_a_request_says_it_will_do() -> None:
    """Chunks arrive 2 ticks after their observation; the committed actions are compared with the commands sent."""
    driver = Driver(LoopSettings(latency_s=2 * PERIOD, execute_steps=4)).start()
    rng, waiting, told = np.random.default_rng(0), [], []
    for tick in range(40):
        driver.observe()
        if (request := driver.loop.request_due(driver.now)) is not None:
            waiting.append((tick + 2, request))
            told.append((tick, request))
        while waiting and waiting[0][0] == tick:
            chunk = chunk_of(*rng.uniform(-0.1, 0.1, (8, 3)))
            assert driver.loop.deliver(chunk, waiting.pop(0)[1], driver.now) is None
        driver.tick(observe=False)
    compared = 0
    for tick, request in told:
        if request.observation.committed is None:
            continue
        (committed,) = request.observation.committed
        assert committed is not None
        sent = [command.action_A for command in driver.sent[tick : tick + committed.delay]]
        if len(sent) == committed.delay == 2:
            np.testing.assert_allclose(committed.actions[:2], np.array(sent), atol=1e-6)
            compared += 1
    assert compared >= 6, [(tick, request.delay_ticks) for tick, request in told]


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (constant(float("nan")), "NaN"),
        (constant(float("inf")), "NaN"),
        (ActionChunk(np.zeros((8, 3), np.float32)), r"expected actions \[1,K,A=3\]"),
        (ActionChunk(np.zeros((2, 8, 3), np.float32)), "expected actions"),
        (ActionChunk(np.zeros((1, 8, 4), np.float32)), "expected actions"),
        (ActionChunk(np.zeros((1, 8, 3), np.int64)), "int64"),
        (ActionChunk(np.full((1, 8, 3), None)), "object"),
    ],
)
def test_a_bad_chunk_is_refused_and_the_old_plan_goes_on(chunk: ActionChunk, words: str) -> None:
    driver = Driver().start()
    driver.give()
    for _ in range(5):
        driver.tick()
    assert re.search(words, str(driver.loop.deliver(chunk, driver.ask(), driver.now)))
    assert [driver.tick().kind for _ in range(4)] == [Kind.ACTION] * 3 + [Kind.HOLD]
    assert driver.counts["refused_chunks"] == 1


def test_a_wholly_late_chunk_is_counted_and_dropped() -> None:
    driver = Driver().start()
    driver.give()
    request = driver.loop.request_due(driver.now)
    for _ in range(6):
        driver.tick()
    request = driver.ask()
    for _ in range(3):
        driver.tick()
    assert "all 2 ticks" in str(driver.loop.deliver(constant(0.5, 2), request, driver.now))
    assert driver.counts["late_chunks"] == 1


def test_duplicates_and_answers_after_the_deadline_are_not_used() -> None:
    driver = Driver(LoopSettings(deadline_s=0.2, retry_s=0.1)).start()
    request = driver.give()
    assert "answered or given up before" in str(driver.loop.deliver(constant(0.9), request, driver.now))
    for _ in range(6):
        driver.tick()
    request = driver.ask()
    for _ in range(6):
        driver.tick()
    assert driver.counts["deadline_misses"] == 1
    assert "answered or given up before" in str(driver.loop.deliver(constant(0.9), request, driver.now))
    driver.observe()
    assert driver.loop.request_due(driver.now) is None, "a pause after a failure"
    driver.now += 0.1
    assert driver.ask().id == request.id + 1


def test_a_failed_request_is_asked_again_after_a_pause() -> None:
    driver = Driver(LoopSettings(retry_s=0.1)).start()
    request = driver.ask()
    driver.loop.fail(request, "connection refused", driver.now)
    assert driver.loop.request_due(driver.now) is None
    assert driver.loop.diagnostics(driver.now)["last_failure"] == "connection refused"
    driver.now += 0.1
    assert driver.ask().id == 2


# --- holding and stopping --------------------------------------------------------------------------------------------


def test_starved_it_holds_the_last_position_and_recovers() -> None:
    driver = Driver(limits=ABSOLUTE).start()
    driver.give(chunk_of((0.1, 1.0, 0.2), (0.15, 1.0, 0.3)))
    driver.tick()
    driver.tick()
    for _ in range(3):
        held = driver.tick()
        assert (held.kind, held.reason) == (Kind.HOLD, "no action for this tick")
        assert held.action_A == pytest.approx([0.15, 1.0, 0.3])
    assert driver.loop.state is HOLDING
    driver.give(constant(0.2))
    assert driver.tick().kind is Kind.ACTION
    assert (driver.loop.state, driver.counts["starvations"]) == (RUNNING, 1)


def test_starved_for_too_long_it_stops_until_the_operator_resets() -> None:
    driver = Driver(LoopSettings(hold_limit_s=0.5)).start()
    driver.give(constant(0.1, 2))
    kinds = [driver.tick().kind for _ in range(15)]
    assert kinds == [Kind.ACTION] * 2 + [Kind.HOLD] * 11 + [Kind.NONE] * 2
    assert driver.loop.fault == "held for more than 0.5 s: no action for this tick"
    driver.observe()
    assert driver.loop.request_due(driver.now) is None
    assert not driver.loop.activate()
    assert driver.tick().kind is Kind.NONE
    assert driver.loop.reset()
    assert driver.loop.state is IDLE
    assert driver.loop.activate()
    driver.give()
    assert driver.tick().kind is Kind.ACTION


def test_a_hold_and_its_fault_keep_the_reason_of_the_policy_client() -> None:
    driver = Driver(LoopSettings(hold_limit_s=0.5, deadline_s=0.2, retry_s=0.05)).start()
    driver.give(constant(0.1, 2))
    request = driver.ask()
    for _ in range(7):
        held = driver.tick()
    assert held.reason == "no action for this tick: no answer within 0.2 s"
    driver.loop.fail(request, "the policy server is stopping", driver.now)
    assert driver.tick().reason == "no action for this tick: the policy server is stopping"
    driver.give(constant(0.1, 1))
    driver.tick()
    assert driver.tick().reason == "no action for this tick", "it has answered again"
    driver.loop.fail(driver.ask(), "ws://robot cannot be reached", driver.now)
    while driver.loop.state is not STOPPED:
        driver.tick()
    assert driver.loop.fault == "held for more than 0.5 s: no action for this tick: ws://robot cannot be reached"


def test_a_hold_says_which_samples_do_not_belong_together() -> None:
    driver = Driver(LoopSettings(sync_tolerance_s=0.03)).start()
    driver.loop.observe_image("front", image("front"), driver.now, driver.now)
    driver.loop.observe_state(driver.state, driver.now, driver.now)
    driver.loop.observe_image("wrist", image("wrist"), driver.now - 0.045, driver.now)
    assert driver.loop.request_due(driver.now) is None
    apart = "front: nearest sample is 0.045 s from the others, at most 0.03 s are allowed"
    assert driver.loop.diagnostics(driver.now)["last_failure"] == apart
    assert driver.tick(observe=False).reason == f"no action for this tick: {apart}"
    driver.give()
    assert driver.loop.diagnostics(driver.now)["last_failure"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_a_hold_says_why_an_answer_is_of_no_use(value: float) -> None:
    """1e39 is finite in float64 only: the policy is told the plan in float32."""
    driver = Driver().start()
    answer = constant(0.0)
    driver.loop.deliver(replace(answer, actions=np.full(answer.actions.shape, value)), driver.ask(), driver.now)
    assert "NaN" in driver.tick().reason
    driver.give()
    assert driver.loop.diagnostics(driver.now)["last_failure"] is None


@pytest.mark.parametrize("ticks", [1, 6, 40])
def test_a_late_first_answer_starts_at_its_first_action(ticks: int) -> None:
    """An arm with absolute targets and a limit of steps that rejects: the seventh action would be too far away."""
    limits = replace(ABSOLUTE, step=(0.015, 0.015), reject=("step",), lead=(0.05, 0.05))
    driver = Driver(LoopSettings(deadline_s=10.0), limits).start()
    request = driver.ask()
    for _ in range(ticks):
        driver.tick()
    actions = [(0.01 * (i + 1), 0.0, 0.0) for i in range(8)]
    assert driver.loop.deliver(chunk_of(*actions), request, driver.now) is None
    assert driver.tick().action_A[0] == pytest.approx(0.01)  # type: ignore[index]
    assert driver.loop.fault is None
    assert driver.counts["late_actions"] == 0


def test_before_the_first_action_nothing_is_sent_and_there_is_no_hurry() -> None:
    driver = Driver(LoopSettings(hold_limit_s=0.5)).start()
    assert {driver.tick().kind for _ in range(40)} == {Kind.NONE}
    assert driver.loop.state is HOLDING


def test_without_an_instruction_it_holds_as_long_as_wanted() -> None:
    driver = Driver(LoopSettings(hold_limit_s=0.5)).start()
    driver.give()
    driver.tick()
    driver.loop.set_instruction("")
    assert {driver.tick().reason for _ in range(40)} == {"no instruction"}
    assert driver.loop.request_due(driver.now) is None
    assert driver.counts["starvations"] == 0, "it was told to hold"
    driver.loop.set_instruction("place")
    assert driver.tick().kind is Kind.HOLD
    assert driver.ask().observation.instruction == ["place"]


def test_a_stale_sensor_holds_forgets_the_plan_and_stops_asking() -> None:
    driver = Driver(LoopSettings(image_age_s=0.2, state_age_s=0.1)).start()
    request = driver.ask()
    driver.loop.deliver(constant(0.1), request, driver.now)
    driver.tick()
    pending = None
    for _ in range(3):  # the wrist camera is gone from here on
        driver.loop.observe_image("front", image("front"), driver.now, driver.now)
        driver.loop.observe_state(driver.state, driver.now, driver.now)
        pending = pending or driver.loop.request_due(driver.now)
        assert driver.tick(observe=False).kind is Kind.ACTION
    driver.now += 0.1
    driver.loop.observe_image("front", image("front"), driver.now, driver.now)
    driver.loop.observe_state(driver.state, driver.now, driver.now)
    held = driver.tick(observe=False)
    assert held.kind is Kind.HOLD
    assert held.reason.startswith("wrist: 0.300 s old")
    assert driver.loop.request_due(driver.now) is None
    assert driver.tick().kind is Kind.HOLD, "the old plan is void"
    driver.give()
    assert driver.tick().kind is Kind.ACTION
    assert driver.counts["stale"] == 1


def test_a_limit_that_rejects_stops_the_loop() -> None:
    driver = Driver(limits=replace(DELTA, step=(0.05, 0.05), reject=("step",))).start()
    driver.give(chunk_of((0.4, 0, 0), (0.6, 0, 0), (0.1, 0, 0)))
    assert driver.tick().kind is Kind.ACTION
    stopped = driver.tick()
    assert (stopped.kind, stopped.action_A) == (Kind.NONE, None)
    assert "step limit" in stopped.reason
    assert driver.loop.fault == stopped.reason
    assert driver.tick().kind is Kind.NONE


def test_an_emergency_stop_that_is_said_again_is_one_fault() -> None:
    loop = Driver().start().loop
    for engaged in (True, True, False, True):
        loop.estop(engaged)
    assert loop.measurements.counts["faults"] == 1
    loop.estop(False)
    assert loop.reset()
    loop.estop(True)
    assert loop.measurements.counts["faults"] == 2


@pytest.mark.parametrize("running", [True, False])
def test_after_estop_nothing_is_sent(running: bool) -> None:
    driver = Driver().start()
    if running:
        driver.give()
        driver.tick()
    pending = driver.loop.request_due(driver.now) if not running else None
    driver.loop.estop(True)
    assert driver.tick().kind is Kind.NONE
    if pending is not None:
        driver.loop.deliver(constant(0.1), pending, driver.now)
    assert not driver.loop.reset()
    driver.loop.estop(False)
    assert {driver.tick().kind for _ in range(5)} == {Kind.NONE}
    assert driver.loop.reset()
    assert driver.tick().kind is Kind.NONE
    assert driver.loop.activate()
    assert driver.tick().kind is Kind.NONE, "the plan is forgotten, and nothing was commanded since"


@pytest.mark.parametrize("change", ["reset", "deactivate", "estop", "instruction"])
def test_a_chunk_of_an_older_epoch_is_discarded(change: str) -> None:
    driver = Driver().start()
    request = driver.ask()
    match change:
        case "reset":
            driver.loop.reset()
        case "deactivate":
            driver.loop.deactivate()
        case "estop":
            driver.loop.estop(True)
            driver.loop.estop(False)
            driver.loop.reset()
        case "instruction":
            driver.loop.set_instruction("place")
    driver.loop.activate()
    driver.observe()
    assert driver.loop.request_due(driver.now) is None, "still one in flight: the server works on it"
    assert "asked in epoch" in str(driver.loop.deliver(constant(0.1), request, driver.now))
    assert driver.tick().kind is Kind.NONE
    assert driver.counts["old_epoch_chunks"] == 1
    driver.give()
    assert driver.tick().kind is Kind.ACTION


def test_the_same_instruction_again_changes_nothing() -> None:
    driver = Driver().start()
    driver.give()
    epoch = driver.loop.epoch
    driver.loop.set_instruction(" pick ")
    assert driver.loop.epoch == epoch
    assert driver.tick().kind is Kind.ACTION


# --- clocks and measurements -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-50.0, 50.0])
def test_a_jump_of_the_clock_voids_everything_and_is_recovered_from(jump: float) -> None:
    driver = Driver().start()
    driver.give()
    driver.tick()
    driver.now += jump
    held = driver.tick(observe=False)
    assert (held.kind, driver.counts["clock_jumps"]) == (Kind.HOLD, 1)
    assert "nothing received yet" in held.reason
    request = driver.give()
    assert request.asked_at == driver.now
    assert driver.tick().kind is Kind.ACTION


@pytest.mark.parametrize("ask", ["ahead", "after"])
def test_more_steps_than_a_chunk_has_are_refused(ask: str) -> None:
    Driver(LoopSettings(ask=ask, execute_steps=8))
    with pytest.raises(ValueError, match="execute_steps=9 changes nothing with chunks of 8 actions: lower it"):
        Driver(LoopSettings(ask=ask, execute_steps=9))


def test_a_gap_that_every_tick_would_have_is_refused() -> None:
    Driver(LoopSettings(clock_gap_s=1.5 * PERIOD))
    with pytest.raises(ValueError, match=r"^loop: clock_gap_s must be longer than a control period of 0.05 s"):
        Driver(LoopSettings(clock_gap_s=0.04))


def test_a_clock_that_goes_back_a_little_stands_still() -> None:
    driver = Driver().start()
    driver.give()
    driver.tick()
    assert driver.loop.observe_state(driver.state, driver.now - 0.06, driver.now - 0.06) is not None, "out of order"
    assert driver.tick().kind is Kind.ACTION
    assert driver.counts["clock_jumps"] == 0


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="now must be a time"):
        Driver().loop.tick(float("nan"))


def test_latency_and_jitter_are_measured() -> None:
    driver = Driver().start()
    request = driver.ask()
    driver.now += 0.03
    driver.loop.deliver(constant(0.1), request, driver.now)
    driver.now += 0.01
    driver.tick()
    driver.now += 0.004
    driver.tick()
    found = driver.loop.measurements
    assert list(found.inference_ms) == pytest.approx([30])
    assert list(found.loop_ms) == pytest.approx([40])
    assert list(found.jitter_ms) == pytest.approx([4])
    summary = found.summary()
    assert summary["jitter_ms"] == {"count": 1, **dict.fromkeys(("p50", "p95", "p99", "max"), pytest.approx(4))}
    assert summary["counts"]["action"] == 2
    assert ControlLoop(ROBOT, DELTA).measurements.summary()["loop_ms"] is None


def test_the_core_needs_numpy_only() -> None:
    blocked = ["torch", "hydra", "omegaconf", "gymnasium", "mujoco", "lerobot", "transformers"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import cogvla.real_robot.control.control_loop"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- asking after a chunk ------------------------------------------------------------------------------------------


def test_asking_after_a_chunk_executes_its_beginning_and_then_looks_at_the_arm_at_rest() -> None:
    driver = Driver(LoopSettings(ask="after", execute_steps=3)).start()
    request = driver.ask()
    for _ in range(2):  # the answer takes two ticks, and nothing of it is lost
        assert driver.tick().action_A is None
    chunk = chunk_of(*[(0.1 * i, 0.0, 0.0) for i in range(8)])
    assert driver.loop.deliver(chunk, request, driver.now) is None
    assert driver.loop.request_due(driver.now) is None, "the chunk has not been executed"
    sent = [driver.tick() for _ in range(3)]
    np.testing.assert_allclose(
        [action_A[0] for command in sent if (action_A := command.action_A) is not None], [0.0, 0.1, 0.2], atol=1e-6
    )
    driver.now -= 0.4 * PERIOD
    driver.observe()
    assert driver.loop.request_due(driver.now) is None, "the last action has not taken effect"
    driver.now += 0.4 * PERIOD
    assert driver.tick().kind is Kind.HOLD
    assert driver.ask().stamp == driver.now
    assert driver.counts["starvations"] == 0
    assert driver.counts["late_actions"] == 0


@pytest.mark.parametrize("limits", [DELTA, ABSOLUTE])
def test_asking_after_a_chunk_waits_until_the_arm_has_braked(limits: SafetyLimits) -> None:
    """Two ticks speed it up by 0.01 a tick, so that it moves for one more while it brakes."""
    limits = replace(limits, acceleration=(4.0, 4.0))
    driver = Driver(LoopSettings(ask="after", execute_steps=2), limits).start()
    assert driver.loop.deliver(constant(1.0), driver.ask(), driver.now) is None
    moved, request = [0.0], None
    while request is None:
        action_A = driver.tick().action_A
        assert action_A is not None
        driver.state[0] = action_A[0] if limits.kind == "absolute" else moved[-1] + 0.1 * action_A[0]
        moved.append(driver.state[0])
        driver.observe()
        request = driver.loop.request_due(driver.now)
    np.testing.assert_allclose(moved, [0.0, 0.01, 0.03, 0.04], atol=1e-6)
    np.testing.assert_allclose(request.observation.state[0, 0], 0.04, atol=1e-6)
    assert request.stamp == driver.now
    driver.tick()
    assert driver.loop._limiter.at_rest


def test_an_observation_just_after_a_tick_belongs_to_it() -> None:
    driver = Driver().start()
    for _ in range(4):
        driver.tick()
    assert driver.ask().tick == 4
    driver.loop.fail(driver.loop._prefetch.in_flight, "again", driver.now)  # type: ignore[arg-type]
    driver.tick()
    driver.now -= 0.8 * PERIOD  # a fifth of a period after tick 4
    driver.loop._prefetch.forget()
    assert driver.ask().tick == 4
    driver.now += 0.5 * PERIOD
    driver.loop._prefetch.forget()
    assert driver.ask().tick == 5
