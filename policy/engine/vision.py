"""The vision towers (stage 1) as a function of tensors, with fused operations.

Tests check that they compute the same as `policy.model.vision`. Differences:
- LayerNorm, LayerScale and pixel normalisation are folded into linear layers; constant tokens are precomputed
- towers of the same shape run as one with stacked weights: half as many operations, each twice as large

Shape legend: G towers run as one, X images (B*V), P patches per image, N tokens per image, M aggregation tokens,
C bytes per patch, F tower width, L blocks, h heads, e head width, R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention, LayerNorm, LayerScale, Mlp
from torch import Tensor, nn

from cogvla.policy.engine.linear import FusedLinear, fused
from cogvla.policy.model.routers.attention_probe import AttentionProbe
from cogvla.policy.model.vision import VisionTower


class StackedLinear(nn.Module):
    """Linear layers of G towers in one operation, [G,R,I] to [G,R,O]."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linears: Sequence[FusedLinear]) -> None:
        super().__init__()
        weight_GIO = torch.stack([linear.weight.T for linear in linears])
        outputs = weight_GIO.shape[-1]
        none_O = weight_GIO.new_zeros(outputs)
        bias_G1O = torch.stack([none_O if linear.bias is None else linear.bias for linear in linears])[:, None]
        self.register_buffer("weight", weight_GIO.contiguous(), persistent=False)
        self.register_buffer("bias", bias_G1O.contiguous(), persistent=False)

    def forward(self, x_GRI: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x_GRI, self.weight)


def _linear(parts: Sequence[FusedLinear]) -> nn.Module:
    return parts[0] if len(parts) == 1 else StackedLinear(parts)


class FusedBlock(nn.Module):
    """One block of G towers of the same shape, on tokens [G,X*N,F].

    Args:
        blocks: timm blocks, one per tower.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__()
        first = blocks[0]
        self.heads: int = first.attn.num_heads
        self.scale: float = first.attn.scale
        self.eps = (first.norm1.eps, first.norm2.eps)
        self.act = first.mlp.act
        qkv = [_after_norm(block.attn.qkv, block.norm1) for block in blocks]
        split = qkv[0].weight.shape[0] // 3
        self.split = split
        self.qkv = _linear(qkv)
        self.attended = _linear([fused([b.attn.proj], scale_O=_layer_scale(b.ls1)) for b in blocks])
        self.inner = _linear([_after_norm(block.mlp.fc1, block.norm2) for block in blocks])
        self.outer = _linear([fused([b.mlp.fc2], scale_O=_layer_scale(b.ls2)) for b in blocks])

    def forward(
        self,
        x: Tensor,
        film: tuple[Tensor, Tensor] | None,
        images: int,
        rows: int | None,
        read: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Run the block on tokens [...,X*N,F]; return [...,X*rows,F].

        Args:
            x: tokens of all images.
            film: `1 + scale` and shift, [...,X,1,F]; None: no FiLM.
            images: X.
            rows: number of tokens to compute, the last ones of each image; None: all.
            read: function called with the scaled queries and the keys of the first tower, [X,h,N,e]; None: none.
        """
        width = x.shape[-1]
        qkv = self.qkv(F.layer_norm(x, (width,), eps=self.eps[0]))
        q, k, v = rearrange(
            qkv, "... (x n) (three h e) -> three (... x) h n e", three=3, x=images, h=self.heads
        ).unbind(0)
        if read is not None:
            read(q[:images].float() * self.scale, k[:images].float())
        if rows is not None:
            q = q[:, :, -rows:]
            x = x.unflatten(-2, (images, -1))[..., -rows:, :].flatten(-3, -2)
        o = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        o = rearrange(o, "(g x) h n e -> g (x n) (h e)", x=images)
        x = x + self.attended(o if x.dim() == 3 else o[0])
        if film is not None:
            scale_X1F, shift_X1F = film
            x = torch.addcmul(shift_X1F, x.unflatten(-2, (images, -1)), scale_X1F).flatten(-3, -2)
        return x + self.outer(self.act(self.inner(F.layer_norm(x, (width,), eps=self.eps[1]))))


