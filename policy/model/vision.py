"""The vision encoder: two transformers that are modulated by the instruction (EFA, stage 1).

- The blocks are unmodified timm blocks, but run from here, because FiLM is between their attention and their MLP.
- The features are the output of the last block but one; the last block is not computed.
- The last computed block updates only the aggregation tokens, because only these are read.
- The normalisation of pixels is folded into the patch projection, and both towers share the cut into patches.

Shape legend: B batch, V views, X = B*V, P patches per view, M aggregation tokens per view, N tokens per view,
C channels*patch^2, F tower width, D language width, L blocks, G frequencies, p pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import RoutingConfig, TowerConfig, VisionConfig
from cogvla.policy.model.recompute import call
from cogvla.routing.aggregation import AggregationTokens, StreamFusion
from cogvla.routing.film import FiLM, modulate

WHITE = 255.0  # largest pixel value
Probe = Callable[[int, Any, Tensor], None]
"""Function that is called with the number of a block, the block, and its input [X,P',F] with all prefix tokens."""
Reducer = Callable[[int, int, Tensor], Tensor]
"""Function from the number of a tower, that of a block, and the block's input [X,P',F], to that with fewer patches."""
Observer = Callable[["VisionTower", int, Tensor], None]
"""Function that is called with a tower, the number of a block, and its input [X,P',F], with or without EFA."""


def build_vit(config: TowerConfig, image_size: tuple[int, int], drop_last_block: bool) -> Any:
    """Build a timm vision transformer without the unused parts (pooling, head, final norm)."""
    sizes = {"img_size": image_size, "patch_size": config.patch_size, "num_classes": 0}
    if config.timm is not None:
        vit = timm.create_model(config.timm, **sizes)
    else:
        vit = VisionTransformer(
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            class_token=config.class_token,
            reg_tokens=config.registers,
            no_embed_class=True,
            init_values=config.layer_scale,
            global_pool="",
            **sizes,
        )
        _initialise(vit)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"timm model {config.timm!r} is a {type(vit).__name__}; only VisionTransformer is supported")
    if drop_last_block:
        vit.blocks = vit.blocks[:-1]
    vit.attn_pool, vit.norm, vit.fc_norm, vit.head = None, nn.Identity(), nn.Identity(), nn.Identity()
    return vit


