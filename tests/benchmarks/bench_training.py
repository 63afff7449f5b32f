"""Training steps per second of a preset, by routing, at one batch: forward, backward and a fused AdamW, random data.

python tests/benchmarks/bench_training.py --preset tiny --batch 32 --steps 20 --threads 1
python tests/benchmarks/bench_training.py --preset small --batch 1 --steps 2
python tests/benchmarks/bench_training.py --preset small --batch 16 --device cuda --dtype bfloat16

Beside the rate stands the share of what large products reach on this machine, taking three forward passes' FLOPs for a
step. Data are not loaded: `TrainingBatches` is measured by itself (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import time

import torch

from cogvla.policy.cost.flops import TOTAL, count_flops
from cogvla.policy.cost.timing import machine_peaks
from cogvla.policy.cost.variants import VARIANTS, preset
from cogvla.policy.model.cogvla import CogVLA, ModelInput

WORDS = 7
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="tiny")
parser.add_argument("--rows", nargs="+", default=["all off", "bypass", "drop"], choices=list(VARIANTS))
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--views", type=int, default=2)
parser.add_argument("--size", type=int)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
parser.add_argument("--threads", type=int)
parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
options = parser.parse_args()
if options.threads is not None:
    torch.set_num_threads(options.threads)


def wait() -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


peaks = machine_peaks(options.device, options.dtype)
print(f"{peaks.name}, {options.dtype}: large products {peaks.flops / 1e12:.3g} TFLOP/s; batch {options.batch}")
print(f"{'':<20}{'s/step':>10}{'samples/s':>11}{'TFLOP':>9}{'of peak':>9}{'times':>7}")
base = 0.0
for name in options.rows:
    config, embodiment = preset(VARIANTS[name], options.preset, options.views, options.size)
    torch.manual_seed(0)
    model = CogVLA(config, embodiment).to(options.device)
    model.recompute_blocks(options.recompute)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    height, width = embodiment.cameras[0].height, embodiment.cameras[0].width
    shape = (options.batch, options.views, 3, height, width)
    inputs = ModelInput(
        torch.randint(0, 256, shape, dtype=torch.uint8),
        torch.randint(0, config.language.vocab_size - 2, (options.batch, WORDS)),
        torch.ones(options.batch, WORDS, dtype=torch.bool),
        torch.randn(options.batch, embodiment.state_dim),
    ).to(options.device)
    expert = torch.randn(options.batch, embodiment.chunk, embodiment.action_dim, device=options.device)
    times: list[float] = []
    for _ in range(options.steps + 1):
        wait()
        started = time.perf_counter()
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model.head.error(model(inputs, decode=False).states, expert).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        wait()
        times.append(time.perf_counter() - started)
    seconds = sorted(times[1:])[len(times[1:]) // 2]
    costs = count_flops(config, embodiment, WORDS, options.batch)
    flops = 3 * next(cost.flops for cost in costs if cost.stage == TOTAL) * (4 / 3 if options.recompute else 1)
    base = base or seconds
    rate = f"{seconds:>10.3f}{options.batch / seconds:>11.1f}{flops / 1e12:>9.3g}"
    print(f"{name:<20}{rate}{flops / seconds / peaks.flops:>9.0%}{base / seconds:>7.2f}", flush=True)
    del model, optimiser, loss
