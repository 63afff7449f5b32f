"""The training objective: the error of the action head, plus auxiliary losses.

Behaviour cloning alone learns typical motions of the arm long before it uses the instruction. These additions help; the
first four need labels from the simulator:

- grounding: a head predicts the positions of the target object and of its goal from the vision tokens;
- reading: a linear layer predicts the same positions from the states of the action tokens. Vision tokens hold them
  after some hundred steps, but without this loss the decoder's attention finds them thousands of steps later, because
  only the few actions of the approach need them;
- pointing: half of the aggregation tokens learn to attend to the patches of the target, the others to those of the goal
  (`policy/training/auxiliary/pointing.py`). Without it, attention stays spread over the whole image for thousands of
  steps, and later layers get no positions;
- counterfactual instructions: a share of the samples gets another instruction that is possible in the same scene. There
  are no actions to imitate for it, but the position of its target is known, so that the same picture has different
  answers for different instructions;
- state dropout: the robot's state is hidden in a share of the samples, so that the policy cannot infer the target from
  the motion of the arm.

Further losses, which are off by default, are in `policy/training/auxiliary`, one per file.

Shape legend: B batch, V views, X = B*V, H, W grid of a view's tokens, K chunk, A action, R draws of noise, N vision
tokens, D width, T tasks of the suite, G = 6 (target xyz, goal xyz).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.model.cogvla import CogVLA, ModelInput, ModelOutput
from cogvla.policy.model.heads.interface import ActionHead
from cogvla.policy.training.auxiliary.concepts import Concepts
from cogvla.policy.training.auxiliary.contrast import contrast_loss
from cogvla.policy.training.auxiliary.distillation import Distillation, attention_match
from cogvla.policy.training.auxiliary.diversity import AttentionDiversity, check_readable
from cogvla.policy.training.auxiliary.masking import TokenMask, hide
from cogvla.policy.training.auxiliary.matching import Matching
from cogvla.policy.training.auxiliary.pointing import Pointer, pointing_loss

GROUNDING_DIM = 6
"""Target xyz, goal xyz; twice that with the positions relative to the gripper."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses, and shares of samples with hidden or changed inputs.

    Attributes:
        grounding: weight of the position loss; 0: off.
        reading: weight of the position loss on the states of the action tokens; 0: off.
        pointing: weight of the attention loss of aggregation tokens (MolmoPoint); 0: off.
            It needs camera projections among the labels.
        counterfactual: share of samples in [0,1) that get another possible instruction (needs labels).
        gripper_state: indices of the state entries with the gripper's position, in the frame of the labels; (): off.
            The head then also predicts positions relative to the gripper, on which the next motion depends.
        state_dropout: share of samples in [0,1] whose state is hidden.
        phase_weights: weight of the action loss for each phase of the expert; (): 1 for all.
        pointer: weight of the loss of two pointing tokens (MolmoPoint), for routing=patches; 0: off.
            `pointing` has no effect there.
        contrast: weight of the contrastive loss between vision tokens and words (CG-VLM; start with 0.1).
        matching: weight of the loss that matches pictures with instructions (ALBEF; 1.0 in its source).
        concepts: weight of the contrastive loss between their sparse codes (FDT; 1.0 in its source).
        concept_pool: number of entries of the codebook of these codes.
        diversity: weight of the diversity loss on the towers' attention (ADL; 1.0 in its source).
        masking: share of vision tokens in [0,1] that a learned pool replaces in training (Croc; 0.75 in its source).
        mask_pool: number of entries of that pool.
        mask_matching: entries for masked tokens: the `nearest` of each, or different ones (`hungarian`).
        vision_dropout: share of samples in [0,1] whose vision tokens are hidden.
        distillation: weight of the distillation loss from a teacher that keeps all tokens (Align-TI).
        teacher: checkpoint folder of the teacher; the YAML sets the run's `base`.
        prior: strength in [0,1] of weighting actions by the error of a policy without vision (PRIOR).
        blind: checkpoint folder of the policy without vision, which objective=blind trains.

    `policy/training/auxiliary` explains `pointer` and the fields below it, with their sources.
    """

    grounding: float = 0.5
    reading: float = 0.5
    pointing: float = 0.1
    counterfactual: float = 0.2
    gripper_state: tuple[int, ...] = (0, 1, 2)
    state_dropout: float = 0.25
    phase_weights: tuple[float, ...] = (2, 1, 1, 1.5, 1, 1, 1, 1, 1)
    pointer: float = 0.0
    contrast: float = 0.0
    matching: float = 0.0
    concepts: float = 0.0
    concept_pool: int = 256
    diversity: float = 0.0
    masking: float = 0.0
    mask_pool: int = 64
    mask_matching: str = "nearest"
    vision_dropout: float = 0.0
    distillation: float = 0.0
    teacher: str | None = None
    prior: float = 0.0
    blind: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "phase_weights", tuple(self.phase_weights))
        object.__setattr__(self, "gripper_state", tuple(self.gripper_state))
        if len(self.gripper_state) not in (0, 3):
            raise ValueError(f"objective.gripper_state must name x, y and z or nothing, got {self.gripper_state}")
        weights = (
            *(self.grounding, self.reading, self.pointing, self.pointer),
            *(self.contrast, self.matching, self.concepts, self.diversity, self.distillation),
            *self.phase_weights,
        )
        shares = (self.state_dropout, self.masking, self.vision_dropout, self.prior)
        if min(weights) < 0 or not 0 <= self.counterfactual < 1 or min(shares) < 0 or max(shares) > 1:
            raise ValueError(f"weights must be positive and shares between 0 and 1, got {self}")
        if self.mask_pool < 1:
            raise ValueError(f"objective.mask_pool must be at least 1 (a single mask token), got {self.mask_pool}")
        if self.concept_pool < 2:
            raise ValueError(f"objective.concept_pool must be at least 2 (entries to choose), got {self.concept_pool}")
        if self.distillation and self.teacher is None:
            raise ValueError(
                "objective.distillation needs a teacher: objective.teacher=FOLDER, a checkpoint of this policy with "
                "all its vision tokens (base=FOLDER is one too), or set it to 0"
            )
        if self.prior and self.blind is None:
            raise ValueError(
                "objective.prior needs a policy that does not see: objective.blind=FOLDER, a checkpoint of "
                "`train_policy objective=blind evaluation=null`, or set it to 0"
            )


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        inputs: input of the policy.
        actions_BKA: normalised expert actions.
        weight_BK: weight of each action, with mean 1 over the step; 0 where there is no action to imitate.
        positions_BG: normalised target and goal position, with `gripper_state` also relative to the gripper (G = 12);
            None without labels.
        image_points_BV22: target and goal in each view, (right, down) in [0,1]; other values are outside of the
            picture. None without projections.
        point_weight_BV2: weight of each of these points, with mean 1 over the step; 0 outside of the picture.
        noise_BRKA: noise for the head's error, see `ActionHead.error`.
        time_BR: times for the head's error, see `ActionHead.error`.
        instruction_B: number of the instruction, the same for all of its wordings.
    """

    inputs: ModelInput
    actions_BKA: Tensor
    weight_BK: Tensor
    positions_BG: Tensor | None
    image_points_BV22: Tensor | None = None
    point_weight_BV2: Tensor | None = None
    noise_BRKA: Tensor | None = None
    time_BR: Tensor | None = None
    instruction_B: Tensor | None = None


