"""The rollout loop: right outcomes, errors that are no failures, dead workers, batches, videos."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogvla.envs.rollout.failures import EveryEpisodeFailsError
from cogvla.envs.rollout.rollout import (
    EpisodeResult,
    EpisodeSpec,
    RolloutSettings,
    patience,
    rollout,
)
from cogvla.envs.suite import Suite
from cogvla.policy.interface import ActionChunk, Camera, Observation, Policy
from cogvla.tests.support.point_suite import (
    EMBODIMENT,
    MAX_STEPS,
    TASKS,
    ToyEnv,
    ToyPolicy,
    broken_factory,
    solvable,
    toy_suite,
)
from cogvla.tests.support.waiting import until

SPECS = [EpisodeSpec(task, state) for task in range(3) for state in range(5)]


def play(
    specs: list[EpisodeSpec] = SPECS, suite: Suite | None = None, policy: Policy | None = None, **options: object
) -> dict[tuple[int, int], EpisodeResult]:
    results = list(rollout(policy or ToyPolicy(), suite or toy_suite(), specs, **options))  # type: ignore[arg-type]
    by_key = {(r.task, r.initial_state): r for r in results}
    assert len(by_key) == len(results) == len(specs), "every episode gives exactly one result"
    return by_key


def outcome(result: EpisodeResult) -> tuple[object, ...]:
    """What must not depend on how the episode was scheduled."""
    return (result.success, result.steps, result.instruction, result.asked, result.error, len(result.loop_ms))


@pytest.mark.parametrize("workers", [0, 2])
def test_outcomes_are_right(workers: int) -> None:
    results = play(workers=workers)
    for (task, state), result in results.items():
        assert result.error is None
        assert result.success == solvable(state)
        assert result.instruction == TASKS[task].instruction
        assert result.steps == MAX_STEPS if not result.success else 3 <= result.steps < MAX_STEPS
        assert result.reward == float(result.success)
        chunks = -(-result.steps // EMBODIMENT.chunk)
        assert len(result.inference_ms) == len(result.loop_ms) == len(result.batch) == chunks
        assert all(loop > inference > 0 for loop, inference in zip(result.loop_ms, result.inference_ms, strict=True))


def test_waiting_environments_share_a_forward_pass() -> None:
    policy = ToyPolicy(sleep_s=0.02)
    # On a busy machine the second process may start long after the first: play until they meet.
    episodes = rollout(policy, toy_suite(), [EpisodeSpec(0, n) for n in range(2000)], workers=2)
    assert any(max(policy.batches) == 2 for _ in episodes)
    episodes.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("largest", [1, 2])
def test_a_batch_can_be_limited(largest: int) -> None:
    policy = ToyPolicy(sleep_s=0.005)
    specs = [EpisodeSpec(0, n) for n in range(40)]
    results = play(specs, policy=policy, workers=4, settings=RolloutSettings(largest_batch=largest))
    assert max(policy.batches) <= largest
    assert all(result.success == solvable(state) for (_, state), result in results.items())
    with pytest.raises(ValueError, match="largest_batch"):
        RolloutSettings(largest_batch=0)


def test_every_chunk_knows_its_batch() -> None:
    policy = ToyPolicy()
    results = play([EpisodeSpec(0, 4 * n) for n in range(4)], policy=policy, workers=2)
    assert sum(policy.batches) == sum(len(r.batch) for r in results.values())


def test_a_batch_is_half_of_those_that_play_or_what_an_inference_brings() -> None:
    assert patience([5.0], playing=1, inference_s=9.0, now=5.0) == 0
    assert patience([5.0, 6.0], playing=4, inference_s=9.0, now=6.0) == 0
    assert patience([5.0, 6.0], playing=5, inference_s=0.5, now=5.25) == 0.25
    assert patience([5.0, 6.0], playing=5, inference_s=0.5, now=6.0) < 0


@pytest.mark.parametrize("workers", [2, 3])  # with three, the one that goes on is less than half
def test_no_lock_step(workers: int) -> None:
    """While other environments are slow, one goes on playing."""
    slow = toy_suite(fault="hang", at=(0, 0))
    hanging = [EpisodeSpec(0, 0)] * (workers - 1)
    episodes = rollout(ToyPolicy(), slow, [*hanging, *[EpisodeSpec(1, n) for n in range(8)]], workers=workers)
    finished = [next(episodes) for _ in range(8)]
    episodes.close()  # type: ignore[attr-defined]
    assert {r.task for r in finished} == {1}


def test_only_the_last_observation_of_a_chunk_is_rendered() -> None:
    seen = []

    class Spy(ToyPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            seen.append(int(observation.state[0, 4]))
            assert observation.images["agentview"].any()
            return super().act(observation)

    play([EpisodeSpec(0, 0)], policy=Spy())
    assert seen == [1, 2, 3, 4, 5]


def test_fewer_steps_per_chunk_and_an_own_limit() -> None:
    result = play([EpisodeSpec(0, 0)], settings=RolloutSettings(execute_steps=3, max_steps=31))[0, 0]
    assert (result.steps, len(result.loop_ms), result.success) == (31, 11, False)


def test_temporal_ensemble_asks_at_every_step() -> None:
    result = play([EpisodeSpec(0, 1)], settings=RolloutSettings(temporal_ensemble=0.01))[0, 1]
    assert result.success
    assert len(result.loop_ms) == result.steps


def test_waiting_steps_are_not_counted_and_move_nothing() -> None:
    plain, waited = play([EpisodeSpec(0, 1)]), play([EpisodeSpec(0, 1)], settings=RolloutSettings(waiting_steps=7))
    assert outcome(plain[0, 1]) == outcome(waited[0, 1])


def test_another_task_is_asked_for() -> None:
    result = play([EpisodeSpec(0, 1, asked=2)])[0, 1]
    assert (result.success, result.scene_task_success, result.asked) == (True, False, 2)
    assert result.instruction == TASKS[2].instruction
    assert play([EpisodeSpec(0, 1)])[0, 1].scene_task_success is None


def test_results_and_swapped_tasks_do_not_depend_on_the_workers() -> None:
    specs = [replace(spec, asked="swap") for spec in SPECS]
    alone, together = play(specs), play(specs, workers=2)
    assert {key: outcome(r) for key, r in alone.items()} == {key: outcome(r) for key, r in together.items()}
    assert all(r.asked is not None and r.asked != task for (task, _), r in alone.items())
    assert len({r.asked for r in alone.values()}) == 3, "the draw takes every alternative sometimes"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_an_error_and_no_failure(workers: int) -> None:
    results = play(suite=toy_suite(fault="raise", at=(1, 1)), workers=workers)
    broken = results.pop((1, 1))
    assert broken.error is not None
    assert "the toy is broken" in broken.error
    assert (broken.attempts, broken.success) == (2, False)
    assert all(r.error is None and r.success == solvable(state) for (_, state), r in results.items())


@pytest.mark.parametrize(("fault", "said"), [("raise", "the toy is broken"), ("kill", "SIGKILL")])
@pytest.mark.parametrize("workers", [1, 2])
def test_it_stops_when_all_workers_fail_for_one_reason(fault: str, said: str, workers: int) -> None:
    suite = toy_suite(fault=fault, at=None)
    # A worker that is slow to start keeps the others playing: it is known only then that it fails, too.
    episodes = rollout(ToyPolicy(), suite, SPECS, workers=workers, stop_if_all_fail=True)
    with pytest.raises(EveryEpisodeFailsError, match=rf"suite 'point' all ended in the same error.*{said}"):
        list(episodes)


def test_nan_actions_everywhere_stop_it() -> None:
    class Diverged(ToyPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            return ActionChunk(super().act(observation).actions * np.float32(np.nan))

    with pytest.raises(EveryEpisodeFailsError, match="NaN or infinite actions"):
        list(rollout(Diverged(), toy_suite(), SPECS, stop_if_all_fail=True))


def test_one_broken_episode_stops_nothing() -> None:
    results = play(suite=toy_suite(fault="raise", at=(0, 0)), stop_if_all_fail=True)
    assert [key for key, r in results.items() if r.error] == [(0, 0)]
    alone = play([EpisodeSpec(0, 0)], suite=toy_suite(fault="raise", at=None), stop_if_all_fail=True)
    assert alone[0, 0].error is not None


def test_a_killed_worker_is_replaced_and_its_episode_repeated(tmp_path: Path) -> None:
    results = play(suite=toy_suite(fault="kill", at=(1, 1), once=tmp_path / "struck"), workers=2)
    assert (results[1, 1].error, results[1, 1].attempts, results[1, 1].success) == (None, 2, True)
    assert all(r.attempts == 1 for key, r in results.items() if key != (1, 1))


def test_a_worker_that_always_dies_is_an_error() -> None:
    results = play(suite=toy_suite(fault="kill", at=(1, 1)), workers=2)
    assert "SIGKILL" in str(results[1, 1].error)
    assert sum(r.error is not None for r in results.values()) == 1


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    suite = toy_suite(fault="hang", at=(1, 1), once=tmp_path / "struck")
    results = play([EpisodeSpec(1, 1)], suite=suite, workers=1, settings=RolloutSettings(timeout_s=6))
    assert (results[1, 1].success, results[1, 1].attempts) == (True, 2)


def test_nan_actions_are_an_error() -> None:
    class Diverged(ToyPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            actions = super().act(observation).actions.copy()
            actions[:, 0, 0] = np.where(np.abs(observation.state[:, 3]) > 0, np.nan, actions[:, 0, 0])
            return ActionChunk(actions)

    results = play(policy=Diverged())
    assert {task for (task, _), r in results.items() if r.error} == {2}
    assert all("NaN" in str(r.error) for r in results.values() if r.error)


def test_videos_are_filmed_on_demand_and_change_nothing(tmp_path: Path) -> None:
    import av

    def failures(result: EpisodeResult) -> Path | None:
        return None if result.success else tmp_path / f"{result.task}_{result.initial_state}.mp4"

    plain, filmed = play(workers=0), play(workers=2, choose_video=failures)
    assert {key: outcome(r) for key, r in plain.items()} == {key: outcome(r) for key, r in filmed.items()}
    for result in filmed.values():
        assert (result.video is not None) == (not result.success)
        if result.video:
            with av.open(result.video) as container:
                frames = sum(1 for _ in container.decode(video=0))
            assert frames == result.steps + 20, "a frame per step, and a second of the outcome"
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_a_video_that_cannot_be_written_loses_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = play([EpisodeSpec(0, 1)], choose_video=lambda r: tmp_path / "file" / "video.mp4")[0, 1]
    assert result.success
    assert result.video is None


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_cannot_be_built_stops_the_rollout(workers: int) -> None:
    with pytest.raises(RuntimeError, match=r"point.*cannot be built(.|\n)*no EGL here"):
        play(suite=replace(toy_suite(), make=broken_factory), workers=workers)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="tasks 0 to 2"):
        play([EpisodeSpec(3, 0)])
    with pytest.raises(ValueError, match="predicts 4 actions"):
        play(settings=RolloutSettings(execute_steps=5))
    with pytest.raises(ValueError, match="function or class of a module"):
        play(suite=replace(toy_suite(), make=lambda **_: ToyEnv()), workers=1)
    with pytest.raises(ValueError, match="max_steps must be positive"):
        RolloutSettings(max_steps=0)
    with pytest.raises(ValueError, match="must be at least 0"):
        EpisodeSpec(-1, 0)
    other = ToyPolicy()
    other.embodiment = replace(EMBODIMENT, cameras=(Camera("front", 32, 32),))
    with pytest.raises(ValueError, match=r"cameras \['front'\]"):
        play(policy=other)
    other.embodiment = replace(EMBODIMENT, state_dim=9)
    with pytest.raises(ValueError, match=r"state \[9\]"):
        play(policy=other)
    other.embodiment = replace(EMBODIMENT, gripper_open=1.0, gripper_close=-1.0)
    with pytest.raises(ValueError, match="opens its gripper with 1 and closes it with -1, suite 'point' with -1 and 1"):
        play(policy=other)
    other.embodiment = replace(EMBODIMENT, gripper_index=5)
    with pytest.raises(ValueError, match="moves grippers by action 5, suite 'point' by 6"):
        play(policy=other)


class FloatPictures(ToyEnv):
    """Has pictures of numbers from 0 to 1, which are black as uint8."""

    def _observation(self) -> dict[str, np.ndarray]:
        seen = super()._observation()
        return seen | {name: seen[name] / np.float32(255) for name in ("agentview", "wrist")}


def test_pictures_of_another_kind_are_an_error() -> None:
    (result,) = rollout(ToyPolicy(), replace(toy_suite(), make=FloatPictures), SPECS[:1])
    assert "the image 'agentview' of an observation must be uint8 [H,W,3]" in str(result.error)
    assert "got float32 [32, 32, 3]" in str(result.error)


def test_no_episodes_start_no_worker() -> None:
    assert list(rollout(ToyPolicy(), replace(toy_suite(), make=broken_factory), [], workers=2)) == []


def _children() -> set[int]:
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return {int(line) for line in text.split()}


def test_closing_ends_the_workers() -> None:
    before = _children()
    episodes = rollout(ToyPolicy(), toy_suite(sleep_s=0.01), SPECS, workers=2)
    next(episodes)
    assert len(_children() - before) >= 2
    episodes.close()  # type: ignore[attr-defined]
    until(lambda: len(_children() - before) <= 1)  # the `ps` that looks is a child too


def test_ctrl_c_reaches_the_parent_only(tmp_path: Path) -> None:
    """The whole process group gets SIGINT, as from a terminal; results until then are out, no worker prints a trace."""
    script = (
        "from cogvla.envs.rollout.rollout import EpisodeSpec, rollout\n"
        "from cogvla.tests.support.point_suite import ToyPolicy, toy_suite\n"
        "specs = [EpisodeSpec(0, 4) for _ in range(500)]\n"
        "try:\n"
        "    for result in rollout(ToyPolicy(), toy_suite(sleep_s=0.01), specs, workers=2):\n"
        "        print('episode', flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "episode\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert out.splitlines()[-1] == "stopped"
    assert err == ""
    assert process.returncode == 0
