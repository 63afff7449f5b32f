"""What training minimises: masked L1 on the action chunk, and where the simulator gives labels, grounding.

Behaviour cloning alone learns the arm's habits long before it looks at the instruction. Three things mend that:

- grounding: a head that sees the vision tokens only predicts where the object to manipulate and its goal are;
- counterfactual instructions: a share of the samples is given another instruction that is possible in the same
  scene. There is no action to imitate for it, but the simulator knows where its target is, so that the same picture
  has to answer several instructions;
- state dropout: the proprioceptive state is hidden from a share of the samples, so that "the target is where the arm
  is heading" is no way out.

Shape legend: B batch, K chunk, A action, N vision tokens, D width, T tasks of the suite, G = 6 (target xyz, goal xyz).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.model import CogVLA, ModelInput, ModelOutput

GROUNDING_DIM = 6


@dataclass(frozen=True)
class ObjectiveConfig:
    """Loss weights and the shares of samples that are made harder.

    Attributes:
        grounding: weight of the position loss; 0 switches the head off.
        counterfactual: share of samples in [0,1) with another possible instruction (needs labels).
        state_dropout: share of samples in [0,1] whose state is hidden.
        phase_weights: weight of the action loss by the expert's phase; empty = 1 everywhere.
    """

    grounding: float = 1.0
    counterfactual: float = 0.25
    state_dropout: float = 0.5
    phase_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "phase_weights", tuple(self.phase_weights))
        if self.grounding < 0 or not 0 <= self.counterfactual < 1 or not 0 <= self.state_dropout <= 1:
            raise ValueError(f"weights must be positive and shares between 0 and 1, got {self}")


@dataclass(frozen=True)
class Batch:
    """One training batch in the policy's terms.

    Attributes:
        inputs: what the policy sees.
        actions_BKA: normalised expert actions.
        weight_BK: weight of each action; 0 where there is none to imitate.
        positions_BG: target and goal position, normalised, or None without labels.
    """

    inputs: ModelInput
    actions_BKA: Tensor
    weight_BK: Tensor
    positions_BG: Tensor | None


class GroundingHead(nn.Module):
    """Vision tokens [B,N,D] to the normalised positions [B,6] of target and goal. Thrown away after training."""

    def __init__(self, tokens: int, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 32),
            nn.Flatten(),
            nn.GELU(),
            nn.Linear(32 * tokens, hidden),
            nn.GELU(),
            nn.Linear(hidden, GROUNDING_DIM),
        )

    def forward(self, vision_BND: Tensor) -> Tensor:
        return self.net(vision_BND)


class Objective(nn.Module):
    """The policy and its training heads as one module, so that DDP and FSDP see one forward."""

    def __init__(self, model: CogVLA, config: ObjectiveConfig, vision_tokens: int, width: int) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.grounding = GroundingHead(vision_tokens, width) if config.grounding else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses as scalars: `loss` (to minimise), `action_l1`, and `grounding_l1` when there are labels."""
        output: ModelOutput = self.model(batch.inputs)
        action_l1 = masked_l1(output.actions, batch.actions_BKA, batch.weight_BK)
        losses = {"loss": action_l1, "action_l1": action_l1.detach()}
        if self.grounding is not None and batch.positions_BG is not None:
            grounding = (self.grounding(output.vision) - batch.positions_BG).abs().mean()
            losses["loss"] = action_l1 + self.config.grounding * grounding
            losses["grounding_l1"] = grounding.detach()
        return losses


def masked_l1(predicted_BKA: Tensor, expert_BKA: Tensor, weight_BK: Tensor) -> Tensor:
    """Mean absolute error over the actions with weight; 0 when there is none."""
    error_BK = (predicted_BKA.float() - expert_BKA).abs().mean(dim=-1)
    return (error_BK * weight_BK).sum() / weight_BK.sum().clamp(min=1e-6)


def choose_alternative(possible_BT: Tensor, generator: torch.Generator) -> Tensor:
    """For each sample one task index [B] drawn from those possible in its scene (bool [B,T])."""
    draw = torch.multinomial(possible_BT.float(), 1, generator=generator)
    return rearrange(draw, "b 1 -> b")
