"""Measure the time that each objective of `policy/training/auxiliary` adds to a training step.

python tests/benchmarks/bench_objectives.py
python tests/benchmarks/bench_objectives.py --routing cogvla patches --batch 32 --steps 20
python tests/benchmarks/bench_objectives.py policy=small embodiment=libero --batch 1 --steps 3

Steps of all switches take turns. Seconds are of the processor, on one thread, and the least of all steps counts: other
work on the machine adds to both, and takes nothing away. Data are random, teacher and blind policy untrained: that does
not change their cost.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cogvla.configs.build import build
from cogvla.policy.checkpoint import save_checkpoint
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.heads.interface import DRAWS
from cogvla.policy.training.auxiliary.blind_weights import BlindWeights
from cogvla.policy.training.objective import Batch, Objective, ObjectiveConfig
from cogvla.scripts.command import compose

TEXT = "put the red block into the bowl"
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "contrast": {"contrast": 0.1},
    "diversity": {"diversity": 1.0},
    "masking": {"masking": 0.5},
    "vision_dropout": {"vision_dropout": 0.5},
    "pointing": {"pointing": 0.1},
    "distillation": {"distillation": 1.0, "teacher": "folder"},
    "prior": {},
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("overrides", nargs="*", help="of train_policy")
parser.add_argument("--routing", nargs="+", default=["cogvla", "patches"])
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_intermixed_args()
torch.set_num_threads(1)


def random_batch(embodiment: Embodiment, preprocessor: Preprocessor) -> Batch:
    size, views = options.batch, len(embodiment.cameras)
    pixels = torch.randint(0, 256, (size, views, 3, *preprocessor.image_size), dtype=torch.uint8)
    noise = torch.randn(size, DRAWS, embodiment.chunk, embodiment.action_dim)
    inputs = ModelInput(
        pixels,
        *preprocessor.text([TEXT] * size),
        torch.randn(size, embodiment.state_dim),
        torch.randint(2**62, (size, 2)),
    )
    points, weight = torch.rand(size, views, 2, 2), torch.ones(size, views, 2)
    weight_BK = torch.ones(size, embodiment.chunk)
    return Batch(inputs, noise[:, 0], weight_BK, None, points, weight, noise, torch.rand(size, DRAWS))


def step_of(objective: Objective, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        objective(batch)["loss"].backward()
        objective.zero_grad()

    return step


def weights_of(blind: BlindWeights, batch: Batch) -> Callable[[], Any]:
    samples = {"state": batch.inputs.state, "actions": batch.actions_BKA}
    assert batch.noise_BRKA is not None
    assert batch.time_BR is not None
    rest = torch.ones(options.batch).bool(), batch.weight_BK, batch.noise_BRKA, batch.time_BR
    return lambda: blind(samples, [TEXT] * options.batch, *rest)


def statistics(dimensions: int) -> Statistics:
    low, high = (-1.0,) * dimensions, (1.0,) * dimensions
    return Statistics(q01=low, q99=high, min=low, max=high, mean=(0.0,) * dimensions, std=high)


def measure(routing: str, folder: Path) -> dict[str, float]:
    """Seconds per step by switch; of `prior`, what comes before it."""
    composed = compose("train_policy", [f"routing={routing}", *options.overrides])
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    embodiment = build(Embodiment, values["embodiment"], "embodiment")
    config = CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]})
    data = {"state": statistics(embodiment.state_dim), "action": statistics(embodiment.action_dim)}
    preprocessor = Preprocessor(embodiment, WordTokenizer.from_instructions([TEXT]), data)
    torch.manual_seed(0)
    model, teacher, batch = (
        CogVLA(config, embodiment),
        CogVLA(config, embodiment),
        random_batch(embodiment, preprocessor),
    )
    save_checkpoint(folder, teacher.state_dict(), config, preprocessor, data, {})
    off = ObjectiveConfig(
        grounding=0, reading=0, pointing=0, counterfactual=0, gripper_state=(), state_dropout=0, phase_weights=()
    )
    steps: dict[str, Callable[[], Any]] = {}
    for name, change in SWITCHES.items():
        objective = Objective(model, replace(off, **change), teacher)
        steps[name] = step_of(objective.train(), batch)
    steps["prior"] = weights_of(BlindWeights(str(folder), 1.0, preprocessor, [TEXT]), batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.steps + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    return {name: min(times[1:]) for name, times in seconds.items()}


for routing in options.routing:
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(routing, Path(folder) / "policy")
    none = seconds["none"]
    print(f"routing={routing}, batch {options.batch}: {1e3 * none:.0f} ms per step without any")
    for name, value in list(seconds.items())[1:]:
        added = value if name == "prior" else value - none
        print(f"  {name:<16}{1e3 * added:>8.1f} ms{added / none:>8.0%}", flush=True)
