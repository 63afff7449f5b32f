"""Round trip of a policy server over loopback, with 1 and with 8 clients that ask as fast as they are answered.

python tests/benchmarks/bench_server.py checkpoint=checkpoints/tabletop_object
python tests/benchmarks/bench_server.py checkpoint=random image=640         (the wire alone)

The server runs in a process of its own, the clients in this one. `share` is the forward pass's part of the round trip.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from urllib.request import urlopen

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from cogvla.envs.evaluation.statistics import latency
from cogvla.policy.interface import Camera
from cogvla.policy.provenance import machine
from cogvla.real_robot.serving.async_client import Answer, AsyncPolicyClient, ClientSettings

DEFAULTS = {
    "defaults": ["_self_", {"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}],
    "checkpoint": "???",
    "device": "cpu",
    "threads": 1,
    "clients": [1, 8],
    "calls": 200,
    "image": None,
    "port": 8123,
    "hydra": {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False}},
}
ConfigStore.instance().store("bench_server", DEFAULTS)
WARM_UP = 5
START_S = 120.0


@hydra.main(version_base="1.3", config_path=None, config_name="bench_server")
def main(config: DictConfig) -> None:
    """Start a server, ask it, print a table."""
    command = [sys.executable, "-m", "cogvla.scripts.robot.policy_server", "request_keys=by_name"]
    command += [f"{key}={config[key]}" for key in ("checkpoint", "device", "threads", "port")]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait(server, f"http://127.0.0.1:{config.port}/healthz")
        print(machine())
        print("| clients | requests/s | p50 ms | p95 ms | p99 ms | forward pass ms | share | batch |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|")
        for clients in config.clients:
            started = time.perf_counter()
            answers = asyncio.run(_ask(f"ws://127.0.0.1:{config.port}", clients, config.calls, config.image))
            print(_row(clients, answers, time.perf_counter() - started))
    finally:
        server.terminate()
        server.wait()


async def _ask(uri: str, clients: int, calls: int, image: int | None) -> list[Answer]:
    settings = ClientSettings(answer_s=60.0)
    return [
        a for one in await asyncio.gather(*(_robot(uri, settings, calls, image) for _ in range(clients))) for a in one
    ]


async def _robot(uri: str, settings: ClientSettings, calls: int, image: int | None) -> list[Answer]:
    client = await AsyncPolicyClient.connect(uri, settings)
    robot = client.info.embodiment
    if image is not None:
        robot = replace(robot, cameras=tuple(Camera(camera.name, image * 3 // 4, image) for camera in robot.cameras))
    observation = robot.fake_observation()
    answers = [await client.infer(observation) for _ in range(WARM_UP + calls)]
    await client.close()
    return answers[WARM_UP:]


def _row(clients: int, answers: list[Answer], wall_s: float) -> str:
    trips = [answer.timing["round_trip_ms"] for answer in answers]
    passes = [answer.timing["infer_ms"] for answer in answers]
    batch = np.mean([answer.timing["batch"] for answer in answers])
    found = latency(trips)
    assert found is not None, "there were answers"
    return (
        f"| {clients} | {(len(answers) + WARM_UP * clients) / wall_s:.0f} | {found.p50:.1f} | {found.p95:.1f} | "
        f"{found.p99:.1f} | {np.median(passes):.1f} | {np.sum(passes) / np.sum(trips):.0%} | {batch:.1f} |"
    )


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    last = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < last:
        try:
            with urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
