"""`robot_demo`: run simulated robot, policy server and bridge with one command, connected as with a real robot.

    robot_demo
    robot_demo tasks=null episodes_per_task=5 view=none direct=true        success with and without the wire

        process sim_robot  <-- ROS 2 on loopback -->  this process: bridge  <-- websocket -->  process policy_server

It shows the robot's cameras (in rerun, or as a video without a screen), and writes a report like that of `eval_libero`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from omegaconf import DictConfig
from tqdm import tqdm

from cogvla.configs.build import build
from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.evaluation.evaluate import write_report
from cogvla.envs.evaluation.protocol import EvaluationProtocol, load_protocol
from cogvla.envs.evaluation.report import ControlTiming, Report, build_report
from cogvla.envs.evaluation.statistics import latency, success_rate
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import Suite, get_suite
from cogvla.policy.interface import Embodiment
from cogvla.policy.provenance import provenance
from cogvla.real_robot.bridge.bridge import Bridge, BridgeSettings
from cogvla.real_robot.bridge.live_view import RerunView, VideoView, choose_view
from cogvla.real_robot.control.measurements import latency_table
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.ros.front_end import RosFrontEnd
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.real_robot.serving.async_client import ClientSettings
from cogvla.real_robot.serving.reconnecting import ReconnectingClient
from cogvla.real_robot.serving.remote_policy import RemotePolicy
from cogvla.real_robot.trials.trials import SimulatedScene, play
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, end_on_sigterm, import_modules, plain
from cogvla.scripts.robot.robots import ros_node

START_S = 180.0
"""Longest time in which the server loads its policy."""
MARGIN_S = 20.0
"""Added to twice the time of an episode's control steps; an episode that takes longer is an error."""


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    end_on_sigterm()
    run(config, as_typed("robot_demo"))


def run(config: DictConfig, command: str) -> Report:
    """Play the episodes, print a summary and write the report; return the report."""
    import_modules(config.imports)
    suite = get_suite(config.suite)
    protocol = load_protocol(suite.protocol, episodes_per_task=config.episodes_per_task).for_suite(suite)
    specs = protocol.episodes(suite, plain(config)["tasks"])
    output = Path(config.output)
    view = choose_view(config.view)
    parts = _parts(config)  # before any process is started
    with ExitStack() as processes:
        uri = processes.enter_context(_server(config))
        processes.enter_context(_simulator(config))
        remote = RemotePolicy(uri)
        processes.callback(remote.close)
        results, bridge, began = _play(config, parts, uri, specs, suite, view, output)
        report = _report(suite, protocol, results, remote, bridge, command, began)
        direct = list(_directly(remote, suite, specs, protocol)) if config.direct else None
    output.mkdir(parents=True, exist_ok=True)
    write_report(report, suite, output)
    print(_said("over the wire", results))
    if direct is not None:
        print(_said("directly", direct))
    print(latency_table(bridge.measurements, bridge.embodiment.control_hz))
    print(f"report: {output / 'report.html'}" + (f", video: {output / 'demo.mp4'}" if view == "video" else ""))
    return report


def _parts(config: DictConfig) -> tuple[Embodiment, RobotConfig, RosTopics]:
    values = plain(config)
    return (
        build(Embodiment, values["embodiment"], "embodiment"),
        build(RobotConfig, values["robot"], "robot"),
        build(RosTopics, values["topics"], "topics"),
    )


def _play(
    config: DictConfig,
    parts: tuple[Embodiment, RobotConfig, RosTopics],
    uri: str,
    specs: Sequence[EpisodeSpec],
    suite: Suite,
    view: str,
    output: Path,
) -> tuple[list[EpisodeResult], Bridge, str]:
    embodiment, robot, topics = parts
    began = datetime.now(UTC).isoformat(timespec="seconds")
    timeout_s = 2 * suite.max_steps / embodiment.control_hz + MARGIN_S
    results = []
    with ExitStack() as open_things:
        node = ros_node(config.transport, "/cogvla_bridge", _ros(config))
        shown: VideoView | RerunView | None = None
        if view != "none":
            shown = (
                VideoView(output / "demo.mp4", embodiment.control_hz) if view == "video" else RerunView("robot_demo")
            )
            open_things.enter_context(shown)
        bridge = Bridge(
            robot,
            embodiment,
            ReconnectingClient(uri, ClientSettings(robot=embodiment)),
            RosFrontEnd(node, topics, embodiment, robot.limits),
            BridgeSettings(dry_run=False),
            on_tick=None if shown is None else shown.show,
        )
        scene = SimulatedScene(node)
        open_things.enter_context(node)
        open_things.enter_context(bridge)
        for spec in tqdm(specs, unit="episode", disable=None):
            if shown is not None:
                shown.note("")
            result = play(bridge, scene, spec, timeout_s)
            results.append(result)
            outcome = "error" if result.error else "success" if result.success else "failure"
            if shown is not None:
                shown.note(outcome)
            tqdm.write(f"{result.instruction}: {outcome} after {result.steps} steps {result.error or ''}".rstrip())
            time.sleep(1.0 if shown is not None else 0.0)  # show the end of the episode
    return results, bridge, began


