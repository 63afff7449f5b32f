"""Committed actions: those that the robot will execute until the new chunk is there, as an input of the network.

Each one is added, with a learned matrix that begins at zero, to the action tokens of its step. So a policy that is
given none computes what it did without this input.

Shape legend: B batch, K chunk, A action dimension, J action tokens, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class CommittedInput:
    """Committed actions of each sample, in fixed shapes.

    Attributes:
        actions: normalised, float [B,K,A]; 0 where there is none. Action 0 is that of the observation's step.
        weight: weight of each, float32 [B,K]: 1 for actions that will certainly be executed, above 0 and below 1 for
            those that the new chunk should stay close to (`policy.chunk_queue.soft_mask`), 0 for none.
    """

    actions: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> CommittedInput:
        return CommittedInput(self.actions.to(device), self.weight.to(device))

    def rows(self, index_b: Tensor) -> CommittedInput:
        """Return the samples with these indices."""
        return CommittedInput(self.actions[index_b], self.weight[index_b])

    def certain(self) -> CommittedInput:
        """Return the same without the actions that the chunk should only stay close to."""
        return CommittedInput(self.actions, (self.weight >= 1).to(self.weight.dtype))

    @property
    def sure(self) -> Tensor:
        """True for actions that will certainly be executed, bool [B,K,1]."""
        return self.weight[..., None] >= 1

    def over(self, actions_BKA: Tensor) -> Tensor:
        """Return the predicted actions [B,K,A] with the certain ones in their place."""
        return torch.where(self.sure, self.actions.to(actions_BKA.dtype), actions_BKA)


def none_committed(batch: int, chunk: int, action_dim: int, device: torch.device | str) -> CommittedInput:
    """Return the input of samples without committed actions."""
    actions_BKA = torch.zeros(batch, chunk, action_dim, device=device)
    return CommittedInput(actions_BKA, actions_BKA[..., 0])


class CommittedTokens(nn.Module):
    """Add committed actions to the action tokens: `[action, 1]` times a matrix for certain ones, 0 for all others.

    Args:
        action_dim: A.
        tokens_per_step: action tokens of a step, 1 or A.
        width: D.
    """

    def __init__(self, action_dim: int, tokens_per_step: int, width: int) -> None:
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.matrix = nn.Parameter(torch.zeros(action_dim + 1, tokens_per_step * width))

    def forward(self, committed: CommittedInput, tail_BRD: Tensor) -> Tensor:
        """Return the sequence's tail `[words, action tokens, stop]` with committed actions in it, [B,R,D]."""
        certain_BK1 = committed.sure.to(self.matrix.dtype)
        given_BKX = torch.cat((committed.actions.to(self.matrix.dtype), torch.ones_like(certain_BK1)), dim=-1)
        added_BKX = (given_BKX * certain_BK1) @ self.matrix
        added_BJD = rearrange(added_BKX, "b k (t d) -> b (k t) d", t=self.tokens_per_step).to(tail_BRD.dtype)
        words = tail_BRD.shape[1] - added_BJD.shape[1] - 1
        return tail_BRD + nn.functional.pad(added_BJD, (0, 0, words, 1))
