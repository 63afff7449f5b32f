"""Safety limits: what is sent is inside of them, as near to what was wanted as they allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.configs.build import build
from cogvla.configs.load import load, names
from cogvla.policy.interface import Camera, Embodiment
from cogvla.real_robot.control.control_loop import ControlLoop
from cogvla.real_robot.control.safety import LimitError, SafetyLimiter
from cogvla.real_robot.control.settings import LoopSettings, RobotConfig, SafetyLimits
from cogvla.tests.support.control_robot import ABSOLUTE, DELTA, HZ, PERIOD, ROBOT
from cogvla.tests.support.paths import CONFIGS

ROBOTS = CONFIGS / "robot"
REST = np.zeros(3)


def limiter(limits: SafetyLimits = DELTA, **changes: Any) -> SafetyLimiter:
    return SafetyLimiter(ROBOT, replace(limits, **changes))


def act(first: float, grip: float = 0.0, second: float = 0.0) -> np.ndarray:
    return np.array([first, grip, second])


def follow(guard: SafetyLimiter, targets: list[float]) -> list[float]:
    """The first joint's commands, for an absolute arm that follows at once."""
    state, sent = REST.copy(), []
    for target in targets:
        state[0] = guard.move(act(target), state)[0]
        sent.append(float(state[0]))
    return sent


def test_what_is_inside_of_the_limits_is_sent_as_it_is() -> None:
    guard = limiter(
        position_low=(-1, -1), position_high=(1, 1), step=(0.1, 0.1), velocity=(2, 2), acceleration=(80, 80)
    )
    np.testing.assert_allclose(guard.move(act(0.7, 0.3, -0.4), REST), [0.7, 0.3, -0.4], 1e-12)
    assert guard.limited == ()


def test_step_of_a_delta_is_in_physical_units() -> None:
    guard = limiter(step=(0.05, None))  # action 1.0 is 0.1 m
    np.testing.assert_allclose(guard.move(act(-0.9, 0, 0.9), REST), [-0.5, 0, 0.9])
    assert guard.limited == ("step",)


def test_velocity_of_an_absolute_target() -> None:
    assert follow(limiter(ABSOLUTE, velocity=(1, 1)), [0.2] * 5) == pytest.approx([0.05, 0.10, 0.15, 0.2, 0.2])


def test_acceleration_of_an_absolute_target_up_and_down() -> None:
    # 4 rad/s^2 at 20 Hz: the step grows and shrinks by 0.01 per tick
    sent = follow(limiter(ABSOLUTE, acceleration=(4, 4)), [1.0, 1.0, 1.0, 0.06, 0.06, 0.06, 0.06])
    assert np.diff([0, *sent]) == pytest.approx([0.01, 0.02, 0.03, 0.02, 0.01, 0, -0.01])


def test_a_joint_brakes_before_its_limit() -> None:
    # 0.06 = 0.01 + 0.02 + 0.02 + 0.01: with steps of 0.01 more or less per tick it arrives exactly, at rest
    sent = follow(limiter(ABSOLUTE, acceleration=(4, 4), position_high=(0.06, None)), [9.0] * 6)
    assert sent == pytest.approx([0.01, 0.03, 0.05, 0.06, 0.06, 0.06])


def test_a_hold_brakes_and_then_stays() -> None:
    guard = limiter(ABSOLUTE, acceleration=(4, 4))
    assert guard.hold(REST) is None, "nothing was commanded: nothing to hold"
    follow(guard, [1.0] * 3)
    held = [float(guard.hold(REST)[0]) for _ in range(4)]  # type: ignore[index]
    assert held == pytest.approx([0.06 + 0.02, 0.09, 0.09, 0.09])


def test_a_held_position_is_never_zero() -> None:
    guard = limiter(ABSOLUTE)
    guard.move(act(0.5, 0.25, -0.5), np.array([0.5, -0.5, 0]))
    np.testing.assert_array_equal(guard.hold(None), [0.5, 0.25, -0.5])  # type: ignore[arg-type]


def test_a_held_delta_is_no_motion_with_the_gripper_as_it_was() -> None:
    guard = limiter(acceleration=None)
    guard.move(act(0.5, 0.75, -0.5), REST)
    np.testing.assert_array_equal(guard.hold(REST), [0, 0.75, 0])  # type: ignore[arg-type]


