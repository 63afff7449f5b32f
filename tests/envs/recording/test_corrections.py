"""Corrections: who acts when, what is recorded, and that chance and interruptions change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from cogvla.envs.contract import ContractError
from cogvla.envs.perturbation.perturbation import CrowdedSceneError
from cogvla.envs.recording.correction_pool import Corrected
from cogvla.envs.recording.demonstrator import MAX_ATTEMPTS, STEPS_AFTER_SUCCESS, ExpertFailedError
from cogvla.envs.recording.progress import ANOTHER_PLACE, Progress
from cogvla.envs.recording.recorder import record
from cogvla.envs.suite import FIRST_TRAINING_STATE
from cogvla.policy.interface import ActionChunk, Camera, Observation
from cogvla.tests.support import toy_suite
from cogvla.tests.support.toy_suite import (
    NAME,
    PLACES,
    DesertingExpert,
    NeverExpert,
    SilentExpert,
    ToyExpert,
    ToyPolicy,
)

PATIENCE = 6
EPISODES = 4
toy_suite.register()


def corrections(root: Path, policy: ToyPolicy, episodes: int = EPISODES, workers: int = 0, **other: Any) -> Path:
    corrected = Corrected(policy, {"weights_sha256": "a"}, PATIENCE)
    given: dict[str, Any] = {"expert": ToyExpert, "corrected": corrected} | other
    return record(NAME, episodes, root, image_size=16, workers=workers, **given)


def rows(root: Path) -> list[dict]:
    return pq.read_table(sorted((root / "data").glob("*/*.parquet"))).to_pylist()


def episode(root: Path, number: int = 0) -> dict[str, np.ndarray]:
    """Columns of an episode."""
    of_it = [row for row in rows(root) if row["episode_index"] == number]
    return {name: np.array([row[name] for row in of_it]) for name in of_it[0] if "images" not in name}


def test_a_policy_that_needs_no_help_acts_alone_and_the_expert_says_what_should_be_done(tmp_path: Path) -> None:
    root = corrections(tmp_path / "toy", ToyPolicy(0.04))
    seen = episode(root)
    assert not seen["intervention"].any()
    position = seen["observation.state"][:, :3]
    toward = PLACES[0] - position
    np.testing.assert_allclose(seen["action"][:, :3], np.clip(3 * toward, -0.5, 0.5), atol=1e-5)
    np.testing.assert_allclose(np.diff(position, axis=0), 0.1 * seen["label.executed_action"][:-1, :3], atol=1e-6)
    assert np.abs(seen["action"] - seen["label.executed_action"]).max() > 0.1
    arrived = np.flatnonzero(np.linalg.norm(toward, axis=1) < 0.1)[0]
    assert len(position) == arrived + STEPS_AFTER_SUCCESS
    made = json.loads((root / "meta" / "recording.json").read_text())
    assert (made["solved_alone"], made["intervention_share"]) == (EPISODES, 0)
    assert made["policy"] == {
        "checkpoint": "toy", "step": 7, "weights_sha256": "a", "execute_steps": 4, "patience": PATIENCE,
        "helps_until": "next subgoal",
    }  # fmt: skip


@pytest.mark.parametrize(("speed", "alone"), [(0.0, PATIENCE), (-0.02, PATIENCE), (0.004, 40), (0.0105, 40)])
def test_the_expert_takes_over_from_one_that_hovers_errs_crawls_or_runs_out_of_time(
    tmp_path: Path, speed: float, alone: int
) -> None:
    """`alone`: the policy's control steps; a crawl of 4 mm in each step is progress every third step."""
    root = corrections(tmp_path / "toy", ToyPolicy(speed), 1, noise=0.0)
    seen = episode(root)
    by_expert = seen["intervention"]
    steps = int(np.argmax(by_expert))
    assert by_expert[steps:].all()
    assert not by_expert[:steps].any()
    assert steps == alone
    np.testing.assert_array_equal(seen["action"][steps:], seen["label.executed_action"][steps:])
    assert np.linalg.norm(seen["observation.state"][-1, :3] - PLACES[0]) < 0.1
    assert json.loads((root / "meta" / "recording.json").read_text())["solved_alone"] == 0


class Detour(toy_suite.ToyEnv):
    """The way leads over the starting point's left: the first subgoal."""

    def reset(self, **other: Any) -> tuple[Any, dict[str, Any]]:
        self.aside = False
        observation, info = super().reset(**other)
        self.over = self.position - [0, 0.3, 0]
        return observation, info

    def labels_for(self, task: int) -> dict[str, np.ndarray]:
        return super().labels_for(task) if self.aside else {"target": self.over, "goal": self.over + 1}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.position += 0.1 * np.clip(action[:3], -1, 1)
        self.aside |= bool(np.linalg.norm(self.position - self.over) < 0.05)
        self.position -= 0.1 * np.clip(action[:3], -1, 1)
        return super().step(action)

    def _info(self) -> dict[str, Any]:
        info = super()._info()
        return {**info, "success": info["success"] and self.aside}


