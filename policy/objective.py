"""What training minimises: the head's error on the action chunk (masked L1 for the paper's head), and where the
simulator gives labels, grounding.

Behaviour cloning alone learns the arm's habits long before it looks at the instruction. Three things mend that:

- grounding: a head that sees the vision tokens only predicts where the object to manipulate and its goal are;
- reading: a linear layer has to find the same positions in the states of the action tokens. The vision tokens know
  them after some hundred steps, but the decoder's attention finds them there thousands of steps later, as long as only
  the few actions of the approach ask for it;
- pointing: half of the aggregation tokens are taught to attend to the patches where the object is, the others to those
  of the goal (cross-entropy on half of their heads, after MolmoPoint's pointing by attention). Without it, attention
  stays spread over the whole image for thousands of steps and nothing downstream has a position to work with;
- counterfactual instructions: a share of the samples is given another instruction that is possible in the same
  scene. There is no action to imitate for it, but the simulator knows where its target is, so that the same picture
  has to answer several instructions;
- state dropout: the proprioceptive state is hidden from a share of the samples, so that "the target is where the arm
  is heading" is no way out.

Shape legend: B batch, V views, X = B*V, K chunk, A action, R draws of noise, N vision tokens, M aggregation tokens per
view, h heads, P patches per view, D width, T tasks of the suite, G = 6 (target xyz, goal xyz).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.heads.interface import ActionHead
from cogvla.policy.model import CogVLA, ModelInput, ModelOutput

GROUNDING_DIM = 6
"""Target xyz, goal xyz; twice that with the positions relative to the gripper."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Loss weights and the shares of samples that are made harder.

    Attributes:
        grounding: weight of the position loss; 0 switches the head off.
        reading: weight of the same loss on the states of the action tokens; 0 switches it off.
        pointing: weight of the attention loss; 0 switches it off. It needs camera projections among the labels.
        counterfactual: share of samples in [0,1) with another possible instruction (needs labels).
        gripper_state: which entries of the state are the gripper's position, in the frame of the labels. The head then
            also predicts where they are from the gripper, which is what the next motion depends on; () is off.
        state_dropout: share of samples in [0,1] whose state is hidden.
        phase_weights: weight of the action loss by the expert's phase; empty = 1 everywhere.
    """

    grounding: float = 1.0
    reading: float = 0.5
    pointing: float = 0.1
    counterfactual: float = 0.25
    gripper_state: tuple[int, ...] = ()
    state_dropout: float = 0.5
    phase_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "phase_weights", tuple(self.phase_weights))
        object.__setattr__(self, "gripper_state", tuple(self.gripper_state))
        if len(self.gripper_state) not in (0, 3):
            raise ValueError(f"objective.gripper_state must name x, y and z or nothing, got {self.gripper_state}")
        if (
            min(self.grounding, self.pointing) < 0
            or not 0 <= self.counterfactual < 1
            or not 0 <= self.state_dropout <= 1
        ):
            raise ValueError(f"weights must be positive and shares between 0 and 1, got {self}")


@dataclass(frozen=True)
class Batch:
    """One training batch in the policy's terms.

    Attributes:
        inputs: what the policy sees.
        actions_BKA: normalised expert actions.
        weight_BK: weight of each action, 1 on average over the step; 0 where there is none to imitate.
        positions_BG: target and goal position, normalised (with `gripper_state` also from the gripper, G = 12), or None
            without labels.
        image_points_BV22: where target and goal are in each view, as (right, down) in [0,1]; outside of it they are not
            in the picture. None without projections.
        point_weight_BV2: weight of each of these points, 1 on average over the step; 0 where it is not in the picture.
        noise_BRKA, time_BR: what is random in the head's error, see `ActionHead.error`.
    """

    inputs: ModelInput
    actions_BKA: Tensor
    weight_BK: Tensor
    positions_BG: Tensor | None
    image_points_BV22: Tensor | None = None
    point_weight_BV2: Tensor | None = None
    noise_BRKA: Tensor | None = None
    time_BR: Tensor | None = None


class GroundingHead(nn.Module):
    """Vision tokens [B,N,D] to the normalised positions [B,G] of target and goal. Thrown away after training."""

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
    """The policy and its training heads as one module, so that DDP and FSDP see one forward."""

    def __init__(self, model: CogVLA, config: ObjectiveConfig, vision_tokens: int, width: int) -> None:
        super().__init__()
        tokens, camera = model.config.vision.aggregation_tokens, model.embodiment.cameras[0]
        if config.pointing and model.config.routing.efa and (tokens % 2 or camera.height != camera.width):
            raise ValueError(
                "objective.pointing needs square images and an even policy.vision.aggregation_tokens, "
                f"got {camera.height}x{camera.width} and {tokens}; or set it to 0"
            )
        if config.grounding and model.config.routing.router.train_budgets:
            raise ValueError(
                "objective.grounding reads a fixed number of vision tokens, routing.router.train_budgets vary it: "
                "set objective.grounding=0 or train_budgets=[]"
            )
        self.model, self.config = model, config
        outputs = 2 * GROUNDING_DIM if config.gripper_state else GROUNDING_DIM
        self.grounding = GroundingHead(vision_tokens, width, outputs) if config.grounding else None
        self.reading = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs)) if config.reading else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses as scalars: `loss` (to minimise), `action_l1` (or what the head measures), and with labels those of
        the parts that need them: `grounding_l1`, `reading_l1`, `pointing_ce`; and `router_...` of token routers.
        """
        points = self.config.pointing and batch.image_points_BV22 is not None and self.model.config.routing.efa
        head: ActionHead = self.model.head
        output: ModelOutput = self.model(batch.inputs, watch=bool(points), decode=False)
        error_BK = head.error(output.states, batch.actions_BKA, batch.noise_BRKA, batch.time_BR)
        action = (error_BK * batch.weight_BK).mean()
        losses = {"loss": action, f"action_{head.error_name}": action.detach()}
        if self.grounding is not None and batch.positions_BG is not None:
            grounding = (self.grounding(output.vision) - batch.positions_BG).abs().mean()
            losses["loss"] = losses["loss"] + self.config.grounding * grounding
            losses["grounding_l1"] = grounding.detach()
        if self.reading is not None and batch.positions_BG is not None:
            reading = (self.reading(output.states) - batch.positions_BG[:, None]).abs().mean()
            losses["loss"] = losses["loss"] + self.config.reading * reading
            losses["reading_l1"] = reading.detach()
        for name, value in output.losses.items():
            losses["loss"] = losses["loss"] + value
            losses[f"router_{name}"] = value.detach()
        if output.gaze is not None:
            assert batch.image_points_BV22 is not None
            assert batch.point_weight_BV2 is not None
            points_BV22, weight_BV2 = batch.image_points_BV22, batch.point_weight_BV2
            pointing = torch.stack([pointing_loss(gaze, points_BV22, weight_BV2) for gaze in output.gaze]).mean()
            losses["loss"] = losses["loss"] + self.config.pointing * pointing
            losses["pointing_ce"] = pointing.detach()
        return losses


