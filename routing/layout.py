"""The segments of the language model's sequence. All slices come from here.

    [ bos | vision x N | state | text x T (padded) | action x J | stop ]

Shape legend: B batch, N vision tokens, T text tokens, J action tokens, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Sizes of the segments; the slices follow from them.

    Attributes:
        vision: N, vision tokens of all views.
        text: T, text tokens including padding.
        action: J, action placeholders.
    """

    vision: int
    text: int
    action: int

    def __post_init__(self) -> None:
        if self.vision < 0 or self.text < 0 or self.action < 1:
            raise ValueError(f"a sequence needs action tokens and no negative lengths, got {self!r}")

    @property
    def length(self) -> int:
        """S, the number of tokens in the sequence."""
        return self.stop.stop

    @property
    def bos(self) -> slice:
        return slice(0, 1)

    @property
    def visual(self) -> slice:
        return slice(1, 1 + self.vision)

    @property
    def state(self) -> slice:
        return slice(self.visual.stop, self.visual.stop + 1)

    @property
    def words(self) -> slice:
        return slice(self.state.stop, self.state.stop + self.text)

    @property
    def actions(self) -> slice:
        return slice(self.words.stop, self.words.stop + self.action)

    @property
    def stop(self) -> slice:
        return slice(self.actions.stop, self.actions.stop + 1)

    @property
    def rest(self) -> slice:
        """All tokens after the vision tokens."""
        return slice(self.visual.stop, self.length)

    @property
    def context(self) -> slice:
        """State and text; the pruning router averages them."""
        return slice(self.state.start, self.words.stop)

    @property
    def answer(self) -> slice:
        """Actions and stop, the block that attends in both directions."""
        return slice(self.actions.start, self.length)

    def with_vision(self, count: int) -> TokenLayout:
        """Return the layout of the same sequence with `count` vision tokens."""
        return replace(self, vision=count)

    def valid(self, text_mask_BT: Tensor) -> Tensor:
        """Return a mask bool [B,S]: True for real tokens, False for text padding.

        Raises:
            ValueError: the text mask has another length than the layout's text.
        """
        if text_mask_BT.shape[-1] != self.text:
            raise ValueError(f"text mask has {text_mask_BT.shape[-1]} tokens, the layout {self.text}")
        valid_BS = text_mask_BT.new_ones((len(text_mask_BT), self.length), dtype=torch.bool)
        valid_BS[:, self.words] = text_mask_BT
        return valid_BS

    def positions(self, valid_BS: Tensor) -> Tensor:
        """Return position ids int64 [B,S] that skip padding, so that padding does not change a sample's positions."""
        return (valid_BS.long().cumsum(1) - 1).clamp_min(0)
