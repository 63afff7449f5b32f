"""A good client beside hostile ones: its round trip, and the server's memory and log.

python tests/benchmarks/bench_hostile.py
python tests/benchmarks/bench_hostile.py checkpoint=checkpoints/tabletop_object messages=10000 clients=8

Server, hostile clients and this process, which has the good client, are processes of their own. The good client asks
with images of 640x480 pixels, ten times per second, as fast as a robot with chunks of half a second needs at most.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from cogvla.policy.interface import Camera, Observation
from cogvla.policy.provenance import machine
from cogvla.real_robot.serving.async_client import AsyncPolicyClient, ClientSettings
from cogvla.tests.support.hostile_clients import HostileClient, memory_bytes
from cogvla.tests.support.policy_servers import wait_for_server

DEFAULTS = {
    "defaults": ["_self_", {"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}],
    "checkpoint": "checkpoints/tabletop_object",
    "messages": 100_000,
    "clients": 4,
    "parts": 10,
    "port": 8124,
    "hydra": {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False}},
}
ConfigStore.instance().store("bench_hostile", DEFAULTS)
PERIOD_S = 0.1


@hydra.main(version_base="1.3", config_path=None, config_name="bench_hostile")
def main(config: DictConfig) -> None:
    """Start a server, attack it, print a table."""
    uri = f"ws://127.0.0.1:{config.port}"
    command = [sys.executable, "-m", "cogvla.scripts.robot.policy_server", f"checkpoint={config.checkpoint}"]
    command += [f"port={config.port}", "device=cpu", "threads=1"]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            wait_for_server(server, uri)
            print(machine())
            asyncio.run(_measure(uri, server.pid, config))
        finally:
            server.terminate()
            server.wait()
        written = (Path(folder) / "log").read_text()
    print(f"log: {len(written)} bytes, {len(written.splitlines())} lines, {written.count('Traceback')} tracebacks")


async def _measure(uri: str, process: int, config: DictConfig) -> None:
    print("| messages | good answers | p50 ms | p95 ms | p99 ms | max ms | memory MB | load |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    client = await AsyncPolicyClient.connect(uri, ClientSettings(answer_s=60.0))
    robot = client.info.embodiment
    seen = replace(robot, cameras=tuple(Camera(c.name, 480, 640) for c in robot.cameras)).fake_observation()
    quiet = [await _ask(client, seen) for _ in range(100)]
    print(_row(0, quiet, process))
    loop, part = asyncio.get_running_loop(), config.messages // config.parts // config.clients
    everything: list[float] = []
    with ProcessPoolExecutor(config.clients, get_context("spawn")) as pool:
        for number in range(config.parts):
            seeds = [number * config.clients + i for i in range(config.clients)]
            attacks = [loop.run_in_executor(pool, _attack, uri, seed, part) for seed in seeds]
            trips = []
            while not all(attack.done() for attack in attacks):
                trips.append(await _ask(client, seen))
            sent = sum(await asyncio.gather(*attacks)) * (number + 1)
            everything += trips
            print(_row(sent, trips, process), flush=True)
    print(_row(sent, everything, process))
    print(f"memory at most {memory_bytes(process, 'VmHWM') / 1e6:.0f} MB")
    await client.close()


async def _ask(client: AsyncPolicyClient, seen: Observation) -> float:
    started = time.perf_counter()
    await client.infer(seen)
    trip_ms = 1e3 * (time.perf_counter() - started)
    await asyncio.sleep(max(PERIOD_S - trip_ms / 1e3, 0))
    return trip_ms


def _attack(uri: str, seed: int, messages: int) -> int:
    async def metadata() -> HostileClient:
        client = await AsyncPolicyClient.connect(uri, ClientSettings(connect_s=60.0))
        await client.close()
        return HostileClient(uri, client.info, seed)

    hostile = asyncio.run(metadata())
    for _ in range(messages):
        hostile.send_one()
    return messages


def _row(messages: int, trips: list[float], process: int) -> str:
    p50, p95, p99 = np.percentile(trips, [50, 95, 99])
    return (
        f"| {messages} | {len(trips)} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {max(trips):.1f} | "
        f"{memory_bytes(process) / 1e6:.0f} | {os.getloadavg()[0]:.1f} |"
    )


if __name__ == "__main__":
    main()
