"""lerobot's own commands with the plugin, as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from lerobot.envs.configs import EnvConfig
from safetensors.torch import load_file

from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import get_suite
from cogvla.lerobot_versions import OLD, LeRobotDataset
from cogvla.policy.checkpoint import load_policy
from cogvla.tests.support.lerobot_plugin import require_plugin
from cogvla.tests.support.paths import ROOT, SHIPPED

require_plugin()

from lerobot_policy_cogvla.conversion import from_lerobot
from lerobot_policy_cogvla.environment_cogvla import CogVLAEnv, SuiteEnvironment
from lerobot_policy_cogvla.start import check_features

pytestmark = pytest.mark.timeout(1800)  # lerobot's commands import for a minute where the cores are busy
LAST = Path("checkpoints", "last", "pretrained_model")
STATES = (3, 4)
ENV_FILE = ROOT / "lerobot_policy_cogvla" / "envhub" / "env.py"


def lerobot(command: str, *arguments: str, fails: bool = False, variables: Mapping[str, str] | None = None) -> str:
    """Run a command of lerobot, with other environment variables, and return what it prints."""
    words = [sys.executable, "-m", f"lerobot.scripts.lerobot_{command}", *arguments]
    environment = {**os.environ, "MUJOCO_GL": "egl", **(variables or {})}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
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


def as_a_repository(file: Path, cache: Path) -> str:
    """Put a file into a cache of the hub as its `env.py`, as if it had been downloaded, and return the repository."""
    commit, folder = "0" * 40, cache / "models--local--cogvla"
    for name in ("refs", f"snapshots/{commit}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copy(file, folder / "snapshots" / commit / "env.py")
    return "local/cogvla"


@pytest.mark.parametrize("source", ["plugin", "EnvHub"])
def test_the_same_episodes_as_ours(source: str, converted: Path, tmp_path: Path) -> None:
    """The same initial states, success and number of steps as in `eval_libero` without an engine."""
    options: list[str] = []
    variables: dict[str, str] = {}
    if source == "EnvHub":
        options = [f"--env.hub_path={as_a_repository(ENV_FILE, tmp_path / 'hub')}", "--trust_remote_code=true"]
        variables = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
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
        *options,
        variables=variables,
    )
    specs = [EpisodeSpec(0, state) for state in STATES]
    ours = {r.initial_state: r for r in rollout(load_policy(SHIPPED), get_suite("tabletop_object"), specs)}
    told = json.loads((tmp_path / "eval_info.json").read_text())["per_task"][0]["metrics"]
    assert told["successes"] == [ours[state].success for state in STATES]
    for path, state in zip(told["video_paths"], STATES, strict=True):
        with av.open(str(tmp_path / path)) as video:
            assert sum(1 for _ in video.decode(video=0)) == ours[state].steps


def test_from_python_the_hub_s_file_says_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make_env` without a configuration; another type of environment is refused."""
    text = ENV_FILE.read_text().replace('SUITE = "tabletop_object"', 'SUITE = "tabletop_goal"')
    (tmp_path / "env.py").write_text(text)
    from lerobot.envs.utils import _call_make_env, _import_hub_module, _normalize_hub_result

    module = _import_hub_module(str(tmp_path / "env.py"), "local/cogvla")
    made = _normalize_hub_result(_call_make_env(module, n_envs=2, use_async_envs=False, cfg=None))
    assert [(suite, len(tasks)) for suite, tasks in made.items()] == [("tabletop_goal", 10)]
    assert made["tabletop_goal"][3].num_envs == 2
    for env in made["tabletop_goal"].values():
        env.close()
    with pytest.raises(ValueError, match=r"need --env.type=cogvla, got PushtEnv"):
        _call_make_env(module, n_envs=1, use_async_envs=False, cfg=EnvConfig.get_choice_class("pusht")())


ARM = ("--robot.type=cogvla_tabletop", "--robot.id=test", "--robot.initial_state=3")
TASK = "put the red cube in the tray"


