"""The interface of action heads, which convert the states of the action tokens to a chunk of normalised actions.

Shape legend: B batch, K chunk, A action dimension, J action tokens (K or K*A), D width, R random draws per sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.model.heads.committed import CommittedInput

DRAWS = 8
"""R. A head is cheap compared with the rest of the network, so each sample is trained with several draws of noise, as
in CogACT (Li et al. 2024)."""


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of a head.

    Attributes:
        width: D.
        chunk: K.
        action_dim: A.
        tokens_per_step: tokens of one step, 1 or A.
        blocks: residual blocks.
        steps: steps from noise to action, for heads that start from noise.
    """

    width: int
    chunk: int
    action_dim: int
    tokens_per_step: int
    blocks: int = 2
    steps: int = 10

    @property
    def joined(self) -> int:
        """Width of all tokens of one step together."""
        return self.width * self.tokens_per_step


class ActionHead(nn.Module, ABC):
    """Decodes states [B,J,D] to normalised actions [B,K,A], and computes their training loss.

    Actions depend on the states only: the same observation gives the same actions in any batch.
    """

    error_name: ClassVar[str]
    """Name of the loss; its metric is `action_{error_name}`."""
    guided: ClassVar[bool] = False
    """True for heads that can be pulled towards committed actions while they decode, without having been trained so."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.sizes = sizes

    @abstractmethod
    def decode(self, states_BJD: Tensor) -> Tensor:
        """Decode the normalised actions [B,K,A]."""

    @abstractmethod
    def error(
        self, states_BJD: Tensor, expert_BKA: Tensor, noise_BRKA: Tensor | None = None, time_BR: Tensor | None = None
    ) -> Tensor:
        """Return the training loss of each action [B,K].

        Before training it is 0.5 to 1.5 for every head, so that the weights of other losses suit all heads.

        Args:
            states_BJD: states of the action tokens.
            expert_BKA: normalised actions to imitate.
            noise_BRKA: draws from the standard normal distribution, for heads that start from noise.
            time_BR: draws from the uniform distribution on [0,1), for heads that start from noise.
        """

    def forward(self, states_BJD: Tensor, committed: CommittedInput | None = None) -> Tensor:
        """Decode; heads that are not `guided` ignore committed actions."""
        return self.decode(states_BJD)

    def join(self, states_BJD: Tensor) -> Tensor:
        """Concatenate the tokens of each step, [B,K,D or A*D]."""
        return rearrange(states_BJD, "b (k a) d -> b k (a d)", k=self.sizes.chunk)


def decoded(head: ActionHead, states_BJD: Tensor, committed: CommittedInput | None, trained: bool) -> Tensor:
    """Decode actions [B,K,A] with the committed ones in their place.

    Args:
        head: the action head.
        states_BJD: states of the action tokens.
        committed: committed actions, None: none.
        trained: the states know the certain ones (`CommittedTokens`). The chunk then continues them by itself, and its
            other actions are free; else a head that can be guided is pulled towards the old plan.
    """
    if committed is None:
        return head(states_BJD)
    return committed.over(head(states_BJD, committed.certain() if trained else committed))
