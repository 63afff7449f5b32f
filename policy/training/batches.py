"""Build training batches from recorded samples, with counterfactual instructions, state dropout and image augmentation.

Random choices are made for a whole step at once, and weights have a mean of 1 over the step. So the gradients of the
parts of a step (on several processes, or one after the other with accumulation) add up to the gradient of the whole.

Shape legend: B batch, V views, K chunk, T tasks of the suite or words, G = 6 (target xyz, goal xyz), X samples times
earlier observations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.mixture.task_labels import TASK_LABELS, contradiction
from cogvla.policy.inputs.augmentation import AugmentationConfig, Changes, centre, change, draw_changes, move_points
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.model.cogvla import ModelInput, Past
from cogvla.policy.model.heads.committed import CommittedInput
from cogvla.policy.model.heads.interface import DRAWS
from cogvla.policy.training.auxiliary.blind_weights import BlindWeights
from cogvla.policy.training.objective import Batch, ObjectiveConfig, choose_alternative
from cogvla.policy.training.wordings import InstructionAugmentation, Wordings

POSITION_LABELS = ("target", "goal")


@dataclass(frozen=True)
class Choices:
    """The random choices of a step, for each sample.

    Attributes:
        instruction_B: index of the instruction.
        keep_state_B: False to hide the state.
        weight_BK: see `Batch`.
        points_BG: target and goal position in metres; None without labels.
        image_points_BV22: see `Batch`.
        point_weight_BV2: see `Batch`.
        corner_BV2: corner of the crop, see `Changes`.
        jitter_BV4: change of colours, see `Changes`.
        light_BV9: change of light and sensor, see `Changes`.
        noise_BRKA: see `Batch`; None in evaluation, which decodes actions.
        time_BR: see `Batch`; None in evaluation.
        draw_B2: see `ModelInput.draw`; None in evaluation.
        wording_B: index of the wording, see `Wordings`; None: the instruction as the data has it.
        unknown_BT: True for words to replace by the unknown word; None: no word.
        committed_B: number of committed actions, int64; None: none.
    """

    instruction_B: Tensor
    keep_state_B: Tensor
    weight_BK: Tensor
    points_BG: Tensor | None = None
    image_points_BV22: Tensor | None = None
    point_weight_BV2: Tensor | None = None
    corner_BV2: Tensor | None = None
    jitter_BV4: Tensor | None = None
    light_BV9: Tensor | None = None
    noise_BRKA: Tensor | None = None
    time_BR: Tensor | None = None
    draw_B2: Tensor | None = None
    wording_B: Tensor | None = None
    unknown_BT: Tensor | None = None
    committed_B: Tensor | None = None

    @property
    def changes(self) -> Changes:
        """The changes of the images."""
        return Changes(self.corner_BV2, self.jitter_BV4, self.light_BV9)

    def part(self, index_b: Tensor) -> Choices:
        """Return the choices of the samples with these indices."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        parts: dict[str, Any] = {name: None if value is None else value[index_b] for name, value in values.items()}
        return Choices(**parts)