class DetourExpert(ToyExpert):
    def act(self) -> np.ndarray:
        toward = self.env.labels()["target"] - self.env.position
        return np.append(np.clip(3 * toward, -0.5, 0.5), [0, 0, 0, 1]).astype(np.float32)


@pytest.mark.parametrize(("speed", "hands_over"), [(0.0, 2), (0.03, 1)])
def test_the_expert_helps_until_the_next_subgoal(tmp_path: Path, speed: float, hands_over: int) -> None:
    """`ToyPolicy` knows nothing of the detour; one that moves does the second subgoal alone."""
    begins: list[Sequence[Hashable]] = []  # for the slot, the attempt, and each time that the policy goes on

    class Remembers(ToyPolicy):
        def begin(self, slots: Sequence[Hashable]) -> None:
            begins.append(slots)

        def end(self, slots: Sequence[Hashable]) -> None:
            pass

    suite = replace(toy_suite.suite(), make=Detour)
    corrected = Corrected(Remembers(speed), patience=PATIENCE)
    root = record(
        suite, 1, tmp_path / "toy", image_size=16, workers=0, expert=DetourExpert, corrected=corrected, noise=0.0
    )
    seen = episode(root)
    taken = np.flatnonzero(np.diff(np.append(False, seen["intervention"]).astype(int)) == 1)
    given = np.flatnonzero(np.diff(seen["intervention"].astype(int)) == -1) + 1
    next_subgoal = np.flatnonzero(np.abs(np.diff(seen["label.target"], axis=0)).max(1) > ANOTHER_PLACE) + 1
    assert len(taken) == hands_over
    np.testing.assert_array_equal(given, next_subgoal)
    assert len(begins) == 2 + len(given), "what the policy remembers is of other states"
    assert taken[0] >= PATIENCE
    if hands_over == 2:
        assert taken[1] == given[0] + PATIENCE
    made = json.loads((root / "meta" / "recording.json").read_text())
    assert made["solved_alone"] == 0
    assert made["intervention_share"] == round(seen["intervention"].mean(), 4)


def test_the_expert_does_the_rest_at_the_step_limit_even_if_a_subgoal_begins_there(tmp_path: Path) -> None:
    def recorded(limit: int) -> np.ndarray:
        suite = replace(toy_suite.suite(), make=Detour, max_steps=limit)
        given: dict[str, Any] = {"image_size": 16, "workers": 0, "expert": DetourExpert, "noise": 0.0}
        corrected = Corrected(ToyPolicy(0.0), patience=PATIENCE)
        return episode(record(suite, 1, tmp_path / str(limit), corrected=corrected, **given))["intervention"]

    handed_back = int(np.flatnonzero(np.diff(recorded(40).astype(int)) == -1)[0]) + 1
    assert recorded(handed_back)[PATIENCE:].all(), "the policy has no steps left"


def test_noise_is_the_experts_and_not_the_policys(tmp_path: Path) -> None:
    seen = episode(corrections(tmp_path / "toy", ToyPolicy(0.0), 1, noise=1.0))
    by_expert = seen["intervention"]
    np.testing.assert_allclose(seen["label.executed_action"][~by_expert], 1e-4)
    assert np.abs(seen["action"] - seen["label.executed_action"])[by_expert].max() > 0.01


@pytest.mark.parametrize("speed", [0.0, 0.04, 0.0105])
def test_any_number_of_workers_records_the_same(tmp_path: Path, speed: float) -> None:
    """`ToyPolicy` answers a batch differently than one."""
    one, two, four = (corrections(tmp_path / str(n), ToyPolicy(speed), 6, workers=n) for n in (0, 2, 4))
    assert rows(one) == rows(two) == rows(four)


def test_initial_states_are_others_than_those_of_demonstrations(tmp_path: Path) -> None:
    first = episode(record(NAME, 1, tmp_path / "first", image_size=16, workers=0, expert=ToyExpert))
    later = [episode(corrections(tmp_path / str(s), ToyPolicy(0.0), 1, seed=s)) for s in (0, 1)]
    states = [int(seen["label.initial_state"][0]) for seen in (first, *later)]
    assert states == [FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 500_000, FIRST_TRAINING_STATE + 1_500_000]
    assert "intervention" not in first


def test_lerobot_reads_the_column(tmp_path: Path) -> None:
    root = corrections(tmp_path / "toy", ToyPolicy(0.0))
    data = LeRobotDataset(f"cogvla/{NAME}", root=root)
    assert data.meta.features["intervention"]["dtype"] == "bool"
    assert [bool(data[i]["intervention"]) for i in (0, PATIENCE - 1, PATIENCE)] == [False, False, True]