def test_the_simulated_arm_acts_and_is_recorded(converted: Path, tmp_path: Path) -> None:
    """`lerobot-record` of 0.4, `lerobot-rollout` of 0.6."""
    name = "eval_cube" if OLD else "rollout_cube"
    recording = {
        "repo_id": f"local/{name}",
        "root": tmp_path / name,
        "single_task": TASK,
        "num_episodes": 1,
        "episode_time_s": 2,
        "fps": 20,
        "push_to_hub": "false",
        "video": "false",
    }
    options = [f"--dataset.{key}={value}" for key, value in recording.items()]
    policy = [f"--policy.path={converted}", "--policy.device=cpu"]
    if OLD:
        said = lerobot("record", *policy, *ARM, *options, "--play_sounds=false")
    else:
        how = ["--strategy.type=episodic", "--fps=20", "--play_sounds=false", "--return_to_initial_position=false"]
        said = lerobot("rollout", *policy, *ARM, *how, *options)
    assert f"initial state 3, '{TASK}': begins" in said
    recorded = LeRobotDataset(f"local/{name}", root=tmp_path / name)
    assert recorded.meta.robot_type == "cogvla_tabletop"
    assert recorded.meta.features["action"]["names"][-1] == "gripper.pos"
    frames = recorded.hf_dataset
    assert len(frames) > 1
    assert np.abs(np.stack(frames["action"])[:, :6]).max() > 1e-3
    check_features(load_policy(SHIPPED).embodiment, recorded.meta)


@pytest.mark.skipif(OLD, reason="lerobot 0.4.4 has no lerobot-rollout")
def test_the_simulated_arm_in_real_time_chunking(converted: Path) -> None:
    said = lerobot(
        "rollout",
        f"--policy.path={converted}",
        "--policy.device=cpu",
        *ARM,
        f"--task={TASK}",
        "--fps=20",
        "--duration=2",
        "--return_to_initial_position=false",
        "--inference.type=rtc",
        "--inference.queue_threshold=4",
        "--inference.rtc.execution_horizon=2",
    )
    assert f"initial state 3, '{TASK}': begins" in said
    assert "RTC inference error" not in said


def test_lerobots_server_and_client(converted: Path) -> None:
    """Asynchronous inference in two processes, until the client's robot has moved."""
    pytest.importorskip("grpc", reason="needs lerobot[async]")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = [sys.executable, "-m", "lerobot_policy_cogvla.async_server", "--host=127.0.0.1", f"--port={port}"]
    client = [
        *(sys.executable, "-m", "lerobot.async_inference.robot_client", *ARM, f"--server_address=127.0.0.1:{port}"),
        *("--policy_type=cogvla", f"--pretrained_name_or_path={converted}", "--policy_device=cpu", "--fps=20"),
        *("--actions_per_chunk=8", f"--task={TASK}", "--robot.idle_s=0.05"),
    ]
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYTHONUNBUFFERED": "1"}
    with (
        subprocess.Popen(server, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as serving,
        subprocess.Popen(client, env=environment, stdout=subprocess.PIPE, text=True) as driving,
    ):
        try:
            assert driving.stdout is not None
            # A new scene is set up when a command has come, and then none for a moment: chunks end, the next one waits.
            assert any("initial state 4, " in line for line in driving.stdout)
        finally:
            for process in (driving, serving):
                process.kill()


def test_a_data_set_of_another_robot(trained: Path, recording: Path, tmp_path: Path) -> None:
    said = lerobot("train", *training(recording, tmp_path / "run", **{"policy.embodiment": "so101"}), fails=True)
    assert "needs [6]" in said.strip().splitlines()[-1]


def test_beside_another_lerobot_the_last_line_says_why(tmp_path: Path) -> None:
    """The metadata of another lerobot lie first on the path, as after `pip install lerobot==0.4.3`."""
    other = tmp_path / "lerobot-0.4.3.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot\nVersion: 0.4.3\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = ["--policy.type=cogvla", "--dataset.repo_id=local/none", "--policy.push_to_hub=false"]
    said = lerobot("train", *asked, fails=True, variables={"PYTHONPATH": paths}).strip().splitlines()[-1]
    assert said.startswith("lerobot_policy_cogvla was not loaded: lerobot 0.4.3 does not fit: cogvla works with "), said


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
