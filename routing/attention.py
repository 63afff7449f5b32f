"""Attention masks over the token layout (CAtten).

    coupled        causal over vision, state and text; the action block (actions and stop) sees everything and itself
                   in both directions, so that a chunk is decoded in one pass
    causal         plain causal, the ablation
    bidirectional  everything sees everything, as in OpenVLA-OFT

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.layout import TokenLayout

ATTENTION = ("coupled", "causal", "bidirectional")


def attention_mask(layout: TokenLayout, valid_BS: Tensor, kind: str = "coupled") -> Tensor:
    """Mask bool [B,1,S,S]: True where the row (query) may attend to the column (key). Padding is never attended.

    Vision tokens that pruning leaves keep their order and are never padding, so the mask of a pruned sequence is that
    of `layout.with_vision(count)`, which is the full mask without its first rows and columns: nothing is gathered.
    """
    if kind not in ATTENTION:
        raise ValueError(f"unknown attention {kind!r}; one of {', '.join(ATTENTION)}")
    size, device = layout.length, valid_BS.device
    assert valid_BS.shape[-1] == size, "one validity flag per token"
    allowed_SS = torch.ones(size, size, dtype=torch.bool, device=device)
    if kind != "bidirectional":
        allowed_SS = allowed_SS.tril()
    if kind == "coupled":
        allowed_SS[layout.answer, layout.answer] = True
    return allowed_SS & valid_BS[:, None, None, :]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to attention logits: 0 or -inf. Made once, where a boolean is converted per call."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