def pointing_loss(log_attention_XhMP: Tensor, points_BV22: Tensor, weight_BV2: Tensor) -> Tensor:
    """Cross-entropy between attention and the four patches around a point, by their bilinear weights.

    The first half of the tokens points at the target, the second at the goal, each with the first half of the heads.

    Args:
        log_attention_XhMP: see `VisionTower.forward`; M must be even.
        points_BV22, weight_BV2: see `Batch`.
    """
    heads, tokens, patches = log_attention_XhMP.shape[1:]
    side = round(patches**0.5)
    guided_X2P = rearrange(
        log_attention_XhMP[:, : max(1, heads // 2)], "x h (two m) p -> x two (h m) p", two=2, m=tokens // 2
    ).mean(2)
    points_X22 = rearrange(points_BV22, "b v two xy -> (b v) two xy")
    grid_X22 = (points_X22 * side - 0.5).clamp(0, side - 1)
    centres_s = torch.arange(side, device=grid_X22.device)
    weight_X2s2 = (1 - (grid_X22[:, :, None] - centres_s[:, None]).abs()).clamp(min=0)
    target_X2P = rearrange(
        weight_X2s2[..., 1][..., :, None] * weight_X2s2[..., 0][..., None, :], "x two row column -> x two (row column)"
    )
    cross_entropy_X2 = -(target_X2P * guided_X2P).sum(-1)
    return (cross_entropy_X2 * rearrange(weight_BV2, "b v two -> (b v) two")).mean()


def masked_l1(predicted_BKA: Tensor, expert_BKA: Tensor, weight_BK: Tensor) -> Tensor:
    """Mean absolute error over the actions with weight; 0 when there is none."""
    error_BK = (predicted_BKA.float() - expert_BKA).abs().mean(dim=-1)
    return (error_BK * weight_BK).sum() / weight_BK.sum().clamp(min=1e-6)


def choose_alternative(possible_BT: Tensor, generator: torch.Generator) -> Tensor:
    """For each sample one task index [B] drawn from those possible in its scene (bool [B,T])."""
    draw = torch.multinomial(possible_BT.float(), 1, generator=generator)
    return rearrange(draw, "b 1 -> b")
