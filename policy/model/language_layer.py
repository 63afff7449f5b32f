"""Run one layer of an unmodified transformers Llama or Qwen2 with a given mask, positions, and rows to compute.

Shape legend: B batch, S sequence, Q query rows, N vision tokens, D width, h heads, g key/value heads, e head width,
F = e/2, U = 2e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvla.routing.layout import TokenLayout


@dataclass(frozen=True)
class Frame:
    """Mask and positions of a set of tokens.

    Attributes:
        layout: layout of the tokens.
        mask_B1SS: additive attention mask.
        turn_BSU: cosine and sine of the rotary embedding, see `joined_turn`.
        seen_BN: False for vision tokens that a router hides; None: all are visible.
    """

    layout: TokenLayout
    mask_B1SS: Tensor
    turn_BSU: Tensor
    seen_BN: Tensor | None = None

    def hiding(self, seen_BN: Tensor) -> Frame:
        """Return the same frame, in which nothing attends to vision tokens with `seen_BN` False."""
        layout, size = self.layout, self.layout.length
        seen_BS = F.pad(seen_BN, (layout.visual.start, size - layout.visual.stop), value=True)
        mask_B1SS = self.mask_B1SS.masked_fill(~seen_BS[:, None, None], float("-inf"))
        return Frame(layout, mask_B1SS, self.turn_BSU, seen_BN)


def run_layer(
    layer: Any,
    x_BSD: Tensor,
    h_BSD: Tensor,
    frame: Frame,
    *,
    factor_BS1: Tensor | None = None,
    scale_values: bool = False,
    rows: slice | None = None,
) -> Tensor:
    """Run one transformer layer.

    Args:
        layer: transformers layer.
        x_BSD: input (residual stream).
        h_BSD: input after the layer's first norm.
        frame: mask and positions.
        factor_BS1: the router's factors for the MLP output; None: 1.
        scale_values: multiply the attention's values by the factors, too.
        rows: output rows to compute; None: all.
    """
    rows = rows or slice(None)
    attention = layer.self_attn
    head_width, split = frame.turn_BSU.shape[-1] // 2, "b s (h e) -> b h s e"
    q_BhQe, k_BgSe = _queries_and_keys(attention, h_BSD, frame, rows)
    v_BSD = attention.v_proj(h_BSD)
    v_BgSe = rearrange(v_BSD * factor_BS1 if scale_values and factor_BS1 is not None else v_BSD, split, e=head_width)
    if groups := q_BhQe.shape[1] // k_BgSe.shape[1] - 1:
        k_BgSe, v_BgSe = (t.repeat_interleave(groups + 1, dim=1) for t in (k_BgSe, v_BgSe))
    o_BhQe = F.scaled_dot_product_attention(q_BhQe, k_BgSe, v_BgSe, attn_mask=frame.mask_B1SS[:, :, rows])
    x_BQD = x_BSD[:, rows] + attention.o_proj(rearrange(o_BhQe, "b h q e -> b q (h e)"))
    out_BQD = layer.mlp(normed(layer.post_attention_layernorm, x_BQD))
    return x_BQD + out_BQD if factor_BS1 is None else torch.addcmul(x_BQD, out_BQD, factor_BS1[:, rows])


def _queries_and_keys(attention: Any, h_BSD: Tensor, frame: Frame, rows: slice) -> tuple[Tensor, Tensor]:
    """Return the rotated queries of some rows, and the rotated keys of all."""
    cos_B1Se, sin_B1Se = frame.turn_BSU[:, None].chunk(2, dim=-1)
    head_width, split = cos_B1Se.shape[-1], "b s (h e) -> b h s e"
    q_BhQe = rearrange(attention.q_proj(h_BSD[:, rows]), split, e=head_width)
    k_BgSe = rearrange(attention.k_proj(h_BSD), split, e=head_width)
    return _rotate(q_BhQe, cos_B1Se[:, :, rows], sin_B1Se[:, :, rows]), _rotate(k_BgSe, cos_B1Se, sin_B1Se)


def attention_rows(layer: Any, h_BSD: Tensor, frame: Frame, rows: slice) -> Tensor:
    """Return the attention [B,Q,S], float32 mean over heads, from these rows to all tokens in this layer."""
    q_BhQe, k_BgSe = _queries_and_keys(layer.self_attn, h_BSD, frame, rows)
    k_BhSe = k_BgSe.repeat_interleave(q_BhQe.shape[1] // k_BgSe.shape[1], dim=1)
    logits_BhQS = (q_BhQe @ k_BhSe.mT).float() * math.sqrt(1 / q_BhQe.shape[-1])
    return (logits_BhQS + frame.mask_B1SS[:, :, rows].float()).softmax(-1).mean(1)


def joined_turn(cos_BSe: Tensor, sin_BSe: Tensor) -> Tensor:
    """Join cosine and sine in one tensor, with the first half of the sine negated."""
    first_BSF, second_BSF = sin_BSe.chunk(2, dim=-1)
    return torch.cat((cos_BSe, -first_BSF, second_BSF), dim=-1)


def normed(norm: Any, x: Tensor) -> Tensor:
    """Apply RMSNorm, in one operation if weight and input have the same precision (not under autocast)."""
    if norm.weight.dtype != x.dtype:
        return norm(x)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding in Llama's half-split form; `sin` has its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