def _initialise(vit: Any) -> None:
    """Initialise a new tower so that signals keep their size across layers, with sines and cosines as positions.

    timm's initialisation (standard deviation 0.02) is for wide towers and long training; with it, narrow towers learn
    nothing for thousands of steps.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    rows, columns = vit.patch_embed.grid_size
    with torch.no_grad():
        vit.pos_embed.copy_(_position_code(rows, columns, vit.embed_dim))


def _position_code(rows: int, columns: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, [1,rows*columns,width]."""
    frequency_G = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    y_P, x_P = (t.flatten().float() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    angles = [position_P[:, None] * frequency_G for position_P in (y_P, x_P)]
    code_PF = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(code_PF, (0, width - code_PF.shape[1]))[None]


class VisionTower(nn.Module):
    """One vision tower; returns aggregation tokens [X,M,F] with EFA, and patch tokens [X,P,F] without.

    Attributes:
        recompute: recompute blocks in the backward pass, see `policy.model.recompute`.
    """

    gain: Tensor
    offset: Tensor

    def __init__(
        self,
        config: VisionConfig,
        tower: TowerConfig,
        routing: RoutingConfig,
        image_size: tuple[int, int],
        summary_width: int,
    ) -> None:
        super().__init__()
        if any(side % tower.patch_size for side in image_size):
            raise ValueError(f"images of {image_size} pixels cannot be cut into patches of {tower.patch_size}")
        self.vit: Any = build_vit(tower, image_size, config.drop_last_block)
        self.patch_size, self.recompute = tower.patch_size, False
        self.prefix, self.has_cls = self.vit.num_prefix_tokens, self.vit.cls_token is not None
        self.width: int = self.vit.embed_dim
        self.computed = len(self.vit.blocks) - (not config.drop_last_block)
        mean, std = torch.tensor(tower.mean, dtype=torch.float32), torch.tensor(tower.std, dtype=torch.float32)
        self.register_buffer("gain", 1 / std, persistent=False)
        self.register_buffer("offset", mean / std, persistent=False)
        self.film: FiLM | None = None
        self.aggregation: AggregationTokens | None = None
        if routing.efa or routing.film:
            self.film = FiLM(summary_width, self.width, self.computed, routing.film_init)
        if routing.efa:
            self.aggregation = AggregationTokens(config.aggregation_tokens, self.width)

    def embedding(self) -> tuple[Tensor, Tensor]:
        """Return weight [F,C] and bias [F] of the patch projection with normalisation, for pixel values 0 to 255."""
        projection = self.vit.patch_embed.proj
        dtype = projection.weight.dtype
        weight_F3p = projection.weight.float().flatten(2)
        bias_F = projection.bias.float() - weight_F3p.sum(2) @ self.offset.float()
        return (weight_F3p * (self.gain[:, None] / WHITE)).flatten(1).to(dtype), bias_F.to(dtype)

    def forward(
        self,
        x_XPF: Tensor,
        film: tuple[Tensor, Tensor] | None,
        gaze: list[Tensor] | None = None,
        probe: Probe | None = None,
        observer: Observer | None = None,
        reduce: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute tokens [X,N,F].

        Args:
            x_XPF: embedded patches.
            film: `1 + scale` and shift of FiLM, [L,B,1,F]; None: no FiLM.
            gaze: list that receives the logarithm of the aggregation tokens' attention to the patches in the last
                block, [X,h,M,P].
            probe: function called with every block, unless EFA is on.
            observer: function called with every block.
            reduce: function from the number of a block and its input to that with fewer patches.
        """
        vit = self.vit
        x = x_XPF
        prefix = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.no_embed_class or not prefix:
            x = torch.cat((*prefix, x + vit.pos_embed), dim=1) if prefix else x + vit.pos_embed
        else:
            x = torch.cat((*prefix, x), dim=1) + vit.pos_embed
        x = vit.norm_pre(x)
        if self.aggregation is not None:
            x, probe = self.aggregation.append_to(x), None
        for index, block in enumerate(vit.blocks[: self.computed]):
            if reduce is not None:
                x = reduce(index, x)
            if probe is not None:
                probe(index, block, x)
            if observer is not None:
                observer(self, index, x)
            if film is None:
                x = call(self.recompute, block, x)
                continue
            watch = gaze is not None and self.aggregation is not None and index == self.computed - 1
            x, log_attention_XhMP = call(self.recompute, self._block, index, x, film[0][index], film[1][index], watch)
            if gaze is not None and watch:
                gaze.append(log_attention_XhMP)
        return x if self.aggregation is not None else x[:, vit.num_prefix_tokens :]

    def _block(
        self, index: int, x_XNF: Tensor, scale_B1F: Tensor, shift_B1F: Tensor, watch: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run block `index` with FiLM; with `watch`, also return the aggregation tokens' log attention."""
        block, x, log_attention_XhMP = self.vit.blocks[index], x_XNF, None
        attended = block.norm1(x)
        if self.aggregation is not None and index == self.computed - 1:
            x = self.aggregation.take_from(x)
            attended, log_attention_XhMN = _attend_last(block.attn, attended, x.shape[1], watch)
            if log_attention_XhMN is not None:
                log_attention_XhMP = log_attention_XhMN[..., self.vit.num_prefix_tokens : -x.shape[1]]
        else:
            attended = block.attn(attended)
        x = x + block.drop_path1(block.ls1(attended))
        x = modulate(x, scale_B1F, shift_B1F)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), log_attention_XhMP


def cut_patches(pixels_BVCHW: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Cut pixels, uint8 or float in [0,1], into patches [X,P,C] with values 0 to 255.

    Bytes are cut before conversion, with a quarter of the memory traffic of floats, and if possible eight at a time.
    """
    pixels = pixels_BVCHW
    wide = pixels.dtype == torch.uint8 and size % 8 == 0 and pixels.is_contiguous()
    recorded = torch.jit.is_tracing() or torch.compiler.is_exporting()  # neither knows the change of type
    word = 8 if wide and not recorded else 1
    if word > 1:
        pixels = pixels.view(torch.int64)
    cut = rearrange(pixels, "b v c (h p) (w q) -> (b v) (h w) (c p q)", p=size, q=size // word)
    cut = cut.view(torch.uint8) if word > 1 else cut
    return (cut if cut.dtype == torch.uint8 else cut * WHITE).to(dtype)


def _outputs(linear: Any, x: Tensor, first: int, end: int) -> Tensor:
    """Return outputs `first` to `end` of a linear layer; with an adapter around it, all are computed."""
    if type(linear) is not nn.Linear:
        return linear(x)[..., first:end]
    return F.linear(x, linear.weight[first:end], None if linear.bias is None else linear.bias[first:end])


def _attend_last(attention: Any, h_XNF: Tensor, rows: int, watch: bool) -> tuple[Tensor, Tensor | None]:
    """Compute attention of the last `rows` tokens to all tokens, with the weights of a timm module.

    Returns:
        Output [X,rows,F], and with `watch` the logarithm of the attention, [X,h,rows,N].
    """
    known = type(attention) is Attention
    if not (known or watch):
        return attention(h_XNF)[:, -rows:], None
    split = attention.qkv.out_features // 3
    q, kv = _outputs(attention.qkv, h_XNF[:, -rows:], 0, split), _outputs(attention.qkv, h_XNF, split, 3 * split)
    q = attention.q_norm(rearrange(q, "x n (h e) -> x h n e", h=attention.num_heads))
    k, v = rearrange(kv, "x n (two h e) -> two x h n e", two=2, h=attention.num_heads).unbind(0)
    k = attention.k_norm(k)
    log_XhRN = ((q * attention.scale) @ k.mT).log_softmax(-1) if watch else None
    if not known:
        return attention(h_XNF)[:, -rows:], log_XhRN
    attend = F.scaled_dot_product_attention
    out = attend(q, k, v, scale=attention.scale) if log_XhRN is None else log_XhRN.exp() @ v
    return attention.proj_drop(attention.proj(attention.norm(rearrange(out, "x h n e -> x n (h e)")))), log_XhRN


@dataclass(frozen=True)
class VisionCondition:
    """The inputs of the towers that do not depend on the pixels.

    Attributes:
        embeddings: weight and bias of each tower, see `VisionTower.embedding`.
        films: `1 + scale` and shift [L,B,1,F] of each tower; None without FiLM.
        weights_B2: stream weights; None unless streams are mixed.
    """

    embeddings: tuple[tuple[Tensor, Tensor], ...]
    films: tuple[tuple[Tensor, Tensor] | None, ...]
    weights_B2: Tensor | None


class DualVision(nn.Module):
    """Both towers and the fusion of their streams: pixels [B,V,3,H,W] to vision tokens [B,V*N,D]."""

    def __init__(self, config: VisionConfig, routing: RoutingConfig, embodiment: Embodiment, width: int) -> None:
        super().__init__()
        sizes = {(camera.height, camera.width) for camera in embodiment.cameras}
        if len(sizes) != 1:
            raise ValueError(f"the cameras of {embodiment.name!r} must all have one size, got {sorted(sizes)}")
        image_size = sizes.pop()
        towers = {"dinov2": config.dinov2, "siglip": config.siglip}
        self.towers = nn.ModuleDict(
            {name: VisionTower(config, tower, routing, image_size, width) for name, tower in towers.items()}
        )
        fusion = routing.fusion if routing.efa or routing.film else "concat"
        self.fusion = StreamFusion([tower.width for tower in self._towers()], width, fusion)
        first = self._towers()[0]
        self.grid = (image_size[0] // first.patch_size, image_size[1] // first.patch_size)
        patches = self.grid[0] * self.grid[1]
        self.tokens = len(embodiment.cameras) * (config.aggregation_tokens if routing.efa else patches)

    def condition(self, summary_BD: Tensor) -> VisionCondition:
        """Compute the condition from the instruction's summary; reuse it while the instruction does not change."""
        embeddings = tuple(tower.embedding() for tower in self._towers())
        films = tuple(tower.film(summary_BD) if tower.film is not None else None for tower in self._towers())
        return VisionCondition(embeddings, films, self.fusion.weights(summary_BD))

    def streams(
        self,
        pixels_BVCHW: Tensor,
        condition: VisionCondition,
        gaze: list[Tensor] | None = None,
        probe: Probe | None = None,
        observer: Observer | None = None,
        reducer: Reducer | None = None,
    ) -> list[Tensor]:
        """Run both towers; return the tokens of each before projection, [B,V*N,F].

        Args:
            pixels_BVCHW: uint8, or float in [0,1].
            condition: result of `condition`.
            gaze: list that receives one entry per tower, see `VisionTower.forward`.
            probe: function called with every block of the first tower, see `VisionTower.forward`.
            observer: function called with every block of both towers.
            reducer: reduces the patches inside of the towers; None: they stay.
        """
        views = pixels_BVCHW.shape[1]
        patches: dict[int, Tensor] = {}
        streams: list[Tensor] = []
        for tower, embedding, film in zip(self._towers(), condition.embeddings, condition.films, strict=True):
            size = tower.patch_size
            if size not in patches:
                patches[size] = cut_patches(pixels_BVCHW, size, tower.vit.patch_embed.proj.weight.dtype)
            reduce = None if reducer is None else partial(reducer, len(streams))
            x_XNF = tower(F.linear(patches[size], *embedding), film, gaze, None if streams else probe, observer, reduce)
            streams.append(rearrange(x_XNF, "(b v) n w -> b (v n) w", v=views))
        return streams

    def forward(self, pixels_BVCHW: Tensor, condition: VisionCondition) -> Tensor:
        """Compute mixed vision tokens [B,V*N,D] from pixels, uint8 or float in [0,1]."""
        return self.fusion(self.streams(pixels_BVCHW, condition), condition.weights_B2)

    def named_towers(self) -> list[tuple[str, VisionTower]]:
        """Return the towers with their names, in the order of the streams."""
        return [(name, cast(VisionTower, tower)) for name, tower in self.towers.items()]

    def _towers(self) -> list[VisionTower]:
        return [tower for _, tower in self.named_towers()]
