"""Compare the methods of `search_schedule`: best value after 1, 27, 40 and 60 evaluations, and seconds.

python tests/benchmarks/bench_schedule_search.py checkpoints/tabletop_object token_norm
python tests/benchmarks/bench_schedule_search.py FOLDER global_attention '{"threshold": [0, 10], "cell": [2, 8]}'
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.model.routers.schedule_objective import schedule_objective
from cogvla.routing.router import RouterConfig
from cogvla.routing.schedule_search import METHODS, Schedule, search
from cogvla.scripts.command import compose, plain
from cogvla.scripts.measure.recorded import batches, draw_frames
from cogvla.scripts.measure.search_schedule import together

FRAMES, SHOWN = 16, (1, 27, 40, 60)


def main() -> None:
    """Print a line for each mean share, method and seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("router", help="name of a router with scores")
    parser.add_argument("ranges", nargs="?", default="{}", help="numerical options that are searched, as JSON")
    parser.add_argument(
        "--root", default="outputs/demonstrations/tabletop_object", help="folder of the recorded frames"
    )
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds")
    words = parser.parse_args()
    torch.set_num_threads(1)
    overrides = [f"checkpoint={words.checkpoint}", f"data.root={words.root}", f"observations={FRAMES}"]
    policy = load_policy(words.checkpoint)
    data, rows = draw_frames(policy, plain(compose("search_schedule", overrides)), observations=FRAMES)
    inputs = together([batch.inputs for batch in batches(policy, data, rows)])
    router = RouterConfig(words.router, layer_router="carried", layers=(1, 2))
    objective = schedule_objective(policy.model, inputs, router)
    ranges = {name: tuple(bounds) for name, bounds in json.loads(words.ranges).items()}
    tokens = policy.model.vision.tokens // len(policy.embodiment.cameras)
    for mean in (0.25, 0.125):
        for method in METHODS:
            for seed in range(words.seeds):
                best: list[float] = []

                def watch(_: Schedule, value: float, best: list[float] = best) -> None:
                    best.append(max([value, *best[-1:]]))

                started = time.monotonic()
                search(objective, (1, 2), 3, mean, ranges, SHOWN[-1], seed, method, watch, tokens)
                shown = " ".join(f"{best[number - 1]:.5f}" for number in SHOWN)
                print(f"{mean:<5} {method:<9} seed {seed}  {shown}  {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
