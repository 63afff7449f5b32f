"""The forecast of the state: exact where the robot is linear, and what a policy does with it.

Shape legend: as in `policy.inputs.forecast`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogvla.policy.checkpoint import FORECAST, load_policy, save_checkpoint, save_forecast
from cogvla.policy.inputs.forecast import Forecast, shifted
from cogvla.policy.interface import Committed
from cogvla.tests.support.small_data import INSTRUCTIONS, ROBOT, small_data, small_policy

S, A, K = ROBOT.state_dim, ROBOT.action_dim, ROBOT.chunk
GAIN = np.random.default_rng(1).normal(0, 0.3, (A, S))


def linear_robot(frames: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every action moves the state by `action @ GAIN`, and a tenth of the state is lost; episodes of 20 frames."""
    rng = np.random.default_rng(seed)
    action_NA, state_NS = rng.normal(0, 1, (frames, A)), np.zeros((frames, S))
    for frame in range(1, frames):
        before = state_NS[frame - 1]
        state_NS[frame] = rng.normal(0, 1, S) if frame % 20 == 0 else 0.9 * before + action_NA[frame - 1] @ GAIN
    return state_NS.astype(np.float32), action_NA.astype(np.float32), np.arange(frames) // 20


@pytest.fixture(scope="module")
def forecast() -> Forecast:
    return Forecast.fit(*linear_robot(), K, {"data_set": {"name": "linear"}})


def test_a_linear_robot_is_known_exactly(forecast: Forecast) -> None:
    state_NS, action_NA, _ = linear_robot(seed=5)
    delay_B = np.arange(K)  # from frame 0 of the same episode
    after_BS = forecast.after(np.tile(state_NS[0], (K, 1)), np.tile(action_NA[:K], (K, 1, 1)), delay_B)
    np.testing.assert_allclose(after_BS, state_NS[:K], atol=1e-4)
    np.testing.assert_array_equal(after_BS[0], state_NS[0])
    assert np.array(forecast.explained).min() > 0.999


def test_only_actions_before_the_delay_count(forecast: Forecast) -> None:
    state_BS, actions_BKA = np.zeros((1, S), np.float32), np.ones((1, K, A), np.float32)
    other_BKA = actions_BKA.copy()
    other_BKA[:, 2:] = 9.0
    delay_B = np.array([2])
    expected_BS = forecast.after(state_BS, actions_BKA, delay_B)
    np.testing.assert_array_equal(forecast.after(state_BS, other_BKA, delay_B), expected_BS)


def test_random_motion_is_not_explained() -> None:
    rng = np.random.default_rng(0)
    walk_NS = rng.normal(0, 1, (2000, S)).cumsum(0)
    found = Forecast.fit(walk_NS, rng.normal(0, 1, (2000, A)), np.zeros(2000), K, {})
    assert np.array(found.explained).max() < 0.2


def test_shifted_chunks() -> None:
    chunk_BKA = np.arange(8.0, dtype=np.float32).reshape(2, 4, 1)
    committed_BKA = -np.ones((2, 4, 1), np.float32)
    found = shifted(chunk_BKA, committed_BKA, np.array([0, 3]))
    assert found[..., 0].tolist() == [[0, 1, 2, 3], [-1, -1, -1, 4]]
    assert found.dtype == np.float32


def test_too_few_frames_are_refused() -> None:
    state_NS, action_NA, episode_N = linear_robot(60)
    with pytest.raises(ValueError, match=r"the data set has 57 frames .* needs 80: record more"):
        Forecast.fit(state_NS, action_NA, episode_N, K, {})


def test_a_policy_acts_from_where_the_robot_will_be(tmp_path: Path, forecast: Forecast) -> None:
    plain = small_policy()
    data = small_data()
    save_checkpoint(
        tmp_path / "it", plain.model.state_dict(), plain.model.config, plain.preprocessor, data.statistics(), {}
    )
    save_forecast(tmp_path / "it", forecast)
    policy = load_policy(tmp_path / "it")
    assert policy.reads_committed
    assert policy.describe()["committed"] == "forecast"
    seen = replace(ROBOT.fake_observation(3), instruction=INSTRUCTIONS)
    np.testing.assert_array_equal(policy.act(seen).actions, plain.act(seen).actions)
    plan_NA = np.full((3, A), 0.2, np.float32)
    found_BKA = policy.act(replace(seen, committed=[None, Committed(plan_NA, 2), Committed(plan_NA[:0], 0)])).actions
    later_BS = forecast.after(seen.state, np.pad(plan_NA[None], ((0, 2), (0, 1), (0, 0))), np.array([2, 0, 0]))
    moved_BS = seen.state.copy()
    moved_BS[1] = forecast.after(seen.state[1:2], np.pad(plan_NA[None], ((0, 0), (0, 1), (0, 0))), np.array([2]))[0]
    assert not np.allclose(later_BS, seen.state)
    expected_BKA = plain.act(replace(seen, state=moved_BS)).actions
    np.testing.assert_allclose(found_BKA[[0, 2]], expected_BKA[[0, 2]], atol=1e-5)
    np.testing.assert_array_equal(found_BKA[1, :2], plan_NA[:2])
    np.testing.assert_allclose(found_BKA[1, 2:], expected_BKA[1, :2], atol=1e-5)


@pytest.mark.parametrize("damage", ["", "{}", '{"map": [[[1]]], "explained": [], "about": {}}'])
def test_a_damaged_file_is_named(tmp_path: Path, forecast: Forecast, damage: str) -> None:
    plain, folder = small_policy(), tmp_path / "it"
    save_checkpoint(
        folder, plain.model.state_dict(), plain.model.config, plain.preprocessor, small_data().statistics(), {}
    )
    save_forecast(folder, forecast)
    assert json.loads((folder / FORECAST).read_text())["about"]["data_set"]["name"] == "linear"
    (folder / FORECAST).write_text(damage)
    with pytest.raises(ValueError, match=r"forecast.json") as refused:
        load_policy(folder)
    assert "\n" not in str(refused.value)
