"""Latency and FLOPs of a checkpoint, or of a preset with random weights.

python tests/benchmarks/bench_policy.py checkpoint=FOLDER
python tests/benchmarks/bench_policy.py policy=tiny routing=no_lfp
python tests/benchmarks/bench_policy.py policy=cogvla_7b routing=faithful calls=0    (parameters and FLOPs only)
"""

from __future__ import annotations

import time
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from cogvla.libero.provenance import machine
from cogvla.libero.statistics import Latency, latency
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.config import CogVLAConfig
from cogvla.policy.flops import count_flops
from cogvla.policy.interface import Embodiment, Policy
from cogvla.policy.model import CogVLA
from cogvla.policy.normalise import Statistics
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.preprocess import Preprocessor
from cogvla.policy.roofline import format_table
from cogvla.policy.tokenizer import WordTokenizer

WARM_UP = 5
DEFAULTS = {
    "defaults": [
        {"policy": "tiny"},
        {"routing": "cogvla"},
        {"embodiment": "tabletop"},
        "_self_",
        {"override hydra/job_logging": "disabled"},
        {"override hydra/hydra_logging": "disabled"},
    ],
    "checkpoint": None,
    "device": "cpu",
    "threads": 1,
    "batches": [1, 8],
    "calls": 200,
    "instruction": "put the red cube in the tray",
    "hydra": {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False}},
}
ConfigStore.instance().store("bench_policy", DEFAULTS)


def preset(config: CogVLAConfig, embodiment: Embodiment, instruction: str) -> CogVLAPolicy:
    """A policy with random weights; statistics do not change what it costs."""
    rng = np.random.default_rng(0)
    statistics = {
        "state": Statistics.of(rng.standard_normal((1000, embodiment.state_dim))),
        "action": Statistics.of(rng.standard_normal((1000, embodiment.action_dim))),
    }
    preprocessor = Preprocessor(embodiment, WordTokenizer.from_instructions([instruction]), statistics)
    return CogVLAPolicy(CogVLA(config, embodiment), preprocessor)


def measure(policy: Policy, batch: int, calls: int, instruction: str) -> tuple[float, Latency, dict[str, float]]:
    """Wall time in ms of `act`, observation to actions in physical units: least, all, and the mean of each stage."""
    observation = policy.embodiment.fake_observation(batch)
    observation = type(observation)(observation.images, observation.state, [instruction] * batch)
    samples: list[float] = []
    stages: dict[str, float] = {}
    for call in range(WARM_UP + calls):
        started = time.perf_counter()
        timing = policy.act(observation).timing
        if call >= WARM_UP:
            samples.append((time.perf_counter() - started) * 1e3)
            for name, value in timing.items():
                stages[name] = stages.get(name, 0.0) + value / calls
    found = latency(samples)
    assert found is not None, "there was at least one call"
    return min(samples), found, stages


@hydra.main(version_base="1.3", config_path="pkg://cogvla.configs", config_name="bench_policy")
def main(config: DictConfig) -> None:
    """Print FLOPs by stage, then latency by batch size."""
    torch.set_num_threads(config.threads)
    values: Any = OmegaConf.to_container(config, resolve=True)
    policy: CogVLAPolicy | None = None
    if config.checkpoint is not None:
        policy = load_policy(config.checkpoint, config.device)
        model_config, embodiment = policy.model.config, policy.embodiment
        words = len(policy.preprocessor.text([config.instruction])[0][0])
    else:
        model_config = CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]})
        embodiment = Embodiment(**values["embodiment"])
        words = len(config.instruction.split())
        if config.calls:
            policy = preset(model_config, embodiment, config.instruction)
            policy = CogVLAPolicy(policy.model.to(config.device), policy.preprocessor)
    print(f"one sample, {len(embodiment.cameras)} views, {words} text tokens, {embodiment.chunk} actions per chunk")
    print(format_table(count_flops(model_config, embodiment, words)))
    if policy is None:
        return
    found = machine()
    print(f"\n{found['cpu']}, {found['torch_threads']} thread(s), device {config.device}")
    names = ("least ms", "p50 ms", "p95 ms", "p99 ms", "chunks/s")
    print(f"{'batch':<8}{'calls':>7}" + "".join(f"{name:>10}" for name in names) + "  mean of stages")
    for batch in config.batches:
        least, result, stages = measure(policy, batch, config.calls, config.instruction)
        parts = ", ".join(f"{name.removesuffix('_ms')} {value:.2f}" for name, value in stages.items())
        numbers = (least, result.p50, result.p95, result.p99, batch * result.rate_hz)
        line = f"{batch:<8}{result.count:>7}" + "".join(f"{number:>10.2f}" for number in numbers)
        print(f"{line}  {parts}")


if __name__ == "__main__":
    main()
