"""What LIBERO's simulation costs a core: building, switching tasks, resetting, stepping, rendering.

python tests/benchmarks/bench_libero.py
python tests/benchmarks/bench_libero.py suite=libero_object image_size=224 libero.lean=true libero.reflections=false

Times are processor time of this process, so that other load on the machine changes little.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from cogvla.envs.suite import get_suite
from cogvla.policy.provenance import machine
from cogvla.scripts.command import plain

DEFAULTS = {
    "defaults": ["_self_", {"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}],
    "suite": "libero_spatial",
    "image_size": 128,
    "steps": 10,
    "libero": {"assets": None, "lean": False, "reflections": True, "robot_meshes": None, "extra_passes": True},
    "hydra": {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False}},
}
ConfigStore.instance().store("bench_libero", DEFAULTS)


def milliseconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return (time.process_time() - started) * 1e3


@hydra.main(version_base="1.3", config_path=None, config_name="bench_libero")
def main(config: DictConfig) -> None:
    """Print the table."""
    suite = get_suite(config.suite, plain(config))
    env: Any = suite.make(image_size=config.image_size)
    env.unwrapped.skip_images = True
    action = np.array([0.1, 0, 0, 0, 0, 0, -1.0])

    def reset(task: int) -> None:
        env.reset(options={"task": task, "initial_state": 0})

    rows = {"first environment, with imports": [milliseconds(lambda: reset(0))]}
    rows["switch to another task"] = [milliseconds(partial(reset, task)) for task in (1, 2, 3)]
    rows["reset"] = [milliseconds(lambda: reset(3)) for _ in range(3)]
    rows["control step, no images"] = [milliseconds(lambda: env.step(action)) for _ in range(config.steps)]
    env.unwrapped.skip_images = False
    env.step(action)
    rows["control step with both images"] = [milliseconds(lambda: env.step(action)) for _ in range(config.steps)]
    print(f"{config.suite}, images {config.image_size}x{config.image_size}, {dict(suite.settings)}")
    print(f"{machine()['cpu']}, {machine()['environment']}")
    print(f"{'milliseconds of a core':<34}{'calls':>7}{'least':>9}{'median':>9}")
    for name, samples in rows.items():
        print(f"{name:<34}{len(samples):>7}{min(samples):>9.0f}{median(samples):>9.0f}")
    print(f"memory at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
    env.close()


if __name__ == "__main__":
    main()