def test_the_workspace_of_deltas_counts_from_the_commanded_position() -> None:
    guard = limiter(position_high=(0.12, None))
    # the arm does not move: the commanded position runs ahead by the leash of 0.05 and no further
    assert [guard.move(act(0.4), REST)[0] for _ in range(3)] == pytest.approx([0.4, 0.4, 0.4])
    assert guard.move(act(1.0), REST)[0] == pytest.approx(0.7)
    assert guard.limited == ("position",)
    assert guard.move(act(1.0), np.array([0.12, 0, 0]))[0] == pytest.approx(0.0)


def test_outside_of_the_workspace_only_the_way_back_is_open() -> None:
    guard = limiter(position_low=(-0.1, None), position_high=(0.1, None), lead=None)
    outside = np.array([0.15, 0, 0])
    assert guard.move(act(0.5), outside)[0] == 0.0
    assert guard.move(act(-0.5), outside)[0] == pytest.approx(-0.5)


def test_an_arm_outside_of_its_joint_limits_is_not_moved() -> None:
    guard = limiter(ABSOLUTE, position_low=(-1, -1), position_high=(1, 1))
    with pytest.raises(LimitError, match=r"outside its joint limits \(1: 1\.2000\)"):
        guard.move(act(0), np.array([0, 1.2, 0]))
    assert guard.move(act(0.9, 0, 0.9), np.array([0.9, 1.005, 0]))[2] == 0.9, "within the tolerance"


def test_an_arm_in_degrees_may_rest_on_its_stop() -> None:
    limits = build(RobotConfig, load("robot", "so101"), "robot").limits
    guard = SafetyLimiter(build(Embodiment, load("embodiment", "so101"), "embodiment"), limits)
    low = np.array([*(limits.position_low or ()), 50.0])
    np.testing.assert_array_equal(guard.move(low, low - 0.6)[:5], low[:5])


def test_an_arm_that_does_not_follow_is_a_fault() -> None:
    guard = limiter(ABSOLUTE, lead=(0.3, 0.3))
    guard.move(act(0.25), REST)
    guard.move(act(0.35), REST)
    with pytest.raises(LimitError, match="does not follow"):
        guard.move(act(0.35), REST)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_what_is_not_finite_is_never_sent(bad: float, dimension: int) -> None:
    action = act(0.1)
    action[dimension] = bad
    with pytest.raises(LimitError, match="not finite"):
        limiter().move(action, REST)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("position", {"position_high": (0.04, None)}),
        ("step", {"step": (0.04, None)}),
        ("velocity", {"velocity": (0.8, None)}),
        ("acceleration", {"acceleration": (16, None)}),
    ],
)
@pytest.mark.parametrize("base", [DELTA, ABSOLUTE])
def test_each_limit_clamps_or_rejects(name: str, limits: dict[str, Any], base: SafetyLimits) -> None:
    wanted = act(0.5) if base is DELTA else act(0.05)
    allowed = 0.8 * wanted  # 0.04 of 0.05 rad or m; 16 per second squared are 0.04 in the first tick
    guard = limiter(base, **limits)
    np.testing.assert_allclose(guard.move(wanted, REST), allowed, atol=1e-12)
    assert guard.limited == (name,)
    with pytest.raises(LimitError, match=f"past the {name} limit"):
        limiter(base, **limits, reject=(name,)).move(wanted, REST)
    others = tuple({"position", "step", "velocity", "acceleration"} - {name})
    far = dict.fromkeys(("position_high", "step", "velocity", "acceleration"), (1e3, None))
    limiter(base, **far | limits, reject=others).move(wanted, REST)


def test_the_gripper_is_clamped_to_its_range_and_apart_from_the_arm() -> None:
    guard = limiter(step=(1e-6, 1e-6), acceleration=(1e-6, 1e-6), reject=())
    assert [guard.move(act(0, grip), REST)[1] for grip in (1.0, -1.0, 7.0, -7.0)] == [1, -1, 1, -1]
    guard = limiter(gripper_step=0.25)
    assert [guard.move(act(0, grip), REST)[1] for grip in (1.0, -1.0, -1.0, 0.6)] == [1, 0.75, 0.5, 0.6]


