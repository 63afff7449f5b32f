"""Recorded samples to training batches in the policy's terms, with counterfactual instructions and state dropout.

Shape legend: B batch, K chunk, T tasks of the suite, G = 6 (target xyz, goal xyz).
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cogvla.policy.data import DemonstrationData
from cogvla.policy.objective import Batch, ObjectiveConfig, choose_alternative
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
        self.projections = [f"projection_{name}" for name in preprocessor.embodiment.camera_names]
        self.has_projections = self.has_positions and all(name in labels for name in self.projections)
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
        points_BG = self.points(samples)
        if self.config.phase_weights:
            weight_BK = weight_BK * self.phase_weights[samples["labels"]["phase"].flatten()][:, None]
        if self.has_alternatives and self.config.counterfactual:
            assert points_BG is not None
            task_B, allowed_B = self.alternatives(samples, generator)
            swap_B = allowed_B & (torch.rand(len(task_B), generator=generator) < self.config.counterfactual)
            instruction_B = torch.where(swap_B, self.instruction_of_task[task_B], instruction_B)
            other_BG = samples["labels"]["alternatives"][torch.arange(len(task_B)), task_B]
            points_BG = torch.where(swap_B[:, None], other_BG, points_BG)
            weight_BK = weight_BK * ~swap_B[:, None]
        state_BS = samples["state"]
        batch = self._batch(samples, state_BS, instruction_B, weight_BK, points_BG)
        if self.config.state_dropout:
            keep_B = torch.rand(len(state_BS), generator=generator) >= self.config.state_dropout
            batch.inputs.state.mul_(keep_B[:, None].to(batch.inputs.state))
        return batch

    def evaluation(self, samples: dict[str, Any], instruction_B: Tensor | None = None) -> Batch:
        """The samples as they are, or with these instructions instead of their own."""
        chosen_B = samples["instruction_id"] if instruction_B is None else instruction_B
        weight_BK = (~samples["action_is_pad"]).float()
        return self._batch(samples, samples["state"], chosen_B, weight_BK, self.points(samples))

    def alternatives(self, samples: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each sample another task [B] that its scene allows and the data name, and whether there is one [B]."""
        labels = samples["labels"]
        possible_BT = labels["possible"].bool() & (self.instruction_of_task >= 0)
        possible_BT = possible_BT.scatter(1, labels["task"].reshape(-1, 1), False)
        allowed_B = possible_BT.any(dim=1)
        possible_BT = possible_BT | ~allowed_B[:, None]
        return choose_alternative(possible_BT, generator), allowed_B

    def points(self, samples: dict[str, Any]) -> Tensor | None:
        """Labelled positions [B,6] of target and goal in metres, or None when the data set has none."""
        labels = samples["labels"]
        return torch.cat([labels["target"], labels["goal"]], dim=-1) if self.has_positions else None

    def project(self, samples: dict[str, Any], points_BG: Tensor) -> Tensor | None:
        """Where the points are in each view, [B,V,2,2]; points behind a camera are far outside."""
        if not self.has_projections:
            return None
        projection_BV34 = torch.stack([samples["labels"][name] for name in self.projections], dim=1)
        points_B23 = rearrange(points_BG, "b (two xyz) -> b two xyz", two=2)
        homogenous_B24 = torch.cat([points_B23, torch.ones_like(points_B23[..., :1])], dim=-1)
        uvd_BV23 = torch.einsum("bvij,bpj->bvpi", projection_BV34, homogenous_B24)
        visible_BV21 = uvd_BV23[..., 2:] > 1e-3
        return torch.where(visible_BV21, uvd_BV23[..., :2] / uvd_BV23[..., 2:].clamp(min=1e-3), -1.0)

    def _batch(
        self,
        samples: dict[str, Any],
        state_BS: Tensor,
        instruction_B: Tensor,
        weight_BK: Tensor,
        points_BG: Tensor | None,
    ) -> Batch:
        device = self.preprocessor.device
        instructions = [self.instructions[i] for i in instruction_B.tolist()]
        inputs = self.preprocessor.model_input(
            samples["pixels"].to(device, non_blocking=True), state_BS.to(device, non_blocking=True), instructions
        )
        actions_BKA = self.preprocessor.action_normaliser(samples["actions"].to(device, non_blocking=True))
        if points_BG is None:
            return Batch(inputs, actions_BKA, weight_BK.to(device), None)
        positions_BG = (points_BG - self.position_mean) / self.position_std
        image_points = self.project(samples, points_BG)
        return Batch(
            inputs,
            actions_BKA,
            weight_BK.to(device),
            positions_BG.to(device),
            None if image_points is None else image_points.to(device),
        )