class BatchBuilder:
    """Builds `Batch`es; all randomness comes from the generator that is passed in.

    Args:
        data: data set; gives the instructions, and the scale of the labelled positions.
        preprocessor: preprocessor of the policy.
        config: shares of counterfactual samples and of samples without state, and weights of the actions.
        augmentation: image augmentation, with the same crop area as the preprocessor; None: crops only. Evaluation
            batches get the centre crop only.
        instructions: other wordings of the instructions in training; None: none.
        prefix: largest number of committed actions in training, see `ActionHeadConfig.prefix`.
        prefix_share: share of samples with committed actions, 1 to `prefix` of them.

    Raises:
        ValueError: the data does not have the labels that the objective needs, or the crop areas differ.
    """

    def __init__(
        self,
        data: DemonstrationData,
        preprocessor: Preprocessor,
        config: ObjectiveConfig,
        augmentation: AugmentationConfig | None = None,
        instructions: InstructionAugmentation | None = None,
        prefix: int = 0,
        prefix_share: float = 0.75,
    ) -> None:
        self.preprocessor, self.config = preprocessor, config
        self.prefix, self.prefix_share = prefix, prefix_share
        names = tuple(part.name for part in data.parts)
        if data.each and preprocessor.sets != names:
            raise ValueError(
                f"data.statistics=each: the policy has statistics of {', '.join(preprocessor.sets) or 'one data set'}, "
                f"the data sets are {', '.join(names)}; give data.statistics=joint"
            )
        self.augmentation = augmentation or AugmentationConfig(crop_area=preprocessor.crop_area)
        if self.augmentation.crop_area != preprocessor.crop_area:
            raise ValueError(
                f"training crops {self.augmentation.crop_area} of the area, the preprocessor {preprocessor.crop_area}; "
                "build the preprocessor with the augmentation's crop_area"
            )
        self.views = len(preprocessor.embodiment.cameras)
        self.instructions = data.instructions
        self.wordings = Wordings(data, preprocessor.tokenizer, instructions or InstructionAugmentation())
        labels = data.labels
        self.projections = [f"projection_{name}" for name in preprocessor.embodiment.camera_names]
        needs = {
            "grounding": POSITION_LABELS,
            "reading": POSITION_LABELS,
            "pointing": (*POSITION_LABELS, *self.projections),
            "pointer": (*POSITION_LABELS, *self.projections),
            "counterfactual": (*POSITION_LABELS, *TASK_LABELS),
            "phase_weights": ("phase",),
        }
        wanted = [name for name in needs if getattr(config, name)]
        for name in wanted:
            if missing := [label for label in needs[name] if label not in labels]:
                why = next((f" ({label}: {data.lacking[label]})" for label in missing if label in data.lacking), "")
                raise ValueError(
                    f"objective.{name} needs the labels {', '.join(missing)}, which the data does not have{why}: "
                    "map them in data.labels, or turn it off (objective=imitation needs no labels)"
                )
        self.has_positions = any(needs[name] != ("phase",) for name in wanted)
        self.has_alternatives = all(name in labels for name in TASK_LABELS)
        if self.has_alternatives and (wrong := contradiction(labels, data.instruction_ids, data.instructions)):
            if config.counterfactual:
                raise ValueError(f"{wrong}; correct the data, or turn objective.counterfactual off")
            self.has_alternatives = False
        self.has_projections = self.has_positions and all(name in labels for name in self.projections)
        if config.phase_weights and int(labels["phase"].max()) >= len(config.phase_weights):
            largest = int(labels["phase"].flatten().argmax())
            episode = data.episode_name(int(data.all_rows[largest]))
            raise ValueError(
                f"objective.phase_weights has {len(config.phase_weights)} entries, "
                f"the data has phases 0 to {int(labels['phase'].max())}; give a weight for each ({episode} has it)"
            )
        self.phase_weights = torch.tensor(config.phase_weights or (1.0,))
        if self.has_positions:
            positions = torch.cat([labels["target"], labels["goal"]], dim=-1).float()
            if not positions.isfinite().all():
                raise ValueError(
                    "label `target` or `goal` holds NaN or infinite values; leave these labels out of the data"
                )
            self.position_mean, self.position_std = positions.mean(0), positions.std(0).clamp(min=1e-3)
            if config.gripper_state:
                relative = self._relative(positions, data.state_NS[data.all_rows])
                self.relative_mean, self.relative_std = relative.mean(0), relative.std(0).clamp(min=1e-3)
        if self.has_alternatives:
            self.instruction_of_task = torch.full((labels["possible"].shape[-1],), -1)
            self.instruction_of_task[labels["task"].flatten()] = data.instruction_ids
        self.blind: BlindWeights | None = None
        if config.prior:
            assert config.blind is not None
            self.blind = BlindWeights(config.blind, config.prior, preprocessor, data.instructions)

    def training(self, samples: dict[str, Any], generator: torch.Generator) -> Batch:
        """Build one training batch from all samples of a step."""
        return self.build(samples, self.choose(samples, generator))

    def choose(self, samples: dict[str, Any], generator: torch.Generator) -> Choices:
        """Draw the random choices for all samples of a step; `samples` needs no pixels."""
        instruction_B, points_BG = samples["instruction_id"], self.points(samples)
        weight_BK = (~samples["action_is_pad"]).float()
        if "weight" in samples:
            weight_BK = weight_BK * samples["weight"][:, None]
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
        keep_B = torch.ones(len(instruction_B), dtype=torch.bool)
        if self.config.state_dropout:
            keep_B = torch.rand(len(instruction_B), generator=generator) >= self.config.state_dropout
        changes = draw_changes(self.augmentation, len(instruction_B), self.views, generator)
        robot, shape = self.preprocessor.embodiment, (len(instruction_B), DRAWS)
        noise_BRKA = torch.randn(*shape, robot.chunk, robot.action_dim, generator=generator)
        time_BR = torch.rand(shape, generator=generator)
        draw_B2 = torch.randint(2**62, (len(instruction_B), 2), generator=generator)
        draw_B2[:, 1] = draw_B2[0, 1]
        if self.blind is not None:
            asked = [self.instructions[i] for i in instruction_B.tolist()]
            weight_BK = weight_BK * self.blind(samples, asked, keep_B, weight_BK, noise_BRKA, time_BR)
        committed_B: Tensor | None = None
        if self.prefix:
            given_B = torch.rand(len(instruction_B), generator=generator) < self.prefix_share
            committed_B = torch.randint(1, self.prefix + 1, given_B.shape, generator=generator) * given_B
            weight_BK = weight_BK * (torch.arange(robot.chunk) >= committed_B[:, None])
        choices = self._weighted(samples, instruction_B, keep_B, weight_BK, points_BG, changes)
        wording_B, unknown_BT = self.wordings.draw(instruction_B, generator)
        draws = {"noise_BRKA": noise_BRKA, "time_BR": time_BR, "draw_B2": draw_B2}
        return replace(choices, **draws, wording_B=wording_B, unknown_BT=unknown_BT, committed_B=committed_B)

    def evaluation(
        self, samples: dict[str, Any], instruction_B: Tensor | None = None, held_out_wording: bool = False
    ) -> Batch:
        """Build a batch for evaluation, without random changes.

        Args:
            samples: samples from `TrainingBatches`.
            instruction_B: indices of instructions to use; None: the samples' own.
            held_out_wording: word the instructions as training never does.
        """
        chosen_B = samples["instruction_id"] if instruction_B is None else instruction_B
        weight_BK = (~samples["action_is_pad"]).float()
        keep_B = torch.ones(len(chosen_B), dtype=torch.bool)
        changes = centre(self.preprocessor.crop_area, len(chosen_B), self.views)
        choices = self._weighted(samples, chosen_B, keep_B, weight_BK, self.points(samples), changes)
        return self.build(samples, choices, self.wordings.held_out(chosen_B) if held_out_wording else None)

    def build(self, samples: dict[str, Any], choices: Choices, text: tuple[Tensor, Tensor] | None = None) -> Batch:
        """Build the batch of these samples with these choices, on the policy's device.

        `text` replaces the instructions: ids and mask [B,T].
        """
        device = self.preprocessor.device

        def there(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        if text is None:
            text = self.wordings.text(choices.instruction_B, choices.wording_B, choices.unknown_BT)
        pixels_BVCHW = samples["pixels"].to(device, non_blocking=True)
        inputs = ModelInput(
            change(pixels_BVCHW, self.preprocessor.crop_area, choices.changes),
            text[0].to(device, non_blocking=True),
            text[1].to(device, non_blocking=True),
            self.preprocessor.normalised_state(samples["state"].to(device, non_blocking=True), samples.get("set")),
        )
        keep_B1 = choices.keep_state_B[:, None].to(inputs.state)
        committed = self._committed(samples, choices.committed_B)
        inputs = replace(inputs, past=self._past(samples, choices, keep_B1), committed=committed)
        actions_BKA = samples["actions"].to(device, non_blocking=True)
        actions_BKA = self.preprocessor.normalised_actions(actions_BKA, samples.get("set"))
        positions_BG = None
        if choices.points_BG is not None:
            positions_BG = (choices.points_BG - self.position_mean) / self.position_std
            if self.config.gripper_state:
                relative_BG = self._relative(choices.points_BG, samples["state"])
                relative_BG = (relative_BG - self.relative_mean) / self.relative_std
                positions_BG = torch.cat([positions_BG, relative_BG], dim=-1)
        return Batch(
            replace(inputs, state=inputs.state * keep_B1, draw=there(choices.draw_B2)),
            actions_BKA,
            choices.weight_BK.to(device),
            there(positions_BG),
            there(choices.image_points_BV22),
            there(choices.point_weight_BV2),
            there(choices.noise_BRKA),
            there(choices.time_BR),
            there(self.wordings.group_I[choices.instruction_B]),
        )

    def _committed(self, samples: dict[str, Any], number_B: Tensor | None) -> CommittedInput | None:
        """Return the first actions that were executed as committed ones."""
        if number_B is None:
            return None
        executed_BKA = samples["executed"].to(self.preprocessor.device, non_blocking=True)
        normalised_BKA = self.preprocessor.normalised_actions(executed_BKA, samples.get("set"))
        weight_BK = (torch.arange(executed_BKA.shape[1]) < number_B[:, None]).float().to(normalised_BKA)
        return CommittedInput(normalised_BKA * weight_BK[..., None], weight_BK)

    def _past(self, samples: dict[str, Any], choices: Choices, keep_B1: Tensor) -> Past | None:
        """Return the earlier observations, changed like the present one; None if the samples have none."""
        if "past_pixels" not in samples:
            return None
        device, (batch, decisions) = keep_B1.device, samples["past_pixels"].shape[:2]
        many = torch.arange(batch).repeat_interleave(decisions)
        pixels = samples["past_pixels"].to(device, non_blocking=True).flatten(0, 1)
        pixels = change(pixels, self.preprocessor.crop_area, choices.part(many).changes)
        state_XS = samples["past_state"].to(device, non_blocking=True).flatten(0, 1)
        set_X = samples["set"][many] if "set" in samples else None
        state_XS = self.preprocessor.normalised_state(state_XS, set_X) * keep_B1[many.to(device)]
        shape = (batch, decisions)
        return Past(pixels.unflatten(0, shape), state_XS.unflatten(0, shape), samples["past_age"].to(device))

    def alternatives(self, samples: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw for each sample another task that is possible in its scene and has an instruction in the data.

        Returns:
            Index of the task [B], and False [B] where there is no such task.
        """
        labels = samples["labels"]
        # A task with the same words, as after `lerobot-edit-dataset` has changed them, is no other task.
        others_BT = self.instruction_of_task != samples["instruction_id"][:, None]
        possible_BT = labels["possible"].bool() & (self.instruction_of_task >= 0) & others_BT
        possible_BT = possible_BT.scatter(1, labels["task"].reshape(-1, 1), False)
        allowed_B = possible_BT.any(dim=1)
        possible_BT = possible_BT | ~allowed_B[:, None]
        return choose_alternative(possible_BT, generator), allowed_B

    def points(self, samples: dict[str, Any]) -> Tensor | None:
        """Return the labelled positions [B,6] of target and goal in metres; None if no objective uses them."""
        labels = samples["labels"]
        return torch.cat([labels["target"], labels["goal"]], dim=-1) if self.has_positions else None

    def project(self, samples: dict[str, Any], points_BG: Tensor) -> Tensor | None:
        """Project target and goal into each view, [B,V,2,2] in [0,1]; points behind the camera get -1.

        Returns None without labelled projections.
        """
        if not self.has_projections:
            return None
        projection_BV34 = torch.stack([samples["labels"][name] for name in self.projections], dim=1)
        points_B23 = rearrange(points_BG, "b (two xyz) -> b two xyz", two=2)
        homogenous_B24 = torch.cat([points_B23, torch.ones_like(points_B23[..., :1])], dim=-1)
        uvd_BV23 = torch.einsum("bvij,bpj->bvpi", projection_BV34, homogenous_B24)
        visible_BV21 = uvd_BV23[..., 2:] > 1e-3
        return torch.where(visible_BV21, uvd_BV23[..., :2] / uvd_BV23[..., 2:].clamp(min=1e-3), -1.0)

    def _relative(self, points_BG: Tensor, state_BS: Tensor) -> Tensor:
        return points_BG - state_BS[:, list(self.config.gripper_state)].repeat(1, 2)

    def _weighted(
        self,
        samples: dict[str, Any],
        instruction_B: Tensor,
        keep_B: Tensor,
        weight_BK: Tensor,
        points_BG: Tensor | None,
        changes: Changes,
    ) -> Choices:
        weight_BK = weight_BK / weight_BK.mean().clamp(min=1e-6)
        pictures = {f.name: getattr(changes, f.name) for f in fields(Changes)}
        image_points_BV22 = None if points_BG is None else self.project(samples, points_BG)
        if image_points_BV22 is None:
            return Choices(instruction_B, keep_B, weight_BK, points_BG, **pictures)
        size = self.preprocessor.image_size
        image_points_BV22 = move_points(image_points_BV22, self.preprocessor.crop_area, changes, size)
        inside_BV2 = ((image_points_BV22 >= 0) & (image_points_BV22 < 1)).all(-1).float()
        point_weight_BV2 = inside_BV2 / inside_BV2.mean().clamp(min=1e-6)
        return Choices(instruction_B, keep_B, weight_BK, points_BG, image_points_BV22, point_weight_BV2, **pictures)
