"""Attention masks of the language model (CAtten, stage 3).

    coupled        causal over vision, state and text; the action block (actions and stop) attends to everything before
                   it, and to itself in both directions, so that one pass decodes a chunk
    causal         causal everywhere (ablation)
    bidirectional  every token attends to every token, as in OpenVLA-OFT

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvla.routing.layout import TokenLayout

ATTENTION = ("coupled", "causal", "bidirectional")


def attention_mask(layout: TokenLayout, valid_BS: Tensor, kind: str = "coupled") -> Tensor:
    """Build the mask bool [B,1,S,S]: True where the query (row) may attend to the key (column).

    Nothing attends to padding. Vision tokens that pruning keeps stay in order and are never padding. So the mask of a
    pruned sequence is the mask of `layout.with_vision(count)`: the full mask without its first rows and columns.
    Nothing has to be gathered.

    Args:
        layout: segments of the sequence.
        valid_BS: bool; False on padding.
        kind: one of `ATTENTION`.
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
    """Convert a boolean mask to numbers that are added to attention logits: 0 or -inf.

    Attention converts a boolean mask in every call; this does it once.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
