"""Measure how well a policy acts while its chunk is late, told what is executed meanwhile, on recorded frames.

python tests/benchmarks/bench_committed.py checkpoints/tabletop_object suite=tabletop_object
python tests/benchmarks/bench_committed.py FOLDER suite=tabletop_object data.root=FOLDER

For each delay: the mean error of the first action after it, told and not told, normalised; and by how much the next
actions change along an axis (mean and mean size over the first four, x and y), if the committed ones are 0.3 larger.
A policy that knows what they do takes this back: its mean is negative.

Shape legend: as in `policy.interface`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cogvla.configs.build import build
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.interface import Committed, Observation
from cogvla.scripts.command import compose, plain

FRAMES, BATCH, MORE = 512, 64, 0.3


def main(checkpoint: str, overrides: Sequence[str]) -> None:
    """Print the table, for held-out frames of the data set."""
    torch.set_num_threads(1)
    values = plain(compose("train_policy", list(overrides)))
    policy = load_policy(checkpoint)
    robot = policy.embodiment
    data = open_data(build(DataConfig, values["data"], "data"), robot)
    _, held_out = data.split(values["training"]["validation_fraction"], 0)
    samples = TrainingBatches(held_out, FRAMES, seed=0)
    whole = samples.gather(samples.rows(0))
    keep_B = ~whole["action_is_pad"].any(1)
    images = {name: whole["pixels"][keep_B, i].permute(0, 2, 3, 1).numpy() for i, name in enumerate(robot.camera_names)}
    state_BS, words_B = whole["state"][keep_B].numpy(), [data.instructions[i] for i in whole["instruction_id"][keep_B]]
    expert_BKA, executed_BKA = whole["actions"][keep_B], whole["executed"][keep_B].numpy()

    def act(committed_BKA: np.ndarray | None, delay: int) -> Tensor:
        parts = []
        for rows in np.split(np.arange(len(state_BS)), np.arange(BATCH, len(state_BS), BATCH)):
            told = None if committed_BKA is None else [Committed(committed_BKA[row, :delay], delay) for row in rows]
            seen = {name: views[rows] for name, views in images.items()}
            observation = Observation(seen, state_BS[rows], [words_B[i] for i in rows], committed=told)
            parts.append(policy.act(observation).actions)
        return policy.preprocessor.normalised_actions(torch.from_numpy(np.concatenate(parts)))

    expert_BKA, untold_BKA = policy.preprocessor.normalised_actions(expert_BKA), act(None, 0)
    print(f"{len(state_BS)} frames, {policy.describe().get('committed', 'committed actions are ignored')}")
    print("| delay | error told | not told | change if they are larger | its size |\n|---|--:|--:|--:|--:|")
    for delay in (1, 2, 4):
        told_BKA, larger_BKA = act(executed_BKA, delay), executed_BKA.copy()
        larger_BKA[:, :delay, :2] += MORE
        change = (act(larger_BKA, delay) - told_BKA)[:, delay : delay + 4, :2]
        errors = [float((x[:, delay] - expert_BKA[:, delay]).abs().mean()) for x in (told_BKA, untold_BKA)]
        print(f"| {delay} | {errors[0]:.3f} | {errors[1]:.3f} | {change.mean():+.4f} | {change.abs().mean():.4f} |")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
