"""The command `policy_server` with the shipped checkpoint, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.interface import Camera
from cogvla.real_robot.serving.async_client import ClientSettings
from cogvla.real_robot.serving.client import PolicyClient
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.real_robot.serving.server import ServerSettings
from cogvla.scripts.command import compose
from cogvla.scripts.eval_libero import run as eval_libero
from cogvla.scripts.robot.policy_server import address, main
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.point_suite import ToyPolicy, solvable
from cogvla.tests.support.policy_servers import free_port, get, observation, serving
from cogvla.tests.support.waiting import until

PATIENT = ClientSettings(answer_s=60.0, connect_s=20.0)


@pytest.fixture(scope="module")
def command() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`policy_server` with the shipped checkpoint, as a user starts it."""
    port = free_port()
    arguments = [f"checkpoint={SHIPPED}", f"port={port}", "device=cpu", "threads=1", "max_batch=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cogvla.scripts.robot.policy_server", *arguments, "batch_wait_ms=60000"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    uri = f"ws://127.0.0.1:{port}"
    until(lambda: process.poll() is not None or get(uri, "/healthz")[0] == 200)
    yield process, uri
    process.kill()
    process.wait(120)


def test_an_address_of_ipv6_has_brackets() -> None:
    assert address("ws", "::1", 8000) == "ws://[::1]:8000"
    assert address("wss", "127.0.0.1", 8000) == "wss://127.0.0.1:8000"


def test_the_command_answers_as_the_policy_itself(command: tuple[subprocess.Popen[str], str]) -> None:
    process, uri = command
    policy = load_policy(SHIPPED)
    robot = policy.embodiment
    with PolicyClient(uri, replace(PATIENT, robot=robot)) as client:
        description = json.loads(json.dumps(policy.describe()))
        assert {key: client.info.policy[key] for key in description} == {**description, "engine": "trace"}
        assert len(client.info.policy["weights_sha256"]) == 64
        large = replace(robot, cameras=tuple(Camera(camera.name, 240, 320) for camera in robot.cameras))
        for fake in (robot, large):  # images of another size are resized by the policy's preprocessor
            one = observation(1, "put the red cube in the tray", fake)
            np.testing.assert_allclose(client.infer(one).actions, policy.act(one).actions[0], atol=1e-5)
    seen = [observation(seed, "put the blue ball in the tray", robot) for seed in range(4)]
    clients = [PolicyClient(uri, PATIENT) for _ in seen]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda client, one: client.infer(one), clients, seen))
    for one, answer in zip(seen, answers, strict=True):
        np.testing.assert_allclose(answer.actions, policy.act(one).actions[0], atol=1e-5)
    assert max(answer.timing["batch"] for answer in answers) > 1
    for client in clients:
        client.close()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert output.splitlines() == [f"tabletop_panda at {uri}", "stopped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "no checkpoint folder at nowhere"),
        (["checkpoint=random", "request_keys=aloha"], "request_keys.images names the cameras"),
        (["checkpoint=random", "tls.cert=a.pem", "tls.key=b.pem"], "cannot use tls.cert=a.pem"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cogvla.scripts.robot.policy_server", "port=0", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_eval_libero_plays_through_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("latency_curves", "length_histogram"):
        monkeypatch.setattr(f"cogvla.envs.evaluation.report.{name}", lambda *_: "<svg/>")
    monkeypatch.setenv("COGVLA_API_KEY", "sesame")
    policy = ToyPolicy()
    with serving(policy, ServerSettings(api_key="sesame"), keys=RequestKeys()) as (uri, _):
        options = [
            "imports=[cogvla.tests.support.point_suite]",
            "suite=point",
            "episodes_per_task=2",
            "workers=0",
            "videos=0",
        ]
        config = compose("eval_libero", [f"checkpoint={uri}", f"output={tmp_path}", *options])
        (report,) = eval_libero(config, "")
    assert [r.success for r in report.episodes] == [solvable(r.initial_state) for r in report.episodes]
    assert [r.error for r in report.episodes] == [None] * 6
    assert report.reproduce["policy"] == policy.describe()
    assert "sesame" not in (tmp_path / "point" / "report.json").read_text()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        eval_libero(config, "")


def test_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot serve at ws://127.0.0.1:{port}: .*in use"):
            main(compose("policy_server", ["checkpoint=not_looked_for_yet", f"port={port}"]))
