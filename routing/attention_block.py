"""A small pre-norm transformer block with self- or cross-attention, for routers that are trained.

Shape legend: B rows, Q query tokens, N tokens that they read, D width, h heads, e head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class AttentionBlock(nn.Module):
    """Compute x + attention(norm(x), norm(read)), then x + mlp(norm(x)).

    Args:
        width: D.
        heads: h.
        read_width: width of the tokens to read; None: self-attention.
        mlp: hidden width of the MLP as a multiple of D.
    """

    def __init__(self, width: int, heads: int, read_width: int | None = None, mlp: float = 2.0) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a router of width {width} cannot have {heads} heads; choose a divisor")
        self.heads, hidden = heads, round(width * mlp)
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read_norm = None if read_width is None else nn.LayerNorm(read_width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(read_width or width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BQD: Tensor, read_BND: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Update the queries.

        Args:
            x_BQD: queries.
            read_BND: tokens to read, of `read_width`; None for self-attention.
            mask: bool [B|1,Q|1,N], True where a query may attend; None: everywhere.
        """
        asking_BQD = self.norm(x_BQD)
        assert (read_BND is None) == (self.read_norm is None)
        read_BND = asking_BQD if self.read_norm is None else self.read_norm(read_BND)
        q_BhQe = rearrange(self.q(asking_BQD), "b q (h e) -> b h q e", h=self.heads)
        k_BhNe, v_BhNe = rearrange(self.kv(read_BND), "b n (two h e) -> two b h n e", two=2, h=self.heads)
        allowed = None if mask is None else mask[:, None]
        out_BhQe = F.scaled_dot_product_attention(q_BhQe, k_BhNe, v_BhNe, attn_mask=allowed)
        x_BQD = x_BQD + self.out(rearrange(out_BhQe, "b h q e -> b q (h e)"))
        return x_BQD + self.mlp(self.mlp_norm(x_BQD))