class FusedTowers(nn.Module):
    """Both towers if they have the same shape (G = 2), otherwise one of them (G = 1).

    Args:
        towers: towers for which `why_not` returns None; their weights are copied.
        release: free their blocks after copying them.
    """

    positions: Tensor
    before: Tensor
    behind: Tensor

    def __init__(self, towers: Sequence[VisionTower], release: bool = False) -> None:
        super().__init__()
        first = towers[0]
        self.patch_size, self.towers = first.patch_size, len(towers)
        self.rows = None if first.aggregation is None else len(first.aggregation.tokens)
        self.prefix: int = first.vit.num_prefix_tokens
        embeddings = [tower.embedding() for tower in towers]
        self.embed = _linear([FusedLinear(weight, bias, weight.dtype) for weight, bias in embeddings])
        self.blocks = nn.ModuleList(
            FusedBlock([tower.vit.blocks[index] for tower in towers]) for index in range(first.computed)
        )
        if release:
            for tower in towers:
                tower.vit.blocks.to("meta")
        constants = [_constants(tower) for tower in towers]
        for name, tensors in zip(("before", "positions", "behind"), zip(*constants, strict=True), strict=True):
            self.register_buffer(name, torch.stack(tensors).detach()[:, None], persistent=False)  # [G,1,n,F]
        self.norms = nn.ModuleList(tower.vit.norm_pre for tower in towers)
        self.normed = any(not isinstance(norm, nn.Identity) for norm in self.norms)

    def forward(
        self,
        patches_XPC: Tensor,
        films: tuple[Tensor, Tensor] | None,
        probe: AttentionProbe | None = None,
        reduce: Sequence[Callable[[int, Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Compute tokens [G,X,N,F].

        Args:
            patches_XPC: patches with values 0 to 255, see `policy.model.vision.cut_patches`.
            films: `1 + scale` and shift, [L,G,X,1,F]; None: no FiLM.
            probe: reads the attention of the first tower; None: nothing reads it.
            reduce: for each tower, see `VisionTower.forward`; None: all patches stay.
        """
        images = patches_XPC.shape[0]
        patches_RC = patches_XPC.flatten(0, 1)
        alone = self.towers == 1
        x = self.embed(patches_RC if alone else patches_RC.expand(self.towers, -1, -1))
        x_GXPF = x.unflatten(-2, (images, -1)).view(self.towers, images, patches_XPC.shape[1], -1) + self.positions
        before_GXnF, behind_GXMF = (t.expand(-1, images, -1, -1) for t in (self.before, self.behind))
        if self.normed:
            x_GXPF = torch.cat((before_GXnF, x_GXPF), dim=2)
            x_GXPF = torch.stack([norm(part) for norm, part in zip(self.norms, x_GXPF, strict=True)])
            parts = [x_GXPF, behind_GXMF]
        else:
            parts = [before_GXnF, x_GXPF, behind_GXMF]
        x_GXNF = torch.cat([part for part in parts if part.shape[2]], dim=2)
        x = x_GXNF.flatten(1, 2)
        x = x[0] if alone else x
        for index, block in enumerate(self.blocks):
            if reduce is not None:
                x_GXNF = (x[None] if alone else x).unflatten(1, (images, -1))
                fewer = torch.stack([one(index, part) for one, part in zip(reduce, x_GXNF, strict=True)]).flatten(1, 2)
                x = fewer[0] if alone else fewer
            film = None
            if films is not None:
                film = (films[0][index], films[1][index])
                film = (film[0][0], film[1][0]) if alone else film
            rows = self.rows if index == len(self.blocks) - 1 else None
            read = partial(probe.read, index) if probe is not None and probe.watches(index) else None
            x = block(x, film, images, rows, read)
        x_GXNF = (x[None] if alone else x).unflatten(1, (images, -1))
        return x_GXNF if self.rows is not None else x_GXNF[:, :, self.prefix :]


_NORMS = (nn.LayerNorm, LayerNorm)


def shape_of(tower: VisionTower) -> tuple[Any, ...]:
    """Return everything that must be equal for two towers to run as one."""
    block = tower.vit.blocks[0]
    constants = tuple(tuple(tensor.shape) for tensor in _constants(tower))
    sizes = (tower.patch_size, tower.computed, block.attn.num_heads, block.mlp.fc1.out_features, type(block.mlp.act))
    return (*sizes, block.norm1.eps, block.norm2.eps, constants, tower.vit.patch_embed.proj.weight.dtype)


def why_not(tower: VisionTower) -> str | None:
    """Return the reason why a tower cannot be fused; None if it can."""
    for block in tower.vit.blocks[: tower.computed]:
        attention, mlp = block.attn, block.mlp
        parts = ((attention, "qkv"), (attention, "proj"), (mlp, "fc1"), (mlp, "fc2"))
        linears = [getattr(part, name, None) for part, name in parts]
        if type(attention) is not Attention or type(mlp) is not Mlp or any(type(x) is not nn.Linear for x in linears):
            return f"a block of {type(attention).__name__} and {type(mlp).__name__}"
        identities = (attention.q_norm, attention.k_norm, getattr(attention, "norm", None), getattr(mlp, "norm", None))
        if any(part is not None and not isinstance(part, nn.Identity) for part in identities):
            return "normalisation inside attention or MLP"
        if type(block.norm1) not in _NORMS or type(block.norm2) not in _NORMS:
            return f"normalisation by {type(block.norm1).__name__}"
        if any(not isinstance(scale, (LayerScale, nn.Identity)) for scale in (block.ls1, block.ls2)):
            return f"scaling by {type(block.ls1).__name__}"
    return None


def _after_norm(linear: nn.Linear, norm: Any) -> FusedLinear:
    return fused([linear], gain_I=norm.weight, offset_I=norm.bias)


def _layer_scale(scale: Any) -> Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def _constants(tower: VisionTower) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens before the patches, the positions of the patches, and the tokens after them, each [n,F]."""
    vit = tower.vit
    position_PF = vit.pos_embed[0].detach()
    none_0F = position_PF[:0]
    prefix = [token[0].detach() for token in (vit.cls_token, vit.reg_token) if token is not None]
    before_nF = torch.cat(prefix) if prefix else none_0F
    if prefix and not vit.no_embed_class:
        before_nF, position_PF = before_nF + position_PF[: len(before_nF)], position_PF[len(before_nF) :]
    return before_nF, position_PF, none_0F if tower.aggregation is None else tower.aggregation.tokens.detach()
