"""Compute the attention of a vision tower for routers that need it, in addition to the tower's fused kernels.

Shape legend: X rows (samples times views), N patches, S tokens with the prefix, h heads, C head width, F tower width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

FROM_VISION = frozenset({"attention_LBN", "received_BN", "attention_BNN", "keys_BNC"})
"""Items of `RouterContext` that the probe provides."""


class AttentionProbe:
    """Compute and store attention and keys when the tower calls it with a block; without gradients.

    Args:
        needs: items to store, of `FROM_VISION`.
        blocks: blocks whose attention is stored in `attention_LBN`; the other items are from the last of them.
        prefix: number of tokens before the patches.
        has_cls: True if the first of these is a [CLS] token; otherwise attention from the patches replaces that of
            [CLS].
        timer: context manager that times the work of the probe.
    """

    def __init__(
        self,
        needs: Collection[str],
        blocks: Sequence[int],
        prefix: int,
        has_cls: bool,
        timer: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.timer = timer or nullcontext()
        self.needs, self.blocks, self.prefix, self.has_cls = FROM_VISION & set(needs), blocks, prefix, has_cls
        self.rows: list[Tensor] = []
        self.found: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, index: int, block: Any, x_XSF: Tensor) -> None:
        if self.watches(index):
            with self.timer:
                self.read(index, *_queries_and_keys(block, x_XSF))

    def watches(self, index: int) -> bool:
        """Return whether the probe reads this block."""
        return bool(self.needs) and index in self.blocks

    def read(self, index: int, q_XhSC: Tensor, k_XhSC: Tensor) -> None:
        """Store what is needed of a block with these scaled queries and keys of all tokens, float32."""
        patches, last = slice(self.prefix, None), index == self.blocks[-1]
        if "attention_LBN" in self.needs and self.has_cls:
            self.rows.append(_attention(q_XhSC[:, :, :1], k_XhSC)[:, 0, patches])
        among_patches = self.needs & {"received_BN", "attention_BNN"} if last else frozenset()
        if among_patches or ("attention_LBN" in self.needs and not self.has_cls):
            attention_XNN = _attention(q_XhSC[:, :, patches], k_XhSC)[..., patches]
            if not self.has_cls:
                self.rows.append(attention_XNN.mean(1))
            if last:
                self.found |= {"attention_BNN": attention_XNN, "received_BN": attention_XNN.mean(1)}
        if last and "keys_BNC" in self.needs:
            self.found["keys_BNC"] = k_XhSC[:, :, patches].mean(1)

    def items(self) -> dict[str, Tensor]:
        """Return the stored items, with X rows instead of B."""
        rows = {"attention_LBN": torch.stack(self.rows)} if self.rows else {}
        return {name: value for name, value in {**self.found, **rows}.items() if name in self.needs}


def mean_attention(block: Any, x_XSF: Tensor, rows: slice) -> Tensor:
    """Return the attention float32 [X,Q,S] from these rows to all tokens in a timm block, mean over heads."""
    q_XhSC, k_XhSC = _queries_and_keys(block, x_XSF)
    return _attention(q_XhSC[:, :, rows], k_XhSC)


def _queries_and_keys(block: Any, x_XSF: Tensor) -> tuple[Tensor, Tensor]:
    """Return scaled queries and keys of all tokens, float32 [X,h,S,C]."""
    attention = block.attn
    qkv_XSQ = attention.qkv(block.norm1(x_XSF))
    q, k, _ = rearrange(qkv_XSQ, "x s (three h c) -> three x h s c", three=3, h=attention.num_heads)
    return attention.q_norm(q).float() * attention.scale, attention.k_norm(k).float()


def _attention(q_XhQC: Tensor, k_XhSC: Tensor) -> Tensor:
    """Return the attention [X,Q,S], mean over heads."""
    return (q_XhQC @ k_XhSC.mT).softmax(-1).mean(1)
