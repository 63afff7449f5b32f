"""The frame cache: its size, time to read a batch from it, and training from it and from arrays in memory, in turns.

python tests/benchmarks/bench_frame_cache.py data.episodes=0.2
python tests/benchmarks/bench_frame_cache.py suite=libero_object embodiment=libero_small data.episodes=0.2

The data set must be there: `record_demonstrations suite=SUITE`, or an earlier `train_policy`. Its decoded frames must
fit into memory. Times are CPU times of this thread, except those of steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from cogvla.configs.build import build
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.frame_file import FrameFile
from cogvla.policy.data.frames import ArrayFrames, Frames
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.threads import use_threads
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.scripts.command import compose, plain
from cogvla.scripts.training.build import build_trainer

WARM_UP = 20
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("overrides", nargs="*", help="of train_policy")
parser.add_argument("--rounds", type=int, default=4)
parser.add_argument("--steps", type=int, default=50, help="of each kind in each round")
options = parser.parse_intermixed_args()

values = plain(compose("train_policy", options.overrides))
use_threads(values["threads"])
embodiment = build(Embodiment, values["embodiment"], "embodiment")
config = build(TrainingConfig, values["training"], "training")
model = CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]})
objective = build(ObjectiveConfig, values["objective"], "objective")
data = DemonstrationData.open(build(DataConfig, values["data"], "data"), embodiment)
cached = data.frames
assert isinstance(cached, FrameFile)
raw = int(np.prod(cached.shape[1:]))
stored = cached.path.stat().st_size / len(cached)
print(f"{len(cached)} time steps; bytes per time step: {raw} decoded, {stored:.0f} in the cache ({stored / raw:.1%})")

kinds: dict[str, Frames] = {"cache": cached, "array": ArrayFrames(cached.take(np.arange(len(cached))))}
reads: dict[str, list[float]] = {kind: [] for kind in kinds}
steps: dict[str, list[float]] = {kind: [] for kind in kinds}
with tempfile.TemporaryDirectory() as folder:
    trainer = build_trainer(config, model, objective, embodiment, data, Path(folder), lambda metrics, step: None)
    split = trainer.batches.data
    with nullcontext() if trainer.parallel is None else closing(trainer.parallel):
        for turn in range(options.rounds + 1):
            for kind, frames in kinds.items():
                trainer.batches.data = replace(split, frames=frames)
                for _ in range(options.steps if turn else WARM_UP):
                    rows = trainer.batches.rows(trainer.step + 1000).numpy()
                    started = time.perf_counter()
                    trainer._train_step()
                    took = time.perf_counter() - started
                    trainer.step += 1
                    cpu = time.thread_time()
                    frames.take(rows)
                    if turn:
                        steps[kind].append(took)
                        reads[kind].append(time.thread_time() - cpu)
for kind in kinds:
    step, read = 1e3 * median(steps[kind]), 1e3 * median(reads[kind])
    print(
        f"{kind}: median ms per step {step:.1f} (least {1e3 * min(steps[kind]):.1f}), "
        f"reading the {config.batch_size} samples of a step {read:.2f} ms, {read / step:.1%} of it"
    )