def test_a_scene_that_nobody_can_mend_is_left_to_the_expert_from_the_beginning(tmp_path: Path) -> None:
    seen = episode(corrections(tmp_path / "toy", ToyPolicy(0.0), 1, expert=DesertingExpert))
    assert seen["intervention"].all()
    assert seen["label.initial_state"][0] == FIRST_TRAINING_STATE + 500_000 + MAX_ATTEMPTS - 1


class Crowded(toy_suite.ToyEnv):
    """Has room in the last scene of an episode only."""

    def reset(self, **other: Any) -> tuple[Any, dict[str, Any]]:
        if other["options"]["initial_state"] % MAX_ATTEMPTS != MAX_ATTEMPTS - 1:
            raise CrowdedSceneError("no room")
        return super().reset(**other)


def test_an_episode_in_which_the_policy_never_acts_is_recorded(tmp_path: Path) -> None:
    suite = replace(toy_suite.suite(), make=Crowded)
    corrected = Corrected(ToyPolicy(0.04), patience=PATIENCE)
    root = record(suite, 2, tmp_path / "toy", image_size=16, workers=0, expert=ToyExpert, corrected=corrected)
    assert all(episode(root, number)["intervention"].all() for number in range(2))


def test_a_policy_that_remembers_forgets_the_scene_of_a_failed_attempt(tmp_path: Path) -> None:
    told: list[str] = []

    class Remembers(ToyPolicy):
        def begin(self, slots: Sequence[Hashable]) -> None:
            told.append("begin")

        def end(self, slots: Sequence[Hashable]) -> None:
            pass

        def act(self, observation: Observation) -> ActionChunk:
            told.append("act")
            return super().act(observation)

    corrections(tmp_path / "toy", Remembers(0.0), 1, expert=DesertingExpert)
    story = " ".join(told).replace("begin begin", "begin")
    attempts = story.split("begin")[1:]
    assert len(attempts) == MAX_ATTEMPTS - 1
    assert all(attempt.split() for attempt in attempts), "each attempt of the policy is an episode of its own"


def test_another_task_of_the_scene_is_corrected_too(tmp_path: Path) -> None:
    root = corrections(tmp_path / "toy", ToyPolicy(0.04), 6, counterfactual=1.0)
    for number in range(6):
        seen = episode(root, number)
        task = int(seen["label.task"][0])
        assert task != seen["label.scene_task"][0] == number % 3
        assert np.linalg.norm(seen["observation.state"][-1, :3] - PLACES[task]) < 0.1
        assert not seen["intervention"].any(), "the policy was told the other instruction"


def test_words_that_the_policy_does_not_know_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Knows(ToyPolicy):
        def unknown_words(self, instruction: str) -> list[str]:
            return [word for word in instruction.split() if word == "up"]

    corrections(tmp_path / "toy", Knows(0.04), 3)
    assert "toy: the policy does not know words of 1 tasks (1): up" in caplog.text


def test_recordings_grow(tmp_path: Path) -> None:
    policy = ToyPolicy(0.0)
    root = corrections(tmp_path / "toy", policy, 2)
    assert rows(corrections(root, policy, 5, grow=True)) == rows(corrections(tmp_path / "at_once", policy, 5))


def test_another_policy_is_refused(tmp_path: Path) -> None:
    root = corrections(tmp_path / "toy", ToyPolicy(0.0))
    for corrected in (None, Corrected(ToyPolicy(0.0), {"weights_sha256": "b"}, PATIENCE)):
        with pytest.raises(ValueError, match=r"was recorded with policy=.*'weights_sha256': 'a'"):
            corrections(root, ToyPolicy(0.0), corrected=corrected)
    rounded = ToyPolicy(0.0)
    rounded.describe = lambda: {"checkpoint": "toy", "step": 7, "dtype": "bfloat16"}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="was recorded with policy="):
        corrections(root, rounded)
    with pytest.raises(ExpertFailedError):
        corrections(tmp_path / "unfinished", ToyPolicy(0.0), expert=NeverExpert)
    with pytest.raises(ValueError, match="holds an unfinished recording with another policy"):
        corrections(tmp_path / "unfinished", ToyPolicy(0.0), corrected=None)


