"""Round trip of a policy server over loopback, with 1 and with 8 clients that ask as fast as they are answered.

python tests/benchmarks/bench_server.py checkpoint=checkpoints/tabletop_object
python tests/benchmarks/bench_server.py checkpoint=random image=640         (the wire alone)
python tests/benchmarks/bench_server.py checkpoint=checkpoints/tabletop_object image=1280 clients=[1] rounds=5

The server runs in a process of its own, the clients in this one. `share` is the forward pass's part of the round trip.
With `image` (columns, 16:9 from 1280 on), images are sent in four ways, in turns: in the camera's and in the policy's
size, raw and as JPEG.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from cogvla.envs.evaluation.statistics import latency
from cogvla.policy.interface import Camera
from cogvla.policy.provenance import machine
from cogvla.real_robot.serving.async_client import Answer, AsyncPolicyClient, ClientSettings
from cogvla.real_robot.serving.request import RequestFormat
from cogvla.real_robot.serving.resize import resize_image
from cogvla.tests.support.policy_servers import wait_for_server

DEFAULTS = {
    "defaults": ["_self_", {"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}],
    "checkpoint": "???",
    "device": "cpu",
    "threads": 1,
    "clients": [1, 8],
    "calls": 200,
    "image": None,
    "rounds": 1,
    "port": 8123,
    "hydra": {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False}},
}
ConfigStore.instance().store("bench_server", DEFAULTS)
WARM_UP = 5
WIDE = 1280
WAYS = {
    "camera's size": ClientSettings(answer_s=60.0, resize=False),
    "policy's size": ClientSettings(answer_s=60.0),
    "policy's size, JPEG 90": ClientSettings(answer_s=60.0, jpeg_quality=90),
    "camera's size, JPEG 90": ClientSettings(answer_s=60.0, resize=False, jpeg_quality=90),
}


@hydra.main(version_base="1.3", config_path=None, config_name="bench_server")
def main(config: DictConfig) -> None:
    """Start a server, ask it, print a table."""
    command = [sys.executable, "-m", "cogvla.scripts.robot.policy_server", "request_keys=by_name"]
    command += [f"{key}={config[key]}" for key in ("checkpoint", "device", "threads", "port")]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_server(server, f"ws://127.0.0.1:{config.port}")
        print(machine())
        print("| images | kB | clients | p50 ms | p95 ms | p99 ms | forward pass ms | share | batch |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        ways = WAYS if config.image is not None else {"own size": ClientSettings(answer_s=60.0)}
        for clients in config.clients:
            answers: dict[str, list[Answer]] = {way: [] for way in ways}
            sizes: dict[str, int] = {}
            for _ in range(config.rounds):
                for way, settings in ways.items():
                    uri, calls = f"ws://127.0.0.1:{config.port}", config.calls // config.rounds
                    sizes[way], more = asyncio.run(_ask(uri, settings, clients, calls, config.image))
                    answers[way] += more
            for way in ways:
                print(_row(f"{way} | {sizes[way] / 1e3:.0f} | {clients}", answers[way]))
    finally:
        server.terminate()
        server.wait()


async def _ask(
    uri: str, settings: ClientSettings, clients: int, calls: int, image: int | None
) -> tuple[int, list[Answer]]:
    """Return the bytes of a request, and the answers of all clients."""
    found = await asyncio.gather(*(_robot(uri, settings, calls, image) for _ in range(clients)))
    return found[0][0], [answer for _, answers in found for answer in answers]


async def _robot(uri: str, settings: ClientSettings, calls: int, image: int | None) -> tuple[int, list[Answer]]:
    client = await AsyncPolicyClient.connect(uri, settings)
    info, robot = client.info, client.info.embodiment
    if image is not None:
        rows = image * 9 // 16 if image >= WIDE else image * 3 // 4
        robot = replace(robot, cameras=tuple(Camera(camera.name, rows, image) for camera in robot.cameras))
    seen = robot.fake_observation()
    if image is not None:  # noise would make JPEG larger than any camera's picture
        seen = replace(seen, images={name: _smooth(each) for name, each in seen.images.items()})
    answers = [await client.infer(seen) for _ in range(WARM_UP + calls)]
    await client.close()
    request = RequestFormat(info.embodiment, info.keys, info.images).write(
        seen, 0, 1.0, resize=settings.resize, jpeg_quality=settings.jpeg_quality
    )
    return len(request), answers[WARM_UP:]


def _smooth(noise: np.ndarray) -> np.ndarray:
    """Return images as smooth as those of a camera, uint8 [1,H,W,3]."""
    coarse = noise[0, ::40, ::40]
    return resize_image(coarse, noise.shape[1:3], "bilinear")[None]


def _row(begin: str, answers: list[Answer]) -> str:
    trips = [answer.timing["round_trip_ms"] for answer in answers]
    passes = [answer.timing["infer_ms"] for answer in answers]
    batch = np.mean([answer.timing["batch"] for answer in answers])
    found = latency(trips)
    assert found is not None, "there were answers"
    return (
        f"| {begin} | {found.p50:.1f} | {found.p95:.1f} | "
        f"{found.p99:.1f} | {np.median(passes):.1f} | {np.sum(passes) / np.sum(trips):.0%} | {batch:.1f} |"
    )


if __name__ == "__main__":
    main()
