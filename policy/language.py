"""A decoder of ours that drives the layers of an unmodified transformers Llama (LFP and CAtten, stages 2 and 3).

What is unusual:
- vision tokens are routed per layer; the mask is built once per keep-count and handed to SDPA, nothing is patched
- no KV cache and no output vocabulary: a chunk of actions is read from one forward pass
- the last layer computes queries and MLP only for the rows that are read, those of the actions

Shape legend: B batch, S sequence, T text, J action tokens, Q query rows, N vision tokens, K kept vision tokens,
D width, H heads, G key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from cogvla.policy.config import LanguageConfig, RoutingConfig
from cogvla.routing.attention import additive, attention_mask
from cogvla.routing.layout import TokenLayout
from cogvla.routing.pruning import FiLMRouter, put_rows, take_rows
from cogvla.routing.schedule import keep_count


def build_language_model(config: LanguageConfig) -> Any:
    """The transformers model whose layers the decoder drives, randomly initialised."""
    config_class, model_class = {"llama": (LlamaConfig, LlamaModel), "qwen2": (Qwen2Config, Qwen2Model)}[
        config.architecture
    ]
    model = model_class(
        config_class(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads or config.heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            initializer_range=config.init_std,
            pad_token_id=None,
        )
    )
    if config.embedding_std is not None:
        nn.init.normal_(model.embed_tokens.weight, std=config.embedding_std)
    return model


@dataclass
class Trace:
    """What a debug forward pass remembers, by layer.

    Attributes:
        hidden: [B,S',D] after the layer.
        kept: vision tokens of routed layers, int64 [B,K], counted from the first vision token of the whole sequence.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)