@pytest.mark.parametrize(
    ("policy", "other", "error", "said"),
    [
        (ToyPolicy(0, control_hz=20), {}, ValueError, "acts 20 times per second, suite 'toy' takes 10"),
        (
            ToyPolicy(0, action_dim=6, action_normalise_mask=(), gripper_index=None),
            {},
            ValueError,
            r"and action \[6\]",
        ),
        (ToyPolicy(0, state_dim=9), {}, ValueError, r"the policy has state \[9\]"),
        (ToyPolicy(0, cameras=(Camera("top", 16, 16),)), {}, ValueError, r"needs the cameras \['top'\]"),
        (ToyPolicy(0, cameras=(Camera("wrist", 32, 32),)), {}, ValueError, "sees wrist 32 x 32 pixels, and the rec"),
        (ToyPolicy(0, gripper_open=0.0), {}, ValueError, "opens its gripper with 0 and closes it with 1"),
        (ToyPolicy(0), {"expert": SilentExpert}, ContractError, "corrections of a policy needs Advisor .* follow"),
        (ToyPolicy(0), {"expert": SilentExpert, "workers": 2}, ContractError, "of a policy needs Advisor .* follow"),
        (ToyPolicy(0), {"expert": NeverExpert}, ExpertFailedError, "states 501000 to 501009 of task 0"),
    ],
    ids=["rate", "action", "state", "camera", "size", "gripper", "no advice", "no advice of a process", "no success"],
)
def test_what_does_not_fit_is_said(
    tmp_path: Path, policy: ToyPolicy, other: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        corrections(tmp_path / "toy", policy, **other)
    assert "\n" not in str(raised.value)
    if "expert" not in other:
        assert not list(tmp_path.iterdir()), "another policy could not be recorded into this output any more"


@pytest.mark.parametrize("patience", [0, -1, float("nan"), True, "30"])
def test_patience_is_checked(patience: Any) -> None:
    with pytest.raises(ValueError, match="patience must be a whole number of at least 1"):
        Corrected(ToyPolicy(0.0), patience=patience)


def test_more_steps_than_the_chunk_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="execute_steps is 5, but the policy predicts 4"):
        corrections(tmp_path / "toy", ToyPolicy(0.0), corrected=Corrected(ToyPolicy(0.0), execute_steps=5))


def test_a_killed_recording_goes_on(tmp_path: Path) -> None:
    """Two `kill -9` of everything, and the data is that of a recording that nobody killed."""
    root, whole = tmp_path / "toy", tmp_path / "whole"
    code = f"from cogvla.tests.support.toy_suite import record_slowly; record_slowly({str(root)!r}, 8, 0.0)"
    for least in (2, 5):
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ, stderr=subprocess.DEVNULL)
        waiting = root.with_name("toy.recording") / "episodes"
        while len(list(waiting.glob("[0-9]*"))) < least:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not root.exists()
    toy_suite.record_slowly(str(root), 8, 0.0)
    toy_suite.record_slowly(str(whole), 8, 0.0)
    assert len({row["episode_index"] for row in rows(root)}) == 8
    assert rows(root) == rows(whole)


# --- progress ---------------------------------------------------------------------------------------------------------


def states(*grippers: float, target: float = 1.0, goal: float = 2.0) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    point: Callable[[float], np.ndarray] = lambda x: np.array([x, 0, 0])  # noqa: E731
    return [(point(x), {"target": point(target), "goal": point(goal)}) for x in grippers]


@pytest.mark.parametrize(
    ("seen", "stuck"),
    [
        (states(0, 0, 0), [False, False, False]),
        (states(0, 0, 0, 0), [False, False, False, True]),
        (states(0, 0.02, 0.02, 0.04, 0.04, 0.06), [False] * 6),
        (states(0, 0.005, 0, 0.005), [False, False, False, True]),  # trembling
        (states(0, -0.5, -1, -1.5), [False, False, False, True]),  # the wrong way
        (states(0, 0, 0) + states(0, 0, 0, target=-1), [False] * 6),  # the next subgoal
        (states(0, 0, 0) + states(0, goal=2 + ANOTHER_PLACE / 2), [False, False, False, True]),  # not another one
    ],
)
def test_known_progress(seen: list[tuple[np.ndarray, dict[str, np.ndarray]]], stuck: list[bool]) -> None:
    progress = Progress(3)
    assert [progress.stuck(*state) for state in seen] == stuck


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, (40, 3), elements=st.floats(-1, 1, width=32)), st.integers(1, 20))
def test_nobody_is_stuck_without_patience_run_out_and_everybody_who_stays_is(way: np.ndarray, patience: int) -> None:
    progress = Progress(patience)
    labels = {"target": np.zeros(3), "goal": np.ones(3)}
    said = [progress.stuck(point, labels) for point in way]
    left = np.linalg.norm(way, axis=1)
    assert not any(said[:patience])
    for i in range(patience, len(way)):  # no nearer in all these steps than ever before
        before, since = left[: i - patience + 1].min(), left[i - patience + 1 : i + 1].min()
        assert said[i] or since < before
    assert [progress.stuck(np.ones(3), labels) for _ in range(patience)][-1]