class GroundingHead(nn.Module):
    """Predict the normalised positions [B,G] of target and goal from vision tokens [B,N,D]; used in training only."""

    def __init__(self, tokens: int, width: int, outputs: int, hidden: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 32),
            nn.Flatten(),
            nn.GELU(),
            nn.Linear(32 * tokens, hidden),
            nn.GELU(),
            nn.Linear(hidden, outputs),
        )

    def forward(self, vision_BND: Tensor) -> Tensor:
        return self.net(vision_BND)


class Objective(nn.Module):
    """The policy and its training heads as one module, so that DDP and FSDP wrap one forward pass.

    Args:
        model: network of the policy.
        config: loss weights and shares.
        teacher: teacher for `config.distillation`, see `Distillation`.

    Raises:
        ValueError: the policy does not support one of the losses.
    """

    def __init__(self, model: CogVLA, config: ObjectiveConfig, teacher: CogVLA | None = None) -> None:
        super().__init__()
        width, self.vision_tokens = model.width, model.vision_tokens
        tokens, camera = model.config.vision.aggregation_tokens, model.embodiment.cameras[0]
        if config.pointing and model.config.routing.efa and (tokens % 2 or camera.height != camera.width):
            raise ValueError(
                "objective.pointing needs square images and an even policy.vision.aggregation_tokens, "
                f"got {camera.height}x{camera.width} and {tokens}; or set it to 0"
            )
        self.model, self.config = model, config
        varies = bool(model.config.routing.router.train_budgets)
        if config.grounding and varies and self._grid(self.vision_tokens) is None:
            raise ValueError(
                "objective.grounding needs a fixed number of vision tokens, or grids of them; "
                "routing.router.train_budgets varies the number, and this router does not leave grids: "
                "set objective.grounding=0 or train_budgets=[], or use a router that pools, such as flex_count"
            )
        if config.pointer and model.config.routing.efa:
            raise ValueError(
                "objective.pointer points at patches, but with routing.efa=true vision tokens are not patches: use "
                "objective.pointing, or routing=patches"
            )
        if config.diversity:
            check_readable(model.vision)
        outputs = 2 * GROUNDING_DIM if config.gripper_state else GROUNDING_DIM
        self.grounding = GroundingHead(self.vision_tokens, width, outputs) if config.grounding else None
        self.reading = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs)) if config.reading else None
        self.pointer = Pointer(width, model.vision.grid) if config.pointer else None
        self.matching = Matching(width) if config.matching else None
        self.concepts = Concepts(width, config.concept_pool) if config.concepts else None
        self.mask = TokenMask(config.masking, config.mask_pool, width, config.mask_matching) if config.masking else None
        self.distillation: Distillation | None = None
        if config.distillation:
            assert teacher is not None, "distillation needs a teacher"
            self.distillation = Distillation(teacher, model)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses, as scalars by name.

        Returns:
            `loss`, which is minimised, and its parts without their weights: `action_ERROR`, where ERROR is the head's
            `error_name`; `grounding_l1`, `reading_l1` and `pointing_ce` if the batch has labels; `router_NAME` for
            losses of token routers; and `pointer_ce`, `contrast_nce`, `matching_ce`, `concepts_nce`, `diversity_cos`,
            `teacher_kl` and `teacher_ERROR` if they are turned on.
        """
        config = self.config
        watch = config.pointing and batch.image_points_BV22 is not None and self.model.config.routing.efa
        head: ActionHead = self.model.head
        observer = AttentionDiversity() if config.diversity else None
        output: ModelOutput = self.model(
            batch.inputs,
            debug=self.distillation is not None,
            watch=bool(watch),
            decode=False,
            change=partial(self._change, batch.inputs.draw) if config.masking or config.vision_dropout else None,
            observer=observer,
        )
        error_BK = head.error(output.states, batch.actions_BKA, batch.noise_BRKA, batch.time_BR)
        action = (error_BK * batch.weight_BK).mean()
        losses = {"loss": action, f"action_{head.error_name}": action.detach()}

        def add(name: str, value: Tensor, weight: float = 1.0) -> None:
            losses["loss"] = losses["loss"] + weight * value
            losses[name] = value.detach()

        if self.grounding is not None and batch.positions_BG is not None:
            add(
                "grounding_l1",
                (self.grounding(self._same_grid(output.vision)) - batch.positions_BG).abs().mean(),
                config.grounding,
            )
        if self.reading is not None and batch.positions_BG is not None:
            add("reading_l1", (self.reading(output.states) - batch.positions_BG[:, None]).abs().mean(), config.reading)
        for name, value in output.losses.items():
            add(f"router_{name}", value)
        if output.gaze is not None:
            assert batch.image_points_BV22 is not None
            assert batch.point_weight_BV2 is not None
            points_BV22, weight_BV2 = batch.image_points_BV22, batch.point_weight_BV2
            pointing = torch.stack([pointing_loss(gaze, points_BV22, weight_BV2) for gaze in output.gaze]).mean()
            add("pointing_ce", pointing, config.pointing)
        if self.pointer is not None and batch.image_points_BV22 is not None:
            assert batch.point_weight_BV2 is not None
            points = batch.image_points_BV22, batch.point_weight_BV2
            add("pointer_ce", self.pointer(output.states, output.vision, output.kept, *points), config.pointer)
        if config.contrast or config.matching or config.concepts:
            assert batch.instruction_B is not None
            words_BTD = self.model.embed_text(batch.inputs.text_ids)
            texts = output.vision, words_BTD, batch.inputs.text_mask, batch.instruction_B
            if config.contrast:
                add("contrast_nce", contrast_loss(*texts), config.contrast)
            if self.matching is not None:
                add("matching_ce", self.matching(*texts, batch.inputs.draw), config.matching)
            if self.concepts is not None:
                add("concepts_nce", self.concepts(*texts), config.concepts)
        if observer is not None:
            add("diversity_cos", observer.loss(), config.diversity)
        if self.distillation is not None:
            assert output.debug is not None
            actions_BKA, inside = self.distillation(batch.inputs)
            error_BK = head.error(output.states, actions_BKA, batch.noise_BRKA, batch.time_BR)
            add("teacher_kl", attention_match(output.debug, inside), config.distillation)
            add(f"teacher_{head.error_name}", error_BK.mean(), config.distillation)
        return losses

    def _grid(self, tokens: int) -> tuple[int, int] | None:
        """Return rows and columns of the tokens of a view if all views have this number; None: they are no grid."""
        return None if self.model.router is None else self.model.router.shape(tokens)

    def _same_grid(self, vision_BND: Tensor) -> Tensor:
        """Return vision tokens, of whose number a step has drawn another, pooled or repeated to the usual number."""
        if vision_BND.shape[1] == self.vision_tokens:
            return vision_BND
        here, usual = self._grid(vision_BND.shape[1]), self._grid(self.vision_tokens)
        assert here is not None
        assert usual is not None
        views = len(self.model.embodiment.cameras)
        x_XDHW = rearrange(vision_BND, "b (v h w) d -> (b v) d h w", v=views, h=here[0])
        return rearrange(F.adaptive_avg_pool2d(x_XDHW, usual), "(b v) d h w -> b (v h w) d", v=views)

    def _change(self, draw_B2: Tensor | None, vision_BND: Tensor) -> Tensor:
        """Mask and hide vision tokens in training; without seeds, as in evaluation, return them unchanged."""
        if draw_B2 is None:
            return vision_BND
        if self.mask is not None:
            vision_BND = self.mask(vision_BND, draw_B2[:, 0])
        share = self.config.vision_dropout
        return hide(vision_BND, share, draw_B2[:, 0]) if share else vision_BND


def masked_l1(predicted_BKA: Tensor, expert_BKA: Tensor, weight_BK: Tensor) -> Tensor:
    """Return the weighted mean absolute error; 0 if all weights are 0."""
    error_BK = (predicted_BKA.float() - expert_BKA).abs().mean(dim=-1)
    return (error_BK * weight_BK).sum() / weight_BK.sum().clamp(min=1e-6)


def choose_alternative(possible_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for each sample the index [B] of one of the possible tasks (bool [B,T])."""
    draw = torch.multinomial(possible_BT.float(), 1, generator=generator)
    return rearrange(draw, "b 1 -> b")
