"""Environment steps per second of an evaluation, by number of worker processes, and the share of inference in it.

python tests/benchmarks/bench_rollout.py checkpoints/tabletop_object tabletop_object --workers 0 2 4 8 --episodes 300
python tests/benchmarks/bench_rollout.py FOLDER libero_goal --lean --robot-meshes FOLDER --workers 0 2 4 --episodes 40
"""

from __future__ import annotations

import argparse
import time

import torch

from cogvla.envs.evaluation.protocol import load_protocol
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import open_policy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("suite")
parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 3])
parser.add_argument("--episodes", type=int, default=60)
parser.add_argument("--threads", type=int, default=1, help="of the policy")
parser.add_argument("--lean", action="store_true", help="of the suites libero_*: as libero=lean")
parser.add_argument("--robot-meshes", help="with --lean")
options = parser.parse_args()

policy, _ = open_policy(options.checkpoint, threads=options.threads)
lean = {"lean": True, "reflections": False, "extra_passes": False, "robot_meshes": options.robot_meshes}
suite = get_suite(options.suite, {"libero": lean} if options.lean else {})
per_task = -(-options.episodes // len(suite.tasks))
protocol = load_protocol(suite.protocol, episodes_per_task=per_task).for_suite(suite)
specs = protocol.episodes(suite, None, None, (1, 1))[: options.episodes]
print(f"{suite.name}, {len(specs)} episodes, {torch.get_num_threads()} torch thread(s)")
print(f"{'workers':>8}{'steps/s':>10}{'times':>8}{'inference':>11}{'batch':>7}{'success':>9}")
base = 0.0
for workers in options.workers:
    for batch in range(1, max(workers, 1) + 1):
        policy.warm_up(batch, [task.instruction for task in suite.tasks])
    started = time.perf_counter()
    first = 0.0
    results = []
    for result in rollout(policy, suite, specs, workers=workers, settings=protocol.rollout_settings()):
        results.append(result)
        first = first or time.perf_counter()  # without the start of processes and the first episodes
    seconds = time.perf_counter() - first
    steps = sum(result.steps for result in results[1:])
    inference = sum(ms / n for r in results for ms, n in zip(r.inference_ms, r.batch, strict=True)) / 1e3
    batch_mean = sum(sum(r.batch) for r in results) / sum(len(r.batch) for r in results)
    rate = steps / seconds
    base = base or rate
    share = inference / (time.perf_counter() - started)
    success = sum(r.success for r in results) / len(results)
    print(f"{workers:>8}{rate:>10.0f}{rate / base:>8.2f}{share:>11.0%}{batch_mean:>7.2f}{success:>9.0%}", flush=True)