class RoutedDecoder(nn.Module):
    """Sequence [B,S,D] in, one state per action token [B,J,D] out.

    Args:
        config, routing: see there.
        shifted: see `ActionHeadConfig`.
    """

    def __init__(self, config: LanguageConfig, routing: RoutingConfig, shifted: bool = False) -> None:
        super().__init__()
        self.shifted = shifted
        self.llm: Any = build_language_model(config)
        self.routing = routing
        self.ratios = routing.keep_ratios(config.layers)
        self.routers = nn.ModuleDict(
            {
                str(index): FiLMRouter(config.width, score_all=routing.scale == "all")
                for index, ratio in enumerate(self.ratios)
                if ratio is not None
            }
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids to embeddings."""
        return self.llm.embed_tokens(ids)

    def forward(self, x_BSD: Tensor, layout: TokenLayout, text_mask_BT: Tensor, trace: Trace | None = None) -> Tensor:
        """Run all layers; with a `trace`, every row of every layer is computed and remembered.

        Args:
            x_BSD: embeddings in the order of `layout`.
            layout: of the whole sequence.
            text_mask_BT: False on padding.
            trace: filled in place.
        """
        context = _Context(self, x_BSD, layout, text_mask_BT)
        now = context.frame(layout.vision)
        current_BN: Tensor | None = None  # original vision indices still in the sequence, for the trace in drop mode
        last = len(self.llm.layers) - 1
        for index, (layer, ratio) in enumerate(zip(self.llm.layers, self.ratios, strict=True)):
            # A traced pass wants every row of every layer.
            read = self.read_rows if index == last and trace is None else None
            count = now.layout.vision if ratio is None else min(keep_count(layout.vision, ratio), now.layout.vision)
            h_BSD = layer.input_layernorm(x_BSD)
            if ratio is None:
                x_BSD = _layer(layer, x_BSD, h_BSD, now, rows=read and read(now.layout))
            else:
                router = self.routers[str(index)]
                chosen = router(h_BSD, now.layout, now.valid_BS, count)
                frame = context.frame(count, kept_BK=chosen.kept_BK, before=now)
                out_BSD = _layer(
                    layer,
                    take_rows(x_BSD, chosen.rows),
                    take_rows(h_BSD, chosen.rows),
                    frame,
                    factor_BS1=chosen.factor_BS1,
                    scale_values=self.routing.scale == "values",
                    rows=read and read(frame.layout),
                )
                if trace is not None:
                    kept_BK = chosen.kept_BK if current_BN is None else current_BN.gather(1, chosen.kept_BK)
                    trace.kept[index] = kept_BK
                    current_BN = kept_BK if self.routing.mode == "drop" else None
                if self.routing.mode == "drop" or read:
                    x_BSD, now = out_BSD, frame
                else:
                    x_BSD = put_rows(x_BSD, chosen.rows, out_BSD)
            if trace is not None:
                trace.hidden[index] = x_BSD
        read_BQD = x_BSD if trace is None else x_BSD[:, self.read_rows(now.layout)]
        return self.llm.norm(self._action_states(read_BQD, text_mask_BT, layout))

    def read_rows(self, layout: TokenLayout) -> slice:
        """Rows that the last layer has to compute."""
        return slice(layout.state.start, layout.length) if self.shifted else layout.answer

    def _action_states(self, read_BQD: Tensor, text_mask_BT: Tensor, layout: TokenLayout) -> Tensor:
        if not self.shifted:
            return read_BQD[:, : layout.action]
        # Row 0 is the state token, then come the words: the last real one is before the first action, padding or not.
        word_T = torch.arange(1, layout.text + 1, device=read_BQD.device)
        last_B11 = (text_mask_BT * word_T).amax(1)[:, None, None]
        before_B1D = read_BQD.gather(1, last_B11.expand(-1, -1, read_BQD.shape[-1]))
        first = layout.actions.start - layout.state.start
        return torch.cat((before_B1D, read_BQD[:, first : first + layout.action - 1]), dim=1)


@dataclass(frozen=True)
class _Frame:
    """What attention needs for one set of tokens; `sin` carries the sign of the rotation."""

    layout: TokenLayout
    valid_BS: Tensor
    mask_B1SS: Tensor
    position_BS: Tensor
    cos_B1SE: Tensor
    sin_B1SE: Tensor


class _Context:
    """Mask and rotations of one forward pass, from which those of every keep-count are taken."""

    def __init__(self, decoder: RoutedDecoder, x_BSD: Tensor, layout: TokenLayout, text_mask_BT: Tensor) -> None:
        self.layout, self.renumber = layout, decoder.routing.position_policy == "renumber"
        self.valid_BS = layout.valid(text_mask_BT)
        self.mask_B1SS = additive(attention_mask(layout, self.valid_BS, decoder.routing.attention), x_BSD.dtype)
        self.position_BS = layout.positions(self.valid_BS)
        # Rotations of positions 0..S-1, looked up by every layer: no position is larger.
        cos_1SE, sin_1SE = decoder.llm.rotary_emb(x_BSD, torch.arange(layout.length, device=x_BSD.device)[None])
        first_SF, second_SF = sin_1SE[0].chunk(2, dim=-1)
        self.cos_SE, self.sin_SE = cos_1SE[0], torch.cat((-first_SF, second_SF), dim=-1)

    def frame(self, count: int, kept_BK: Tensor | None = None, before: _Frame | None = None) -> _Frame:
        """The frame with `count` vision tokens: all of them, or those `kept` of the frame `before`."""
        # Vision tokens are alike to the mask and follow bos, so leaving any of them out is leaving out the first rows.
        fewer = self.layout.vision - count
        layout, valid_BS = self.layout.with_vision(count), self.valid_BS[:, fewer:]
        mask_B1SS = self.mask_B1SS[:, :, fewer:, fewer:].contiguous()
        position_BS = self.position_BS[:, fewer:] - fewer
        if kept_BK is not None and not self.renumber:
            assert before is not None, "kept tokens are a selection of a frame"
            visual_BK = before.position_BS[:, before.layout.visual].gather(1, kept_BK)
            rest_BR = before.position_BS[:, before.layout.rest]
            position_BS = torch.cat((before.position_BS[:, before.layout.bos], visual_BK, rest_BR), dim=1)
        cos_B1SE, sin_B1SE = self.cos_SE[position_BS][:, None], self.sin_SE[position_BS][:, None]
        return _Frame(layout, valid_BS, mask_B1SS, position_BS, cos_B1SE, sin_B1SE)


def _layer(
    layer: Any,
    x_BSD: Tensor,
    h_BSD: Tensor,
    frame: _Frame,
    *,
    factor_BS1: Tensor | None = None,
    scale_values: bool = False,
    rows: slice | None = None,
) -> Tensor:
    """One transformer layer on residual `x` and its normalised form `h`; of the output, only `rows` are computed."""
    rows = rows or slice(None)
    attention = layer.self_attn
    head_width = frame.cos_B1SE.shape[-1]
    split = "b s (h e) -> b h s e"
    q_BHQE = rearrange(attention.q_proj(h_BSD[:, rows]), split, e=head_width)
    k_BGSE = rearrange(attention.k_proj(h_BSD), split, e=head_width)
    v_BSD = attention.v_proj(h_BSD)
    v_BGSE = rearrange(v_BSD * factor_BS1 if scale_values and factor_BS1 is not None else v_BSD, split, e=head_width)
    q_BHQE = _rotate(q_BHQE, frame.cos_B1SE[:, :, rows], frame.sin_B1SE[:, :, rows])
    k_BGSE = _rotate(k_BGSE, frame.cos_B1SE, frame.sin_B1SE)
    if groups := q_BHQE.shape[1] // k_BGSE.shape[1] - 1:
        k_BGSE, v_BGSE = (t.repeat_interleave(groups + 1, dim=1) for t in (k_BGSE, v_BGSE))
    o_BHQE = F.scaled_dot_product_attention(q_BHQE, k_BGSE, v_BGSE, attn_mask=frame.mask_B1SS[:, :, rows])
    x_BQD = x_BSD[:, rows] + attention.o_proj(rearrange(o_BHQE, "b h q e -> b q (h e)"))
    out_BQD = layer.mlp(layer.post_attention_layernorm(x_BQD))
    return x_BQD + out_BQD if factor_BS1 is None else torch.addcmul(x_BQD, out_BQD, factor_BS1[:, rows])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Llama's half-split form; `sin` has its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
