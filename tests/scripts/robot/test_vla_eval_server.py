"""The command `vla_eval_server` with the shipped checkpoint, and vla-eval's own command, in processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from cogvla.envs.evaluation.protocol import protocol_for
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import load_policy
from cogvla.scripts.command import compose
from cogvla.scripts.robot.vla_eval_server import main
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.policy_servers import SumPolicy, free_port, get
from cogvla.tests.support.waiting import until

pytest.importorskip("vla_eval", reason=needs("harness"))

from vla_eval.api import serve_background
from vla_eval.cli.smoke import _make_stub_benchmark
from vla_eval.connection import Connection
from vla_eval.runners.sync_runner import SyncEpisodeRunner

from cogvla.real_robot.harness.model_server import PolicyModelServer

TABLETOP = "cogvla.envs.harness.benchmark:TabletopBenchmark"
LIBERO = "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark"
VLA_EVAL = (sys.executable, "-c", "from vla_eval.cli.main import main; main()")


def configuration(folder: Path, *benchmarks: Any) -> Path:
    path = folder / "evaluation.yaml"
    path.write_text(yaml.safe_dump({"benchmarks": list(benchmarks)}))
    return path


def vla_eval_run(folder: Path, uri: str, *benchmarks: Any) -> subprocess.CompletedProcess[str]:
    """`vla-eval run`, as a user starts it."""
    path = configuration(folder, *benchmarks)
    arguments = ["run", "--config", str(path), "--server-url", uri, "--output-dir", str(folder)]
    return subprocess.run([*VLA_EVAL, *arguments], capture_output=True, text=True, check=False)


@contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`vla_eval_server`, as a user starts it, and its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "cogvla.scripts.robot.vla_eval_server", f"port={port}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    uri = f"ws://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or get(uri, "/health")[0] == 200)
        yield process, uri
    finally:
        process.kill()
        process.wait(120)


async def smallest(uri: str) -> dict[str, Any]:
    """Play what `vla-eval test` plays: three steps with images of 256x256, by vla-eval's runner and client."""
    stub = _make_stub_benchmark({"name": "smoke_test"})
    async with Connection(uri) as client:
        return dict(await SyncEpisodeRunner().run_episode(stub, stub.get_tasks()[0], client, max_steps=50))


def test_vla_eval_plays_its_smallest_benchmark_and_ours(tmp_path: Path) -> None:
    suite = get_suite("tabletop_object")
    protocol = protocol_for(suite, None, {"episodes_per_task": 2}).for_suite(suite)
    specs = protocol.episodes(suite, [1, 7])
    played = rollout(load_policy(SHIPPED), suite, specs, settings=protocol.rollout_settings())
    ours = {(suite.tasks[r.task].name, r.initial_state): (r.success, r.steps) for r in played}
    names = [suite.tasks[task].name for task in (1, 7)]
    fits = configuration(tmp_path, {"benchmark": TABLETOP}, {"benchmark": LIBERO})
    arguments = [f"checkpoint={SHIPPED}", "execute_steps=4", "max_batch=1", "device=cpu", "threads=1"]
    with command(*arguments, f"evaluation={fits}") as (process, uri):
        result = asyncio.run(smallest(uri))
        assert result["metrics"] == {"success": True}
        assert result["steps"] == 3

        done = vla_eval_run(tmp_path, uri, {"benchmark": TABLETOP, "episodes_per_task": 2, "tasks": names})
        assert done.returncode == 0, done.stderr
        assert "Spec validation passed" in done.stderr
        assert "WARNING" not in done.stderr
        result = json.loads((tmp_path / "TabletopBenchmark_aggregate.json").read_text())
        assert result["num_errors"] == 0
        assert result["harness_version"] == version("vla-eval")
        theirs = {
            (task["task"], episode["episode_id"]): (episode["metrics"]["success"], episode["steps"])
            for task in result["tasks"]
            for episode in task["episodes"]
        }
        assert theirs == ours

        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0
    assert output.splitlines() == [f"tabletop_panda at {uri}", "stopped"]
    assert errors == ""


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"suite": "tabletop_objects"}, "did you mean tabletop_object"),
        ({"protocol": "none_such"}, "none_such"),
        ({"image_size": 1}, "image_size must be"),
    ],
)
def test_vla_eval_ends_with_one_line_for_a_wrong_parameter(params: dict[str, Any], said: str, tmp_path: Path) -> None:
    with serve_background(PolicyModelServer(SumPolicy())) as server:
        done = vla_eval_run(tmp_path, server.url, {"benchmark": TABLETOP, "params": params})
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert line.startswith("error: ")
    assert said in line


