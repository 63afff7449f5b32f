r"""Describe a robot of your own by three YAML files, and rehearse with it: a dry run, in which nothing moves.

    python examples/own_robot.py        writes outputs/examples/own_robot/report.json

The files are embodiment/my_robot.yaml, robot/my_robot.yaml and topics/my_robot.yaml in examples/own_robot. This script
starts three commands with them, and stops them after some seconds. They can as well be typed into three terminals:

    uv run policy_server checkpoint=checkpoints/tabletop_object
    uv run --extra ros sim_robot --config-dir examples/own_robot topics=my_robot image_size=160
    uv run --extra ros robot_bridge --config-dir examples/own_robot robot=my_robot embodiment=my_robot topics=my_robot \
        instruction="put the red cube in the tray" activate=true

`sim_robot` stands in for the arm: it publishes the topics that the files name. With a real arm, leave it out, and go
through the checklist of docs/real_robot.md. Both need the extra `ros`, which exists for x86-64 Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.serving.async_client import ClientSettings
from cogvla.real_robot.serving.client import PolicyClient

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "examples" / "own_robot"
INSTRUCTION = "put the red cube in the tray"
PATIENCE_S = 120.0


def main() -> None:
    """Serve the shipped policy, ask it once, then let the bridge ask it in real time."""
    parser = argparse.ArgumentParser(description="Rehearse with the robot of examples/own_robot.")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long the bridge shows commands")
    parser.add_argument("--domain", type=int, default=53, help="ROS_DOMAIN_ID, on this machine only")
    arguments = parser.parse_args()
    output = Path("outputs", "examples", "own_robot")
    robot = build(Embodiment, load("embodiment", str(FILES / "embodiment" / "my_robot.yaml")), "embodiment")
    port = free_port()
    with command(
        "policy_server", f"checkpoint={ROOT / 'checkpoints' / 'tabletop_object'}", f"port={port}", "threads=1"
    ):
        wait_for(port)
        # The client compares the robot with the policy before it asks, and lists what does not fit.
        with PolicyClient(f"ws://127.0.0.1:{port}", ClientSettings(robot=robot)) as client:
            answer = client.infer(robot.fake_observation())
        print(f"{robot.name} fits the policy, which answers {answer.actions.shape[0]} actions at once")
        if find_spec("rclpy") is None:
            raise SystemExit("the dry run needs the extra `ros`: uv run --extra ros python examples/own_robot.py")
        files, domain = ["--config-dir", str(FILES)], {"ROS_DOMAIN_ID": str(arguments.domain)}
        simulated = ["topics=my_robot", f"image_size={robot.cameras[0].height}"]
        bridge = ["robot=my_robot", "embodiment=my_robot", "topics=my_robot", f"server=ws://127.0.0.1:{port}"]
        bridge += [f"instruction='{INSTRUCTION}'", "activate=true", f"output={output}"]
        with (
            command("sim_robot", *files, *simulated, **domain),
            command("robot_bridge", *files, *bridge, **domain) as said,
        ):
            for line in said:
                print(line, end="")
                if line.startswith("running"):
                    break
            time.sleep(arguments.seconds)
    counts = json.loads((output / "report.json").read_text())["measurements"]["counts"]
    limited = {name.removeprefix("limited_"): count for name, count in counts.items() if name.startswith("limited_")}
    print(
        f"{counts.get('chunks', 0)} answers, {counts.get('dry_run', 0)} commands shown, none sent; limited: {limited}"
    )


@contextmanager
def command(name: str, *arguments: str, **environment: str) -> Iterator[IO[str]]:
    """Run a command, whose output the block may read, and stop it at the end as Ctrl-C does."""
    started = [sys.executable, "-m", f"cogvla.scripts.robot.{name}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.send_signal(signal.SIGINT)
        try:
            print(process.communicate(timeout=30)[0], end="")
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    """Return a TCP port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until the policy server has warmed up."""
    last = time.monotonic() + PATIENCE_S
    while time.monotonic() < last:
        try:
            with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the policy server was not ready within {PATIENCE_S:.0f} s")


if __name__ == "__main__":
    main()