def test_a_measured_gripper_does_not_jump_at_the_start() -> None:
    robot = Embodiment("two", (Camera("front", 4, 4),), 3, 3, 8, HZ, gripper_index=(1, 2))
    limits = SafetyLimits("delta", step=(0.1,), gripper_step=0.25, gripper_state=(2, None))
    guard, state = SafetyLimiter(robot, limits), np.array([0.0, 0.0, 0.5])
    wanted = [guard.move(np.array([0.0, -1.0, -1.0]), state)[1:].tolist() for _ in range(2)]
    assert wanted == [[0.25, -1], [0, -1]], "the other one is not measured; later steps start from the last command"
    guard.forget()
    assert guard.move(np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, -7.0]))[1] == -0.75, "it is measured past its end"
    for gripper_state, said in (((2,), "has 1 entries; 'two' has 2 grippers"), ((0, 3), r"\[3\] is outside")):
        with pytest.raises(ValueError, match=said):
            SafetyLimiter(robot, replace(limits, gripper_state=gripper_state))
    with pytest.raises(ValueError, match=r"gripper_state of left is 2, the position of right: give 1"):
        limits.check_names(robot, ["arm", "left", "right"], ["arm", "left", "right"])


@pytest.mark.parametrize("grippers", [None, 3, (1, 3), (0, 2, 3)])
def test_every_gripper_is_apart_from_the_arm(grippers: int | tuple[int, ...] | None) -> None:
    robot = Embodiment("many", (Camera("front", 4, 4),), 4, 4, 8, HZ, gripper_index=grippers)
    arm = [i for i in range(4) if i not in robot.grippers]
    guard = SafetyLimiter(robot, SafetyLimits("delta", step=(0.1,) * len(arm), gripper_step=0.5))
    wanted_A = np.array([2.0, -2.0, 3.0, -0.4])
    first_A, second_A, held_A = guard.move(wanted_A, np.zeros(4)), guard.move(-wanted_A, np.zeros(4)), guard.hold(None)
    for i in robot.grippers:
        assert first_A[i] == np.clip(wanted_A[i], -1, 1)
        assert second_A[i] == np.clip(-wanted_A[i], first_A[i] - 0.5, first_A[i] + 0.5)
    np.testing.assert_allclose(np.abs(first_A[arm]), 0.1)
    assert held_A is not None
    assert held_A.tolist() == [second_A[i] if i in robot.grippers else 0 for i in range(4)]
    with pytest.raises(ValueError, match=f"'many' has {len(arm)} arm dimensions"):
        SafetyLimiter(robot, SafetyLimits("delta", step=(0.1,) * (len(arm) + 1)))


def test_forget_starts_at_the_measured_position() -> None:
    guard = limiter(ABSOLUTE, step=(0.1, 0.1))
    guard.move(act(0.1), REST)
    guard.forget()
    assert guard.hold(REST) is None
    assert guard.move(act(0.9), np.array([0.5, 0, 0]))[0] == pytest.approx(0.6)