def test_mistakes_end_in_one_line() -> None:
    uri = f"ws://127.0.0.1:{free_port()}"
    arguments = [f"checkpoint={uri}", "port=0"]
    done = subprocess.run(
        [sys.executable, "-m", "cogvla.scripts.robot.vla_eval_server", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {uri} cannot be reached")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["checkpoint=nowhere"], "no checkpoint folder at nowhere"),
        (["checkpoint=ws://127.0.0.1:9"], "ws://127.0.0.1:9 cannot be reached"),
        (["checkpoint=random", "port=70000"], "port must be 0 to 65535"),
        (["checkpoint=random", "port=http"], "port must be a whole number, got 'http'"),
        (["checkpoint=random", "max_batch=0"], "max_batch must be at least 1"),
        (["checkpoint=random", "execute_steps=9"], "the policy predicts 8 actions at once"),
        (["checkpoint=random", "execute_steps=0"], "execute_steps must be positive"),
        (["checkpoint=random", "execute_steps=all"], "configuration"),
        (["checkpoint=random", "cameras={agentview: front}"], "an image for each of the policy's cameras"),
        (["checkpoint=random", "host=no.such.host.invalid"], "cannot serve at ws://no.such.host.invalid:0"),
    ],
)
def test_other_mistakes(arguments: list[str], said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said) as error:
        main(compose("vla_eval_server", ["port=0", *arguments]))
    assert len(str(error.value).splitlines()) == 1


def test_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot serve at ws://127.0.0.1:{port}: .*in use"):
            main(compose("vla_eval_server", ["checkpoint=not_looked_for_yet", f"port={port}"]))


@pytest.mark.parametrize(
    ("text", "embodiment", "said"),
    [
        (None, "tabletop", "No such file"),
        ("benchmarks: [", "tabletop", "is no configuration of vla-eval"),
        ("benchmarks: 3", "tabletop", "is no configuration of vla-eval"),
        ("- a\n- b", "tabletop", "is no configuration of vla-eval"),
        ("benchmarks: [{name: a}]", "tabletop", "is no configuration of vla-eval"),
        ("benchmarks: []", "tabletop", "has no benchmarks"),
        (
            "benchmarks: [{benchmark: 'no_such_module:Benchmark'}]",
            "tabletop",
            "no_such_module:Benchmark cannot be asked",
        ),
        (f"benchmarks: [{{benchmark: '{TABLETOP}', params: {{suite: none}}}}]", "tabletop", "unknown suite 'none'"),
        (f"benchmarks: [{{benchmark: '{TABLETOP}'}}]", "aloha", "does not fit the benchmark: action"),
        (f"benchmarks: [{{benchmark: '{TABLETOP}'}}]", "so101", "does not fit the benchmark: action"),
        (f"benchmarks: [{{benchmark: '{LIBERO}'}}]", "six_joints", "does not fit the benchmark: action"),
        (f"benchmarks: [{{benchmark: '{LIBERO}', params: {{send_state: false}}}}]", "libero", r"\[state\]: server"),
    ],
)
def test_benchmarks_that_do_not_fit(text: str | None, embodiment: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, OSError), match=said) as error:
        main(compose("vla_eval_server", ["checkpoint=random", f"evaluation={path}", f"embodiment={embodiment}"]))
    assert len(str(error.value).splitlines()) == 1
    assert str(path) in str(error.value)