def _report(
    suite: Suite,
    protocol: EvaluationProtocol,
    results: Sequence[EpisodeResult],
    remote: RemotePolicy,
    bridge: Bridge,
    command: str,
    began: str,
) -> Report:
    measured, found = bridge.measurements, provenance()
    steps = bridge.loop_settings.execute_steps or bridge.embodiment.chunk
    report = build_report(
        suite=suite,
        results=results,
        batch_1_ms=[],
        control_hz=bridge.embodiment.control_hz,
        reproduce={
            "protocol": asdict(replace(protocol, execute_steps=steps)),
            "asked": "own task",
            "policy": remote.describe(),
            "simulation": {"robot": "sim_robot, over ROS 2 in real time", "loop": asdict(bridge.loop_settings)},
            "command": command,
            "workers": 0,
            "run": {"episodes": len(results), "seconds": sum(r.wall_s for r in results)},
            "started": began,
            "sessions": 1,
            "commits": [str((found["commit"] or {}).get("hash"))],
            **found,
        },
    )
    return replace(report, control=ControlTiming(latency(measured.jitter_ms), dict(sorted(measured.counts.items()))))


def _directly(
    remote: RemotePolicy, suite: Suite, specs: Sequence[EpisodeSpec], protocol: EvaluationProtocol
) -> Iterator[EpisodeResult]:
    """Play the same episodes with the same server in the rollout loop, without the simulated robot and ROS 2."""
    return rollout(remote, suite, specs, settings=protocol.rollout_settings())


def _said(how: str, results: Sequence[EpisodeResult]) -> str:
    rate = success_rate(r.success for r in results if r.error is None)
    errors = sum(r.error is not None for r in results)
    share = "no episode could be played" if rate.value is None else f"success {rate.value:.1%}"
    interval = "" if rate.low is None or rate.high is None else f" [{rate.low:.1%}, {rate.high:.1%}]"
    return f"{how + ':':<14} {share}{interval} of {rate.trials} episodes, {errors} errors"


@contextmanager
def _server(config: DictConfig) -> Iterator[str]:
    """Start the policy server in a process of its own; yield its address once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = [f"checkpoint={config.checkpoint}", f"port={port}", f"threads={config.threads}", "batch_wait_ms=0"]
    arguments += [] if config.statistics is None else [f"statistics={config.statistics}"]
    with _process("policy_server", arguments, config) as process:
        last = time.monotonic() + START_S
        while not _healthy(port):
            if process.poll() is not None:
                raise ValueError("the policy server has ended; see its messages above")
            if time.monotonic() > last:
                raise ValueError(f"the policy server was not ready within {START_S:g} s")
            time.sleep(0.1)
        yield f"ws://127.0.0.1:{port}"


def _healthy(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1) as response:
            return response.status == 200
    except (HTTPError, URLError, OSError):
        return False


def _ros(config: DictConfig) -> dict[str, Any]:
    """Return the settings of ROS 2: this machine only, whatever the environment says."""
    return {"domain": config.domain, "discovery": "LOCALHOST"}


@contextmanager
def _simulator(config: DictConfig) -> Iterator[None]:
    size = config.embodiment.cameras[0].height
    with _process(
        "sim_robot",
        [f"suite={config.suite}", f"image_size={size}", *(f"ros.{k}={v}" for k, v in _ros(config).items())],
        config,
    ):
        yield


@contextmanager
def _process(name: str, arguments: Sequence[str], config: DictConfig) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
    shared = f"imports=[{','.join(config.imports)}]"
    command = [sys.executable, "-m", f"cogvla.scripts.robot.{name}", *arguments, shared]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    console.robot_demo()