LIMITED = SafetyLimits(
    kind="absolute",
    state_index=(0, 1),
    position_low=(-0.5, -0.2),
    position_high=(0.5, 0.3),
    step=(0.12, 0.2),
    velocity=(3.0, 1.0),
    acceleration=(5.0, 9.0),
)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), reach=st.sampled_from([0.01, 0.1, 0.6, 1e6]), patience=st.integers(1, 20))
def test_absolute_commands_hold_every_limit_whatever_is_wanted(seed: int, reach: float, patience: int) -> None:
    """Targets near and far, kept for a while or changed at once, with holds: the arm meets its limits at all speeds."""
    guard, rng = SafetyLimiter(ROBOT, LIMITED), np.random.default_rng(seed)
    sent = [REST[:2], REST[:2]]
    for tick in range(100):
        if tick % patience == 0:
            target = None if rng.random() < 0.2 else rng.uniform(-reach, reach, 3)
        state = np.append(sent[-1], 0)
        command = guard.hold(state) if target is None else guard.move(target, state)
        if command is not None:
            sent.append(command[[0, 2]])
    positions = np.array(sent)
    steps = np.diff(positions, axis=0)
    assert (positions >= np.array([-0.5, -0.2])).all()
    assert (positions <= np.array([0.5, 0.3])).all()
    assert (np.abs(steps) <= np.minimum((0.12, 0.2), np.array((3.0, 1.0)) * PERIOD) + 1e-12).all()
    assert (np.abs(np.diff(steps, axis=0)) <= np.array((5.0, 9.0)) * PERIOD**2 + 1e-12).all()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_deltas_stay_in_the_workspace_whatever_is_measured(seed: int) -> None:
    low, high, step, lead = -0.15, 0.15, 0.08, 0.05
    guard = limiter(
        position_low=(low, None),
        position_high=(high, None),
        step=(step, step),
        acceleration=(20, 20),
        lead=(lead, lead),
    )
    rng, commanded, before = np.random.default_rng(seed), None, 0.0
    for _ in range(80):
        measured = rng.uniform(-0.2, 0.2)
        start = measured if commanded is None else measured + np.clip(commanded - measured, -lead, lead)
        moved = guard.move(rng.uniform(-3, 3, 3), np.array([measured, 0, 0]))[0] * 0.1
        commanded = start + moved
        assert abs(moved) <= step + 1e-12
        assert min(low - start, 0) - 1e-12 <= moved <= max(high - start, 0) + 1e-12
        if abs(start) < 0.02:  # far from the limits: nothing to brake for
            assert abs(moved - before) <= 20 * PERIOD**2 + 1e-12
        before = moved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "torque"}, "kind must be one of delta, absolute"),
        ({"reject": ("speed",)}, "reject names"),
        ({"reject": ("step", "position"), "step": (0.1, None)}, "reject names position, which has no limit"),
        ({"lead": (0.1, 0.1), "state_index": (0, None)}, r"\[1\] need a state_index"),
        ({"step": (0.0, 0.1)}, "step must be positive"),
        ({"velocity": (np.nan, 0.1)}, "velocity must be positive"),
        ({"position_high": (np.inf, 1.0)}, r"position_high must be finite numbers \(null: no limit\), got inf"),
        ({"position_low": (0.0, np.nan)}, "position_low must be finite"),
        ({"gripper_step": -1.0}, "gripper_step"),
        ({"position_low": (1, 1), "position_high": (0, 2)}, "must be below"),
        ({"step": (0.1,) * 3}, "step has 3 entries; 'two_joints' has 2 arm dimensions"),
        ({"state_index": (0, 7)}, "outside the 3 state dimensions"),
        ({"state_index": (0, None), "position_low": (0, 0)}, r"\[1\] need a state_index"),
        ({"kind": "absolute"}, "absolute targets have no scale"),
    ],
)
def test_wrong_limits_say_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        limiter(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gripper_open": np.nan}, "gripper_open and gripper_close must be finite numbers, got nan and "),
        ({"gripper_close": np.inf}, "must be finite"),
        ({"control_hz": np.nan}, "control_hz must be positive"),
    ],
)
def test_numbers_of_an_embodiment_that_make_commands_are_finite(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(ROBOT, **changes)


def embodiment_of(config: RobotConfig) -> Embodiment:
    camera = (Camera("front", 4, 4),)
    if config.limits.kind == "absolute":
        assert config.limits.state_index is not None
        arm = len(config.limits.state_index)
        dims = (arm + 1, arm + 1, 16, 30.0)
        return Embodiment("joints", camera, *dims, gripper_index=arm, gripper_open=1.0, gripper_close=0.0)
    return Embodiment("pose", camera, 8, 7, 8, HZ, gripper_index=6)


@pytest.mark.parametrize("name", names("robot"))
def test_every_robot_file_makes_a_loop(name: str) -> None:
    config = build(RobotConfig, load("robot", name), "robot")
    assert ControlLoop(embodiment_of(config), config.limits, config.loop).fault is None


def test_chunks_that_never_overlap_are_not_blended() -> None:
    with pytest.raises(ValueError, match="overlap=ensemble needs ask=ahead"):
        LoopSettings(ask="after", overlap="ensemble")


def test_an_unknown_key_of_a_robot_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown key speed in robot\.limits; valid keys are kind, scale"):
        build(RobotConfig, {"name": "x", "limits": {"kind": "delta", "speed": 3}}, "robot")
