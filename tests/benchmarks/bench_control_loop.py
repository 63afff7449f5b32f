"""What a tick of the control loop costs in microseconds. At 20 Hz a control period is 50,000 of them.

python tests/benchmarks/bench_control_loop.py
python tests/benchmarks/bench_control_loop.py --ticks 20000 --image-size 224
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.interface import ActionChunk, Camera, Embodiment
from cogvla.real_robot.control.control_loop import ControlLoop, Kind
from cogvla.real_robot.control.measurements import percentiles
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.tests.support.paths import CONFIGS

CONFIG = CONFIGS / "robot" / "tabletop.yaml"
COLUMNS = ("p50", "p95", "p99", "max")


def measure(config: RobotConfig, image_size: int, ticks: int) -> dict[str, list[float]]:
    """Samples in microseconds by kind of call, for a loop whose policy answers at once."""
    cameras = (Camera("agentview", image_size, image_size), Camera("wrist", image_size, image_size))
    embodiment = Embodiment(config.name, cameras, state_dim=8, action_dim=7, chunk=8, control_hz=20.0, gripper_index=6)
    loop = ControlLoop(embodiment, config.limits, config.loop)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
    state = np.array([0.5, 0.0, 0.2, 0, 0, 0, 0.04, 0.04])
    samples: dict[str, list[float]] = {}
    now = 0.0

    def timed(name: str, started: int) -> None:
        samples.setdefault(name, []).append((time.perf_counter_ns() - started) / 1e3)

    loop.set_instruction("pick up the red cube")
    loop.activate()
    for _ in range(ticks):
        started = time.perf_counter_ns()
        for camera in cameras:
            loop.observe_image(camera.name, image, now, now)
        loop.observe_state(state, now, now)
        timed("two images and a state", started)
        started = time.perf_counter_ns()
        request = loop.request_due(now)
        timed("request_due: not yet" if request is None else "request_due: a request", started)
        if request is not None:
            chunk = ActionChunk(rng.uniform(-0.3, 0.3, (1, 8, 7)).astype(np.float32))
            started = time.perf_counter_ns()
            loop.deliver(chunk, request, now)
            timed("deliver", started)
        started = time.perf_counter_ns()
        command = loop.tick(now)
        timed(f"tick: {command.kind.value}", started)
        assert command.kind is Kind.ACTION, command.reason
        now += 0.05
    loop.set_instruction("")
    for _ in range(ticks):
        started = time.perf_counter_ns()
        command = loop.tick(now)
        timed(f"tick: {command.kind.value}", started)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ticks", type=int, default=5000)
    parser.add_argument("--image-size", type=int, default=128)
    asked = parser.parse_args()
    samples = measure(build(RobotConfig, load("robot", "tabletop"), "robot"), asked.image_size, asked.ticks)
    print(f"{'microseconds':<28}{'calls':>8}{'least':>9}" + "".join(f"{name:>9}" for name in COLUMNS))
    for name, values in sorted(samples.items()):
        found = percentiles(values)
        assert found is not None, "every row has samples"
        row = (min(values), *(found[column] for column in COLUMNS))
        print(f"{name:<28}{len(values):>8}" + "".join(f"{value:>9.1f}" for value in row))


if __name__ == "__main__":
    main()
