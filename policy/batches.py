"""Recorded samples to training batches in the policy's terms, with counterfactual instructions and state dropout.

Shape legend: B batch, K chunk, T tasks of the suite, G = 6 (target xyz, goal xyz).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogvla.policy.data import DemonstrationData
from cogvla.policy.objective import GROUNDING_DIM, Batch, ObjectiveConfig, choose_alternative
from cogvla.policy.preprocess import Preprocessor

ALTERNATIVE_LABELS = ("alternatives", "possible", "task")


class BatchBuilder:
    """Builds `Batch`es; everything random comes from the generator that is passed in.

    Args:
        data: for the instructions and the scale of the labelled positions.
        preprocessor: the policy's.
        config: shares of counterfactual and state-less samples.
    """

    def __init__(self, data: DemonstrationData, preprocessor: Preprocessor, config: ObjectiveConfig) -> None:
        self.preprocessor, self.config = preprocessor, config
        self.instructions = data.instructions
        labels = data.labels
        self.has_positions = {"target", "goal"} <= labels.keys() and config.grounding > 0
        self.has_alternatives = self.has_positions and all(name in labels for name in ALTERNATIVE_LABELS)
        if config.phase_weights and "phase" not in labels:
            raise ValueError("objective.phase_weights needs a data set with `phase` labels; this one has none")
        self.phase_weights = torch.tensor(config.phase_weights or (1.0,))
        if self.has_positions:
            positions = torch.cat([labels["target"], labels["goal"]], dim=-1).float()
            self.position_mean, self.position_std = positions.mean(0), positions.std(0).clamp(min=1e-3)
        if self.has_alternatives:
            self.instruction_of_task = torch.full((labels["possible"].shape[-1],), -1)
            self.instruction_of_task[labels["task"].flatten()] = data.instruction_ids

    def training(self, samples: dict[str, Any], generator: torch.Generator) -> Batch:
        """A batch to learn from."""
        instruction_B = samples["instruction_id"]
        weight_BK = (~samples["action_is_pad"]).float()
        positions_BG = self.positions(samples)
        if self.config.phase_weights:
            weight_BK = weight_BK * self.phase_weights[samples["labels"]["phase"].flatten()][:, None]
        if self.has_alternatives and self.config.counterfactual:
            assert positions_BG is not None
            task_B, allowed_B = self.alternatives(samples, generator)
            swap_B = allowed_B & (torch.rand(len(task_B), generator=generator) < self.config.counterfactual)
            instruction_B = torch.where(swap_B, self.instruction_of_task[task_B], instruction_B)
            other_BG = self.normalise_positions(samples["labels"]["alternatives"][torch.arange(len(task_B)), task_B])
            positions_BG = torch.where(swap_B[:, None], other_BG, positions_BG)
            weight_BK = weight_BK * ~swap_B[:, None]
        state_BS = samples["state"]
        batch = self._batch(samples, state_BS, instruction_B, weight_BK, positions_BG)
        if self.config.state_dropout:
            keep_B = torch.rand(len(state_BS), generator=generator) >= self.config.state_dropout
            batch.inputs.state.mul_(keep_B[:, None].to(batch.inputs.state))
        return batch

    def evaluation(self, samples: dict[str, Any], instruction_B: Tensor | None = None) -> Batch:
        """The samples as they are, or with these instructions instead of their own."""
        chosen_B = samples["instruction_id"] if instruction_B is None else instruction_B
        weight_BK = (~samples["action_is_pad"]).float()
        return self._batch(samples, samples["state"], chosen_B, weight_BK, self.positions(samples))

    def alternatives(self, samples: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each sample another task [B] that its scene allows and the data name, and whether there is one [B]."""
        labels = samples["labels"]
        possible_BT = labels["possible"].bool() & (self.instruction_of_task >= 0)
        possible_BT = possible_BT.scatter(1, labels["task"].reshape(-1, 1), False)
        allowed_B = possible_BT.any(dim=1)
        possible_BT = possible_BT | ~allowed_B[:, None]
        return choose_alternative(possible_BT, generator), allowed_B

    def positions(self, samples: dict[str, Any]) -> Tensor | None:
        """Normalised labelled positions [B,6], or None when the data set has none."""
        if not self.has_positions:
            return None
        labels = samples["labels"]
        return self.normalise_positions(torch.cat([labels["target"], labels["goal"]], dim=-1))

    def normalise_positions(self, positions_BG: Tensor) -> Tensor:
        """Metres [B,6] to zero mean and unit variance over the data set."""
        assert positions_BG.shape[-1] == GROUNDING_DIM
        return (positions_BG.float() - self.position_mean) / self.position_std

    def _batch(
        self,
        samples: dict[str, Any],
        state_BS: Tensor,
        instruction_B: Tensor,
        weight_BK: Tensor,
        positions: Tensor | None,
    ) -> Batch:
        device = self.preprocessor.device
        instructions = [self.instructions[i] for i in instruction_B.tolist()]
        inputs = self.preprocessor.model_input(
            samples["pixels"].to(device, non_blocking=True), state_BS.to(device, non_blocking=True), instructions
        )
        actions_BKA = self.preprocessor.action_normaliser(samples["actions"].to(device, non_blocking=True))
        return Batch(inputs, actions_BKA, weight_BK.to(device), None if positions is None else positions.to(device))
