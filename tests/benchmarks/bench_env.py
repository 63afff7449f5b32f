"""How long a tabletop suite takes to reset, to step and to render, in one process.

python tests/benchmarks/bench_env.py
python tests/benchmarks/bench_env.py suite=tabletop_goal image_size=224 episodes=20
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from cogvla.envs.evaluation.statistics import latency
from cogvla.envs.suite import Suite, get_suite
from cogvla.envs.tabletop.env import CAMERAS
from cogvla.envs.tabletop.expert import Expert
from cogvla.policy.provenance import machine

RENDER_EVERY = 5
"""Control steps between two images: a step right after one is slower, because rendering empties the caches."""
DEFAULTS = {
    "defaults": ["_self_", {"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}],
    "suite": "tabletop_object",
    "image_size": 128,
    "episodes": 10,
    "hydra": {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False}},
}
ConfigStore.instance().store("bench_env", DEFAULTS)


@dataclass(frozen=True)
class Row:
    """Milliseconds of one kind of call."""

    name: str
    samples: tuple[float, ...]

    def __str__(self) -> str:
        found = latency(self.samples)
        assert found is not None, "every row has samples"
        numbers = (min(self.samples), found.mean, found.p50, found.p95, found.p99)
        return f"{self.name:<34}{found.count:>7}" + "".join(f"{number:>9.2f}" for number in numbers)


def measure(suite: Suite, image_size: int, episodes: int) -> list[Row]:
    """Play the expert without noise, one task after the other, and time each kind of call."""
    env: Any = suite.make(image_size=image_size)
    played = env.unwrapped
    samples: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        samples[name].append((time.perf_counter() - started) * 1e3)

    env.reset(seed=0)  # the first image makes the OpenGL context, which is no cost of an episode
    for episode in range(episodes):
        where = {"task": episode % len(suite.tasks), "initial_state": episode // len(suite.tasks)}
        played.skip_images = True
        timed("reset, no images", partial(env.reset, options=where))
        expert = Expert(env, np.random.default_rng(episode))
        for step in range(suite.max_steps):
            started = time.perf_counter()
            action = expert.act()
            acted = time.perf_counter()
            *_, terminated, truncated, _ = env.step(action)
            samples["expert's action"].append((acted - started) * 1e3)
            samples["control step, no images"].append((time.perf_counter() - acted) * 1e3)
            for camera in CAMERAS if step % RENDER_EVERY == 0 else ():
                name = f"{camera} image, {image_size}x{image_size}"
                timed(name, partial(played.render_camera, camera, image_size, image_size))
            if terminated or truncated:
                break
    env.close()
    return [Row(name, tuple(values)) for name, values in samples.items()]


@hydra.main(version_base="1.3", config_path=None, config_name="bench_env")
def main(config: DictConfig) -> None:
    """Print the table."""
    found = machine()
    print(f"{config.suite} on {found['cpu']}, {found['cores']} core(s) for this process, {found['environment']}")
    print(f"{'milliseconds':<34}{'calls':>7}{'least':>9}{'mean':>9}{'p50':>9}{'p95':>9}{'p99':>9}")
    for row in measure(get_suite(config.suite), config.image_size, config.episodes):
        print(row)


if __name__ == "__main__":
    main()
