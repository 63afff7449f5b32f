"""Which samples are taken, which are refused and why, and which belong together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cogvla.real_robot.control.observations import Observations, Synchronised
from cogvla.real_robot.control.settings import LoopSettings
from cogvla.tests.support.control_robot import ROBOT, image

SETTINGS = LoopSettings(image_age_s=0.2, state_age_s=0.1, sync_tolerance_s=0.03, future_tolerance_s=0.01)
STATE = np.arange(3.0)


def observations(**changes: Any) -> Observations:
    return Observations(ROBOT, LoopSettings(**{**SETTINGS.__dict__, **changes}))


def filled(front: list[float], wrist: list[float], state: list[float], now: float = 1.0) -> Observations:
    """Samples at these times; an image shows its index, a state begins with it."""
    seen = observations(image_age_s=10.0, state_age_s=10.0)
    for index, stamp in enumerate(front):
        assert seen.add_image("front", image("front", index), stamp, now) is None
    for index, stamp in enumerate(wrist):
        assert seen.add_image("wrist", image("wrist", index), stamp, now) is None
    for index, stamp in enumerate(state):
        assert seen.add_state(np.full(3, index), stamp, now) is None
    return seen


def chosen(seen: Observations) -> tuple[float, int, int, int]:
    """Common stamp and the index of each sample in it."""
    found = seen.synchronised()
    assert isinstance(found, Synchronised), found
    return found.stamp, int(found.images["front"].max()), int(found.images["wrist"].max()), int(found.state_S[0])


def test_the_slowest_sensor_decides_and_the_others_give_their_nearest() -> None:
    seen = filled(front=[0.80, 0.85, 0.90], wrist=[0.80, 0.86], state=[0.83, 0.84, 0.85, 0.875, 0.89])
    assert chosen(seen) == (0.86, 1, 1, 2)


def test_of_two_equally_near_samples_the_newer_is_taken() -> None:
    gap = 1 / 64
    seen = filled(front=[0.5, 0.5 + 2 * gap], wrist=[0.5 + gap], state=[0.5, 0.75])
    assert chosen(seen) == (0.5 + gap, 1, 0, 0)


@pytest.mark.parametrize("distance", [0.029, 0.031])
def test_the_tolerance_is_the_limit(distance: float) -> None:
    found = filled(front=[0.5, 0.9], wrist=[0.5 + distance], state=[0.5 + distance]).synchronised()
    assert isinstance(found, Synchronised) == (distance < 0.03)
    if isinstance(found, str):
        assert found == "front: nearest sample is 0.031 s from the others, at most 0.03 s are allowed"


def test_what_is_missing_is_named() -> None:
    assert filled([0.5], [], []).synchronised() == "nothing received yet from wrist, state"


@pytest.mark.parametrize(
    ("stamp", "kind", "words"),
    [
        (0.79, "stale", "0.210 s old on arrival, at most 0.2 s are allowed"),
        (1.02, "future", "0.020 s in the future"),
        (0.95, "duplicate", "same stamp"),
        (0.90, "out_of_order", "0.050 s older"),
        (float("nan"), "bad_stamp", "not a finite time"),
        (float("inf"), "bad_stamp", "not a finite time"),
    ],
)
def test_bad_stamps_are_refused_and_change_nothing(stamp: float, kind: str, words: str) -> None:
    seen = observations()
    assert seen.add_image("front", image("front"), 0.95, 1.0) is None
    reason = seen.add_image("front", image("front", 9), stamp, 1.0)
    assert reason is not None
    assert words in reason
    assert seen.refusals == {f"front: {kind}": 1}
    assert seen.last_refusal == {"front": reason}
    assert seen.ages(1.0)["front"] == pytest.approx(0.05)
    assert seen.add_image("front", image("front"), 0.96, 1.0) is None
    assert seen.last_refusal == {}, "a good sample clears the message"
    assert seen.refusals.total() == 1


def test_a_stamp_a_little_ahead_is_taken() -> None:
    assert observations().add_state(STATE, 1.005, 1.0) is None


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((2, 3, 3), np.float32), "got float32 (2, 3, 3)"),
        (np.zeros((3, 2, 3), np.uint8), "expected uint8 (2, 3, 3), got uint8 (3, 2, 3)"),
        (np.zeros((2, 3), np.uint8), "got uint8 (2, 3)"),
        (np.zeros((1, 2, 3, 3), np.uint8), "got uint8 (1, 2, 3, 3)"),
        (None, "got NoneType"),
    ],
)
def test_bad_images_are_refused(picture: Any, words: str) -> None:
    seen = observations()
    assert words in str(seen.add_image("front", picture, 1.0, 1.0))
    assert seen.refusals == {"front: wrong_image": 1}
    assert words in str(seen.stale(1.0)), "diagnostics say why nothing is there"


def test_a_camera_that_does_not_exist_is_named_with_those_that_do() -> None:
    refusal = observations().add_image("top", image("front"), 1.0, 1.0)
    assert refusal == "top: no such camera; the cameras are front, wrist"


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (np.zeros(4), "wrong_state"),
        (np.zeros((1, 3)), "wrong_state"),
        (["a", "b", "c"], "wrong_state"),
        (object(), "wrong_state"),
        ([0.0, np.nan, 0.0], "not_finite"),
        ([0.0, np.inf, 0.0], "not_finite"),
    ],
)
def test_bad_states_are_refused(state: Any, kind: str) -> None:
    seen = observations()
    assert seen.add_state(state, 1.0, 1.0) is not None
    assert seen.refusals == {f"state: {kind}": 1}
    assert seen.newest_state is None


def test_a_state_is_copied() -> None:
    seen, state = observations(), STATE.copy()
    seen.add_state(state, 1.0, 1.0)
    state[:] = 9
    np.testing.assert_array_equal(seen.newest_state, STATE)


def test_staleness_names_the_sensor_and_ends_with_a_new_sample() -> None:
    seen = observations()
    for camera in ROBOT.camera_names:
        seen.add_image(camera, image(camera), 1.0, 1.0)
    assert seen.stale(1.0) == "state: nothing received yet"
    seen.add_state(STATE, 1.0, 1.0)
    assert seen.stale(1.0) is None
    assert seen.stale(1.099) is None
    assert seen.stale(1.15) == "state: 0.150 s old, at most 0.1 s are allowed"
    seen.add_state(STATE, 1.25, 1.25)
    assert seen.stale(1.25) == "front: 0.250 s old, at most 0.2 s are allowed"


def test_a_sensor_that_worked_and_is_refused_is_reported_with_the_reason() -> None:
    seen = filled([1.0], [1.0], [1.0])
    seen.refuse("front", "unreadable", "TimeoutError: no image")
    assert seen.stale(1.1) is None
    assert seen.stale(11.5) == "front: 10.500 s old, at most 10 s are allowed; TimeoutError: no image"
    seen.add_image("front", image("front"), 2.0, 2.0)
    assert seen.stale(12.5) == "front: 10.500 s old, at most 10 s are allowed"


def test_sensors_whose_clock_jumps_are_refused_until_it_is_right_again() -> None:
    seen = observations()
    assert seen.add_state(STATE, 1.00, 1.00) is None
    assert "future" in str(seen.add_state(STATE, 11.02, 1.02)), "the clock jumped ahead by 10 s"
    assert "old on arrival" in str(seen.add_state(STATE, 1.04 - 10, 1.04)), "and back"
    assert seen.add_state(STATE, 1.06, 1.06) is None
    assert seen.refusals == {"state: future": 1, "state: stale": 1}


def frozen(value_of: Any, state_of: Any, **changes: Any) -> str | None:
    """What is stale after 0.6 s at 10 Hz; `front` shows value_of(i), the robot is at state_of(i)."""
    seen = observations(**{"frozen_after_s": 0.4, "frozen_motion": 0.02, **changes})
    for i in range(7):
        now = 1.0 + 0.1 * i
        seen.add_state(np.full(3, state_of(i)), now, now)
        seen.add_image("front", image("front", value_of(i)), now, now)
        seen.add_image("wrist", image("wrist", i), now, now)
    return seen.stale(1.6)


def test_a_camera_that_does_not_see_the_motion_is_frozen() -> None:
    assert "front: the same image for 0.600 s" in str(frozen(lambda i: 7, lambda i: 0.01 * i))


def test_frozen_needs_motion_time_and_an_equal_image() -> None:
    assert frozen(lambda i: 7, lambda i: 0.001 * i) is None, "the arm rests"
    assert frozen(lambda i: i // 3, lambda i: 0.01 * i) is None, "the image changes"
    assert frozen(lambda i: 7, lambda i: 0.01 * i, frozen_after_s=0.7) is None, "not yet"
    assert frozen(lambda i: 7, lambda i: 0.01 * i, frozen_after_s=None) is None, "not checked"
