"""lerobot's own commands with the plugin, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import load_policy
from cogvla.tests.support.lerobot_plugin import require_plugin
from cogvla.tests.support.paths import SHIPPED

require_plugin()

from lerobot_policy_cogvla.conversion import from_lerobot
from lerobot_policy_cogvla.environment_cogvla import CogVLAEnv, SuiteEnvironment

pytestmark = pytest.mark.timeout(1800)  # lerobot's commands import for a minute where the cores are busy
LAST = Path("checkpoints", "last", "pretrained_model")
STATES = (3, 4)


def lerobot(command: str, *arguments: str, fails: bool = False) -> str:
    """Run a command of lerobot, and return what it prints."""
    words = [sys.executable, "-m", f"lerobot.scripts.lerobot_{command}", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "MUJOCO_GL": "egl"})
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stdout + done.stderr


def training(recording: Path, output: Path, **options: Any) -> list[str]:
    values = {
        "policy.type": "cogvla",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.image_size": 32,
        "dataset.repo_id": "local/tabletop",
        "dataset.root": recording,
        "output_dir": output,
        "batch_size": 4,
        "num_workers": 0,
        "steps": 20,
        "save_freq": 20,
        "log_freq": 10,
        **options,
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def trained(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps, and four more of the resumed training."""
    run = tmp_path_factory.mktemp("train") / "run"
    lerobot("train", *training(recording, run))
    lerobot("train", f"--config_path={run / LAST / 'train_config.json'}", "--resume=true", "--steps=24")
    return run


def test_training_and_resuming(trained: Path, recording: Path, tmp_path: Path) -> None:
    first, last = (trained / "checkpoints" / step for step in ("000020", "000024"))
    assert (trained / LAST).resolve() == last / "pretrained_model"
    weights, later = (load_file(step / "pretrained_model" / "model.safetensors") for step in (first, last))
    assert weights.keys() == later.keys()
    assert any(not torch.equal(weights[name], later[name]) for name in weights)
    assert json.loads((last / "training_state" / "training_step.json").read_text())["step"] == 24
    one, other = (
        json.loads((step / "pretrained_model" / "config.json").read_text())["cogvla"] for step in (first, last)
    )
    assert one == other, "a resumed training keeps statistics and words"
    from_lerobot(last / "pretrained_model", tmp_path / "ours")
    policy = load_policy(tmp_path / "ours")
    assert policy.embodiment.camera_names == ("agentview", "wrist")
    assert np.isfinite(policy.act(policy.embodiment.fake_observation(1)).actions).all()


def test_the_same_episodes_as_ours(converted: Path, tmp_path: Path) -> None:
    """The same initial states, success and number of steps as in `eval_libero` without an engine."""
    lerobot(
        "eval",
        f"--policy.path={converted}",
        "--policy.device=cpu",
        "--env.type=cogvla",
        "--env.task=tabletop_object",
        "--env.task_ids=[0]",
        f"--eval.n_episodes={len(STATES)}",
        "--eval.batch_size=1",
        f"--seed={STATES[0]}",
        f"--output_dir={tmp_path}",
    )
    specs = [EpisodeSpec(0, state) for state in STATES]
    ours = {r.initial_state: r for r in rollout(load_policy(SHIPPED), get_suite("tabletop_object"), specs)}
    told = json.loads((tmp_path / "eval_info.json").read_text())["per_task"][0]["metrics"]
    assert told["successes"] == [ours[state].success for state in STATES]
    for path, state in zip(told["video_paths"], STATES, strict=True):
        with av.open(str(tmp_path / path)) as video:
            assert sum(1 for _ in video.decode(video=0)) == ours[state].steps


def test_a_data_set_of_another_robot(trained: Path, recording: Path, tmp_path: Path) -> None:
    said = lerobot("train", *training(recording, tmp_path / "run", **{"policy.embodiment": "so101"}), fails=True)
    assert "needs [6]" in said.strip().splitlines()[-1]


@pytest.mark.parametrize(("task_id", "seed", "expected"), [(3, 7, (3, 7)), (3, 1000, (3, 0)), (None, 23, (3, 2))])
def test_the_seed_names_the_episode(task_id: int | None, seed: int, expected: tuple[int, int]) -> None:
    env = SuiteEnvironment("tabletop_object", task_id, image_size=32)
    try:
        seen, info = env.reset(seed=seed)
        assert (info["task"], info["initial_state"]) == expected
        assert env.task_description == get_suite("tabletop_object").tasks[expected[0]].instruction == env.task
        ours = get_suite("tabletop_object").make(image_size=32)
        expected_seen, _ = ours.reset(options={"task": expected[0], "initial_state": expected[1]})
        ours.close()
        np.testing.assert_array_equal(seen["agent_pos"], expected_seen["state"])
        for name, image in seen["pixels"].items():
            np.testing.assert_array_equal(image, expected_seen[name])
        _, reward, terminated, truncated, info = env.step(np.zeros(7, np.float32))
        assert (reward, terminated, truncated, info["is_success"]) == (0.0, False, False, False)
        assert env.render().shape == (32, 32, 3)
    finally:
        env.close()


@pytest.mark.parametrize("tasks", [[10], [-1], []])
def test_unknown_tasks(tasks: list[int]) -> None:
    env = CogVLAEnv(task="tabletop_object", task_ids=tasks)
    with pytest.raises(ValueError, match="has tasks 0 to 9"):
        env.create_envs(1)


def test_unknown_suites() -> None:
    with pytest.raises(ValueError, match="unknown suite 'tabletop_objects'"):
        SuiteEnvironment("tabletop_objects")
