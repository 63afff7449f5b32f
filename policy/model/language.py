"""Decoder that runs the layers of an unmodified transformers Llama or Qwen2 with LFP and CAtten (stages 2 and 3).

- Vision tokens are routed in each layer; masks are built once for each number of kept tokens.
- There is no KV cache and no output vocabulary: a chunk of actions is read from one forward pass.
- The last layer computes queries and MLP only for the rows that are read, those of the action tokens.

Shape legend: B batch, S sequence, T text, J action tokens, Q query rows, N vision tokens, n of them kept,
D width, h heads, g key/value heads, e head width, U = 2e.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from cogvla.policy.model.config import LanguageConfig, RoutingConfig
from cogvla.policy.model.language_layer import Frame, attention_rows, joined_turn, normed, run_layer
from cogvla.policy.model.recompute import call
from cogvla.routing.attention import additive, attention_mask
from cogvla.routing.layer_plan import LayerTokens, plan_layers
from cogvla.routing.layout import TokenLayout
from cogvla.routing.pruning import FiLMRouter, Selection, context_weights, put_rows, take_rows
from cogvla.routing.router import RoutedTokens


def build_language_model(config: LanguageConfig) -> Any:
    """Build the transformers model whose layers the decoder runs, with random weights."""
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


@dataclass(frozen=True)
class Choice:
    """A choice of vision tokens, for the trace. Tokens are counted from the first vision token of the whole sequence.

    Attributes:
        layer: language layer.
        by: `router` (a token router) or `LFP`.
        among_BN: tokens to choose from, int64; None: all.
        kept_Bn: tokens that were kept, int64; new ones have the number of their place.
        index_Bn: the kept tokens by their places among those to choose from, int64; -1 for new ones.
        score_BN: scores of those to choose from, higher is more worth keeping; None: the method has none.
        gone: the others are removed; False: they skip this layer.
        new_BN: bool, those to choose from that a router in an earlier layer made; None: none of them.
        routed: result of the token router, which tells new, merged and hidden tokens; None: LFP.
    """

    layer: int
    by: str
    among_BN: Tensor | None
    kept_Bn: Tensor
    index_Bn: Tensor
    score_BN: Tensor | None
    gone: bool
    new_BN: Tensor | None = None
    routed: RoutedTokens | None = None


@dataclass
class DecoderTrace:
    """Intermediate results of a debug forward pass, by layer.

    Attributes:
        hidden: [B,S',D] after the layer.
        kept: vision tokens of routed layers, int64 [B,n], counted from the first vision token of the whole sequence;
            new ones have the number of their place.
        present: the vision tokens in the sequence of the layer, counted alike; None: all.
        new: which of those a router in a layer made, bool [B,N']; None: none of them.
        attention: [B,N'] that those get in the layer from the action tokens, mean over heads and action tokens.
        choices: every choice of vision tokens, in order.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    present: dict[int, Tensor | None] = field(default_factory=dict)
    new: dict[int, Tensor | None] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)

    def choose(
        self, layer: int, by: str, among: tuple[Tensor | None, Tensor | None], chosen: Selection, gone: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add a choice, and return the tokens that are left as `present` and `new` have them.

        Args:
            layer: language layer.
            by: see `Choice`.
            among: `present` and `new` of the tokens to choose from.
            chosen: the choice.
            gone: see `Choice`.
        """
        (among_BN, new_BN), routed = among, chosen.routed
        kept_Bn = chosen.kept_Bn if among_BN is None else among_BN.gather(1, chosen.kept_Bn)
        index_Bn = chosen.kept_Bn if routed is None else routed.index_Bn
        told = among_BN, kept_Bn, index_Bn, chosen.score_BN, gone, new_BN, routed
        self.choices.append(Choice(layer, by, *told))
        self.kept[layer] = kept_Bn
        if not gone:
            return among
        made_Bn = None if routed is None else index_Bn < 0
        if new_BN is not None:
            before_Bn = new_BN.gather(1, index_Bn.clamp(min=0))
            made_Bn = before_Bn if made_Bn is None else made_Bn | before_Bn
        return kept_Bn, made_Bn


class LayerRouting(Protocol):
    """Interface of routers in or between the layers, besides LFP; see `policy.model.routers.layer_router`."""

    def shorten(
        self, layer: Any, index: int, x_BSD: Tensor, now: Frame, context: LayerContext
    ) -> tuple[Tensor, Frame, Selection | None]:
        """Return the sequence before layer `index`, its frame, and the kept vision tokens (None: all)."""

    def choose(self, index: int) -> Selection | None:
        """Return the tokens that layer `index` processes, after `shorten`; None: all."""

    def removed(self, chosen: Selection, tokens: int) -> None:
        """Note that LFP left only these of the `tokens` vision tokens in the sequence."""


class LayerContext(Protocol):
    """Interface of what routers in the layers read about the instructions: `DecoderContext`, or the engine's."""

    text_mask_BT: Tensor

    def pruned(self, chosen: Selection, before: Frame, renumber: bool = False) -> Frame:
        """Return the frame of the tokens chosen from `before`."""


class RoutedDecoder(nn.Module):
    """Language model with layer routing: a sequence [B,S,D] in, one state per action token [B,J,D] out.

    Args:
        config: sizes and weights of the language model.
        routing: stages of routing; this class uses those of the language model.
        shifted: see `ActionHeadConfig`.

    Attributes:
        recompute: whether to recompute layers in the backward pass, which saves memory in training.
    """

    def __init__(self, config: LanguageConfig, routing: RoutingConfig, shifted: bool = False) -> None:
        super().__init__()
        self.shifted, self.recompute = shifted, False
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
        """Return the embeddings of token ids."""
        return self.llm.embed_tokens(ids)

    def plan(
        self, vision: int, routed: Mapping[int, int] | None = None, bypass: bool = False
    ) -> tuple[LayerTokens, ...]:
        """Return the tokens of each layer, see `plan_layers`."""
        return plan_layers(vision, self.ratios, self.routing.mode == "drop", routed, bypass)

    def forward(
        self,
        x_BSD: Tensor,
        context: DecoderContext,
        trace: DecoderTrace | None = None,
        position_BN: Tensor | None = None,
        routing: LayerRouting | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            x_BSD: embeddings in the order of the context's layout.
            context: context of these instructions.
            trace: trace to fill in place; all rows of all layers are computed then.
            position_BN: positions of the vision tokens, may be fractions; None: 1, 2, ...
            routing: routers of the layers, besides LFP.
        """
        now = context.whole if position_BN is None else context.placed(position_BN)
        current: tuple[Tensor | None, Tensor | None] = (None, None)  # `present` and `new` of the trace
        for index, layer in enumerate(self.llm.layers):
            if routing is not None:
                x_BSD, now, left = routing.shorten(layer, index, x_BSD, now, context)
                if trace is not None and left is not None:
                    current = trace.choose(index, "router", current, left, gone=True)
            if trace is not None:
                h_BSD = normed(layer.input_layernorm, x_BSD)
                read_BN = attention_rows(layer, h_BSD, now, now.layout.actions).mean(1)[:, now.layout.visual]
                (trace.present[index], trace.new[index]), trace.attention[index] = current, read_BN
            # A traced pass computes every row of every layer.
            before = now.layout.vision
            x_BSD, now, chosen = call(
                self.recompute, self._routed, index, x_BSD, now, context, trace is not None, routing
            )
            if routing is not None and chosen is not None and self._removes(index):
                routing.removed(chosen, before)
            if trace is not None:
                trace.hidden[index] = x_BSD
            if trace is not None and chosen is not None:
                by, gone = ("LFP" if str(index) in self.routers else "router"), self._removes(index)
                current = trace.choose(index, by, current, chosen, gone)
        read_BQD = x_BSD if trace is None else x_BSD[:, self.read_rows(now.layout)]
        return normed(self.llm.norm, self._action_states(read_BQD, context))

    def _routed(
        self,
        index: int,
        x_BSD: Tensor,
        now: Frame,
        context: DecoderContext,
        every_row: bool,
        routing: LayerRouting | None,
    ) -> tuple[Tensor, Frame, Selection | None]:
        """Run layer `index`; return its output, the frame of the output, and the kept vision tokens (None: all)."""
        layer, last = self.llm.layers[index], index == len(self.llm.layers) - 1
        read = self.read_rows if last and not every_row else None
        h_BSD = normed(layer.input_layernorm, x_BSD)
        chosen = None if routing is None else routing.choose(index)
        if chosen is None and str(index) in self.routers:
            count = context.plan[index].process
            chosen = self.routers[str(index)](h_BSD, now.layout, context.summary_B1T, count, now.seen_BN)
        if chosen is None:
            return run_layer(layer, x_BSD, h_BSD, now, rows=read and read(now.layout)), now, None
        frame = context.pruned(chosen, before=now)
        out_BSD = run_layer(
            layer,
            take_rows(x_BSD, chosen.rows),
            take_rows(h_BSD, chosen.rows),
            frame,
            factor_BS1=chosen.factor_BS1,
            scale_values=self.routing.scale == "values",
            rows=read and read(frame.layout),
        )
        if self._removes(index) or read:
            return out_BSD, frame, chosen
        return put_rows(x_BSD, chosen.rows, out_BSD), now, chosen

    def _removes(self, index: int) -> bool:
        """Return whether tokens that this layer does not keep are gone; a token router in a layer only skips it."""
        return self.routing.mode == "drop" and str(index) in self.routers

    def read_rows(self, layout: TokenLayout) -> slice:
        """Return the rows that the last layer has to compute."""
        return slice(layout.state.start, layout.length) if self.shifted else layout.answer

    def _action_states(self, read_BQD: Tensor, context: DecoderContext) -> Tensor:
        layout = context.layout
        if not self.shifted:
            return read_BQD[:, : layout.action]
        # Row 0 is the state token; the words follow. The first action is read from the last word that is not padding.
        before_B1D = read_BQD.gather(1, context.last_word_B11.expand(-1, -1, read_BQD.shape[-1]))
        first = layout.actions.start - layout.state.start
        return torch.cat((before_B1D, read_BQD[:, first : first + layout.action - 1]), dim=1)


class DecoderContext:
    """Mask and rotations of a sequence, also for any smaller number of vision tokens.

    They depend on the instructions only, so that a control loop builds them once per instruction.

    Args:
        decoder: decoder of the sequence.
        layout: layout of the whole sequence.
        text_mask_BT: False on padding.
        gap: number of unused positions after the vision tokens, for tokens that were routed away; negative if vision
            tokens have less than one position each. If it is not 0, pass their positions to the decoder's `forward`.
        plan: the vision tokens of each layer; None: those of LFP alone.
    """

    def __init__(
        self,
        decoder: RoutedDecoder,
        layout: TokenLayout,
        text_mask_BT: Tensor,
        gap: int = 0,
        plan: tuple[LayerTokens, ...] | None = None,
    ) -> None:
        like = decoder.llm.embed_tokens.weight
        self.layout, self.renumber = layout, decoder.routing.position_policy == "renumber"
        self.plan = decoder.plan(layout.vision) if plan is None else plan
        valid_BS = layout.valid(text_mask_BT)
        self.summary_B1T = context_weights(layout, valid_BS, like.dtype)
        self.mask_B1SS = additive(attention_mask(layout, valid_BS, decoder.routing.attention), like.dtype)
        self.text_mask_BT = text_mask_BT
        self.position_BS = layout.positions(valid_BS)
        if gap:
            self.position_BS[:, layout.rest] += gap
        word_T = torch.arange(1, layout.text + 1, device=like.device)
        self.last_word_B11 = (text_mask_BT * word_T).amax(1)[:, None, None]
        # Rotations of all positions of the sequence, for all layers.
        positions_1S = torch.arange(layout.length + max(gap, 0), device=like.device)[None]
        self._rotary = lambda position_BN: joined_turn(*decoder.llm.rotary_emb(like, position_BN))
        self.turn_SU = self._rotary(positions_1S)[0]
        self.whole = self._numbered(layout, 0, self.mask_B1SS)
        self._masks: dict[int, Tensor] = {}

    def placed(self, position_BN: Tensor) -> Frame:
        """Return the frame of the whole sequence, with vision tokens at these positions (may be fractions)."""
        turn_BSU, layout = self.whole.turn_BSU, self.layout
        vision_BNU = self._rotary(position_BN)
        turn_BSU = torch.cat((turn_BSU[:, layout.bos], vision_BNU, turn_BSU[:, layout.rest]), dim=1)
        return Frame(layout, self.mask_B1SS, turn_BSU)

    def pruned(self, chosen: Selection, before: Frame, renumber: bool = False) -> Frame:
        """Return the frame of the tokens chosen from `before`."""
        # All vision tokens have equal mask rows and follow bos, so the mask without some of them is the mask without
        # the first rows.
        fewer = self.layout.vision - chosen.layout.vision
        if fewer not in self._masks:
            self._masks[fewer] = self.mask_B1SS[:, :, fewer:, fewer:].contiguous()
        if self.renumber or renumber:
            frame = self._numbered(chosen.layout, fewer, self._masks[fewer])
        else:
            frame = Frame(chosen.layout, self._masks[fewer], take_rows(before.turn_BSU, chosen.rows))
        return frame if before.seen_BN is None else frame.hiding(before.seen_BN.gather(1, chosen.kept_Bn))

    def _numbered(self, layout: TokenLayout, fewer: int, mask_B1SS: Tensor) -> Frame:
        position_BS = self.position_BS[:, fewer:] - fewer
        return Frame(layout, mask_B1SS, self.turn_SU[position_BS])
