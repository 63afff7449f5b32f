"""Samples per second of `train_policy` in a steady state: batches, both passes, optimiser, averages. Nothing is saved.

python tests/benchmarks/bench_trainer.py
python tests/benchmarks/bench_trainer.py suite=tabletop_goal training.batch_size=64 training.cpu_parts=1 --steps 100

The data set must be there: `record_demonstrations suite=SUITE`, or an earlier `train_policy`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path

from cogvla.configs.build import build
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.threads import use_threads
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.scripts.command import compose, plain
from cogvla.scripts.training.build import build_trainer

WARM_UP = 40
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("overrides", nargs="*", help="of train_policy")
parser.add_argument("--steps", type=int, default=160, help=f"timed, after {WARM_UP} others")
options = parser.parse_intermixed_args()

values = plain(compose("train_policy", options.overrides))
use_threads(values["threads"])
embodiment, config = (
    build(Embodiment, values["embodiment"], "embodiment"),
    build(TrainingConfig, values["training"], "training"),
)
model = CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]})
data = DemonstrationData.open(build(DataConfig, values["data"], "data"), embodiment)
times: list[float] = []
with tempfile.TemporaryDirectory() as folder:
    objective = build(ObjectiveConfig, values["objective"], "objective")
    trainer = build_trainer(config, model, objective, embodiment, data, Path(folder), lambda metrics, step: None)
    with nullcontext() if trainer.parallel is None else closing(trainer.parallel):
        for _ in range(WARM_UP + options.steps):
            started = time.perf_counter()
            trainer._train_step()
            trainer.step += 1
            times.append(time.perf_counter() - started)
times = sorted(times[WARM_UP:])
print(
    f"{config.batch_size * len(times) / sum(times):.0f} samples/s; ms per step: least {1e3 * times[0]:.1f}, "
    f"median {1e3 * times[len(times) // 2]:.1f}"
)
