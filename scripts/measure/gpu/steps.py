"""Training steps without the training loop: the project's batches, objective, adapters and optimiser, in bfloat16."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.frames import ArrayFrames
from cogvla.policy.data.mixture.task_labels import TASK_LABELS
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.training.batches import POSITION_LABELS, BatchBuilder
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import Objective, ObjectiveConfig
from cogvla.policy.training.trained_weights import TrainedWeights

EPISODE = 16
"""Frames of a generated episode."""


class Steps:
    """Trains a model on demonstrations, one step at a time.

    Args:
        model: network with float32 weights, on its device.
        data: demonstrations to draw batches from.
        training: batch size, adapters and optimiser.
        objective: losses.
    """

    def __init__(
        self, model: CogVLA, data: DemonstrationData, training: TrainingConfig, objective: ObjectiveConfig
    ) -> None:
        device = next(model.parameters()).device
        self.accelerator = Accelerator(mixed_precision="bf16", cpu=device.type == "cpu")
        tokenizer = WordTokenizer.from_instructions(data.instructions)
        self.preprocessor = Preprocessor(model.embodiment, tokenizer, data.statistics()).to(device)
        self.builder = BatchBuilder(data, self.preprocessor, objective)
        whole = Objective(model, objective).to(device)
        self.weights = TrainedWeights(self.accelerator, whole, training)
        self.data, self.count = data, 0
        self.batches = TrainingBatches(data, training.batch_size, seed=0)

    def resize(self, batch: int) -> None:
        """Draw batches of another size, and free what a step that failed has left."""
        self.batches = TrainingBatches(self.data, batch, seed=0)
        self.weights.optimiser.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def step(self, learning_rate: float) -> Tensor:
        """Make one step; return the loss."""
        rows = self.batches.rows(self.count)
        generator = torch.Generator().manual_seed(self.count)
        choices = self.builder.choose(self.batches.columns(rows), generator)
        batch = self.builder.build(self.batches.gather(rows), choices)
        self.weights.objective.train()
        with self.accelerator.autocast():
            loss = self.weights.objective(batch)["loss"]
        self.accelerator.backward(loss)
        self.count += 1
        self.weights.update(learning_rate, self.count)
        return loss.detach()


def objective_for(data: DemonstrationData, robot: Embodiment) -> ObjectiveConfig:
    """Return the default losses, or imitation alone if the data do not have all labels."""
    projections = [f"projection_{name}" for name in robot.camera_names]
    if {*POSITION_LABELS, *TASK_LABELS, *projections, "phase"} <= data.frame_labels.keys():
        return ObjectiveConfig()
    return build(ObjectiveConfig, load("objective", "imitation"), "objective")


def generated(robot: Embodiment, episodes: int) -> DemonstrationData:
    """Return random demonstrations of a robot, for measurements that do not depend on their content."""
    generator = torch.Generator().manual_seed(0)
    count, camera = episodes * EPISODE, robot.cameras[0]
    shape = (count, len(robot.cameras), 3, camera.height, camera.width)
    episode_N = torch.arange(episodes).repeat_interleave(EPISODE)
    data = DemonstrationData(
        frames=ArrayFrames(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy()),
        state_NS=torch.randn(count, robot.state_dim, generator=generator),
        action_NA=torch.rand(count, robot.action_dim, generator=generator) * 2 - 1,
        episode_N=episode_N,
        instruction_N=episode_N % 2,
        instructions=["put the red cube in the tray", "put the blue cube in the tray"],
        frame_labels={},
        chunk=robot.chunk,
    )
    return replace(data, provenance={"name": "generated", "episodes": episodes, "frames": count})
