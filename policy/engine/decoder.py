"""The routed decoder (stages 2 and 3) as a function of tensors, with fused operations and static shapes.

Tests check that it computes the same as `policy.model.language.RoutedDecoder`. Differences:
- RMSNorm weights are folded into the linear layers after them; q, k and v are one layer, gate and up another
- the router's modulation and its two logits are folded into one vector, so that a score is a single product
- masks, rotations and row numbers are computed once per instruction and passed as tensors
- token routers read copies of what they need of their layers

Shape legend: B batch, S sequence, N vision tokens, n of them kept, J action tokens, Q query rows, D width,
h heads, g key/value heads, e head width, U = 2e, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.engine.linear import FusedLinear, fused
from cogvla.policy.engine.recording import Tensors
from cogvla.policy.model.language import DecoderContext, LayerRouting, RoutedDecoder
from cogvla.policy.model.language_layer import Frame, joined_turn
from cogvla.policy.model.routers.layer_router import FROM_ATTENTION, FROM_NEURONS
from cogvla.policy.model.routers.policy_router import PolicyRouter
from cogvla.routing.layer_plan import LayerTokens
from cogvla.routing.layout import TokenLayout
from cogvla.routing.pruning import FiLMRouter, Selection, put_rows, take_rows


class FusedRouter(nn.Module):
    """`FiLMRouter` for tokens that are normalised without the norm's weight.

    The score of a token h is `d . (w h (1 + scale) + shift)`, where d is the difference of the two logits' weights and
    w the norm's weight. This is computed as `g . h + c` with g = d w (1 + scale) and c = d . shift, which depend on
    state and text only.
    """

    def __init__(self, router: FiLMRouter, gain_D: Tensor) -> None:
        super().__init__()
        dtype = router.logits.weight.dtype
        gain_D = gain_D.detach().float()
        difference_D = (router.logits.weight[1] - router.logits.weight[0]).detach().float()
        constant = (router.logits.bias[1] - router.logits.bias[0]).detach().float()
        scale, shift = cast(Any, router.scale), cast(Any, router.shift)  # linear, GELU, linear
        (scale_in, _, scale_out), (shift_in, _, shift_out) = scale, shift
        self.hidden = fused([scale_in, shift_in], gain_I=gain_D)
        reach_D = difference_D * gain_D
        to_gain_DI = reach_D[:, None] * scale_out.weight.detach().float()
        to_constant_1I = difference_D[None] @ shift_out.weight.detach().float()
        weight_OI = torch.block_diag(to_gain_DI, to_constant_1I)
        to_gain_D = reach_D * (1 + scale_out.bias.detach().float())
        to_constant_1 = (difference_D @ shift_out.bias.detach().float() + constant)[None]
        self.score = FusedLinear(weight_OI, torch.cat((to_gain_D, to_constant_1)), dtype)
        self.score_all = router.score_all
        self.plain = FusedLinear(reach_D[None], constant[None], dtype)

    def forward(
        self, h_BSD: Tensor, layout: TokenLayout, summary_B1T: Tensor, count: int, seen_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose vision tokens; return their indices, ascending int64 [B,n], and the factors [B,S',1] of kept rows."""
        width = h_BSD.shape[-1]
        reading_BO1 = self.score(F.gelu(self.hidden(summary_B1T @ h_BSD[:, layout.context]))).mT
        score_BN = torch.baddbmm(reading_BO1[:, width:], h_BSD[:, layout.visual], reading_BO1[:, :width])[..., 0]
        if seen_BN is not None:
            score_BN = score_BN.masked_fill(~seen_BN, float("-inf"))
        top_Bn, kept_Bn = score_BN.topk(count, dim=1, sorted=False)
        kept_Bn, order_Bn = kept_Bn.sort(dim=1)
        probability_Bn1 = top_Bn.gather(1, order_Bn).sigmoid()[..., None]
        if self.score_all:
            bos_B11, rest_BR1 = (self.plain(h_BSD[:, part]).sigmoid() for part in (layout.bos, layout.rest))
            return kept_Bn, torch.cat((bos_B11, probability_Bn1, rest_BR1), dim=1)
        return kept_Bn, F.pad(probability_Bn1, (0, 0, 1, layout.length - layout.rest.start), value=1.0)


class FusedLayer(nn.Module):
    """One transformer layer.

    Args:
        layer: transformers layer; its weights are copied.
        router: router of this layer; None: not routed.
        scale_values: multiply the attention's values by the router's factor, too.
    """

    def __init__(self, layer: Any, router: FiLMRouter | None, scale_values: bool) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        self.eps = before.variance_epsilon
        self.head_width: int = attention.head_dim
        self.heads, self.groups = (p.out_features // self.head_width for p in (attention.q_proj, attention.k_proj))
        self.qkv = fused([attention.q_proj, attention.k_proj, attention.v_proj], gain_I=before.weight)
        self.output = fused([attention.o_proj])
        self.gate_up = fused([mlp.gate_proj, mlp.up_proj], gain_I=after.weight)
        self.down = fused([mlp.down_proj])
        self.router = None if router is None else FusedRouter(router, before.weight)
        self.scale_values = scale_values

    def forward(
        self, x_BSD: Tensor, h_BSD: Tensor, mask_B1SS: Tensor, turn_BSU: Tensor, factor_BS1: Tensor | None, first: int
    ) -> Tensor:
        """Compute the rows from `first` on of the layer's output; `h` is `x` divided by its root mean square."""
        width = h_BSD.shape[-1]
        turning = (self.heads + self.groups) * self.head_width
        qkv_BSO = self.qkv(h_BSD)
        v_BSD = qkv_BSO[..., turning:]
        if self.scale_values and factor_BS1 is not None:
            v_BSD = v_BSD * factor_BS1
        qk_BShe = qkv_BSO[..., :turning].unflatten(-1, (-1, self.head_width))
        cos_BS1e, sin_BS1e = turn_BSU[:, :, None].chunk(2, dim=-1)
        qk_BShe = torch.addcmul(qk_BShe * cos_BS1e, qk_BShe.roll(self.head_width // 2, dims=-1), sin_BS1e)
        q_BhQe, k_BgSe = qk_BShe.transpose(1, 2).split((self.heads, self.groups), dim=1)
        v_BgSe = v_BSD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        if self.groups != self.heads:
            k_BgSe, v_BgSe = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k_BgSe, v_BgSe))
        if first:
            q_BhQe, mask_B1SS, x_BSD = q_BhQe[:, :, first:], mask_B1SS[:, :, first:], x_BSD[:, first:]
            factor_BS1 = None if factor_BS1 is None else factor_BS1[:, first:]
        o_BhQe = F.scaled_dot_product_attention(q_BhQe, k_BgSe, v_BgSe, attn_mask=mask_B1SS)
        x_BQD = x_BSD + self.output(rearrange(o_BhQe, "b h q e -> b q (h e)"))
        gate_BQI, up_BQI = self.gate_up(F.rms_norm(x_BQD, (width,), eps=self.eps)).chunk(2, dim=-1)
        out_BQD = self.down(F.silu(gate_BQI) * up_BQI)
        return x_BQD + out_BQD if factor_BS1 is None else torch.addcmul(x_BQD, out_BQD, factor_BS1)


class FusedDecoder(nn.Module):
    """`RoutedDecoder` with fused layers: a sequence [B,S,D] in, one state per action token [B,J,D] out.

    Args:
        decoder: decoder to copy; its layers must be Llama's or Qwen2's with plain linear layers.
        plan: vision tokens of each layer.
        action_tokens: J.
        router: token routers of the policy; None: none.
        release: free each layer of `decoder` as soon as it is copied.
    """

    final_gain: Tensor

    def __init__(
        self,
        decoder: RoutedDecoder,
        plan: tuple[LayerTokens, ...],
        action_tokens: int,
        router: PolicyRouter | None = None,
        release: bool = False,
    ) -> None:
        super().__init__()
        routing = decoder.routing
        self.shifted, self.bypass = decoder.shifted, routing.mode == "bypass"
        self.renumber, self.action_tokens = routing.position_policy == "renumber", action_tokens
        self.rotary = copy.deepcopy(decoder.llm.rotary_emb)
        self._take_router(decoder, plan, router)
        self.layers = nn.ModuleList()
        for index, (layer, ratio) in enumerate(zip(decoder.llm.layers, decoder.ratios, strict=True)):
            film = None if ratio is None else decoder.routers[str(index)]
            assert film is None or isinstance(film, FiLMRouter)
            self.layers.append(FusedLayer(layer, film, routing.scale == "values"))
            if release:
                layer.to("meta")
        self.eps = decoder.llm.norm.variance_epsilon
        self.register_buffer("final_gain", decoder.llm.norm.weight.detach().clone(), persistent=False)

    def _take_router(self, decoder: RoutedDecoder, plan: tuple[LayerTokens, ...], router: PolicyRouter | None) -> None:
        self.plan, self.vision_tokens = plan, plan[0].arrive
        self.compact = self.renumber or (router is not None and router.config.position == "compact")
        needs = {} if router is None else router.needed_of_layers()
        layers = decoder.llm.layers
        self.read = nn.ModuleDict({str(index): _readable(layers[index], needs[index]) for index in sorted(needs)})

    def with_router(
        self, decoder: RoutedDecoder, plan: tuple[LayerTokens, ...], router: PolicyRouter | None
    ) -> FusedDecoder:
        """Return the same decoder for other token routers; `decoder` is the one that was copied, not released."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._take_router(decoder, plan, router)
        return other

    def with_plan(self, plan: tuple[LayerTokens, ...]) -> FusedDecoder:
        """Return the same decoder for another plan; all weights are shared."""
        other = copy.copy(self)
        other.plan, other.vision_tokens = plan, plan[0].arrive
        return other

    def prepare(self, context: DecoderContext) -> dict[str, Tensor]:
        """Compute masks, rotations and row numbers for these instructions, by name."""
        layout, position_BS = context.layout, context.position_BS
        batch, device = len(position_BS), position_BS.device
        tensors = {
            "text_mask": context.text_mask_BT,
            "summary": context.summary_B1T,
            "last_word": context.last_word_B11,
            "turn": context.turn_SU[position_BS],
        }
        for count in {count for tokens in self.plan for count in (tokens.arrive, tokens.enter, tokens.process)}:
            fewer, pruned = layout.vision - count, layout.with_vision(count)
            tensors[f"mask{count}"] = context.mask_B1SS[:, :, fewer:, fewer:].contiguous()
            row_BS = torch.arange(batch * pruned.length, device=device).view(batch, -1)
            tensors[f"bos{count}"], tensors[f"rest{count}"] = row_BS[:, pruned.bos], row_BS[:, pruned.rest]
            if self.compact and fewer:
                tensors[f"turn{count}"] = context.turn_SU[position_BS[:, fewer:] - fewer]
        return tensors

    def forward(
        self,
        x_BSD: Tensor,
        text: Tensors,
        position_BN: Tensor | None = None,
        routing: LayerRouting | None = None,
    ) -> Tensor:
        """Compute the states [B,J,D] of the action tokens.

        Args:
            x_BSD: embeddings of the sequence.
            text: result of `prepare` for these instructions.
            position_BN: see `RoutedDecoder.forward`.
            routing: see `RoutedDecoder.forward`.
        """
        words = x_BSD.shape[1] - TokenLayout(self.vision_tokens, 0, self.action_tokens).length
        layout = TokenLayout(self.vision_tokens, words, self.action_tokens)
        context = _Context(text, layout, self.renumber)
        now = Frame(layout, text[f"mask{layout.vision}"], self._turn(x_BSD, text["turn"], layout, position_BN))
        width, last = x_BSD.shape[-1], len(self.layers) - 1
        for index, (layer, tokens) in enumerate(zip(self.layers, self.plan, strict=True)):
            assert isinstance(layer, FusedLayer)
            chosen = None
            if routing is not None and str(index) in self.read:
                read = self.read[str(index)]
                x_BSD, now, _ = routing.shorten(read, index, x_BSD, now, context)
                chosen = routing.choose(index)
            h_BSD = F.rms_norm(x_BSD, (width,), eps=layer.eps)
            if layer.router is not None:
                kept_Bn, factor_BS1 = layer.router(h_BSD, now.layout, text["summary"], tokens.process, now.seen_BN)
                rows = context.rows(now.layout, kept_Bn)
                chosen = Selection(kept_Bn, rows, now.layout.with_vision(tokens.process), factor_BS1)
            if chosen is None:
                first = self.first_read(now.layout) if index == last else 0
                x_BSD = layer(x_BSD, h_BSD, now.mask_B1SS, now.turn_BSU, None, first)
                continue
            frame = context.pruned(chosen, before=now)
            first = self.first_read(frame.layout) if index == last else 0
            x_BnD, h_BnD = take_rows(x_BSD, chosen.rows), take_rows(h_BSD, chosen.rows)
            out_BSD = layer(x_BnD, h_BnD, frame.mask_B1SS, frame.turn_BSU, chosen.factor_BS1, first)
            if index == last or (layer.router is not None and not self.bypass):
                if routing is not None:
                    routing.removed(chosen, now.layout.vision)
                x_BSD, now = out_BSD, frame
            else:
                x_BSD = put_rows(x_BSD, chosen.rows, out_BSD)
        return F.rms_norm(self._read(x_BSD, text, words), (width,), self.final_gain, self.eps)

    def first_read(self, layout: TokenLayout) -> int:
        """Return the first row that the last layer has to compute."""
        return layout.state.start if self.shifted else layout.answer.start

    def _turn(self, x_BSD: Tensor, turn_BSU: Tensor, layout: TokenLayout, position_BN: Tensor | None) -> Tensor:
        """Return the rotations of the whole sequence, with vision tokens at these positions."""
        if position_BN is None:
            return turn_BSU
        vision_BNU = joined_turn(*self.rotary(x_BSD, position_BN))
        return torch.cat((turn_BSU[:, layout.bos], vision_BNU, turn_BSU[:, layout.rest]), dim=1)

    def _read(self, x_BQD: Tensor, text: Tensors, words: int) -> Tensor:
        if not self.shifted:
            return x_BQD[:, : self.action_tokens]
        before_B1D = x_BQD.gather(1, text["last_word"].expand(-1, -1, x_BQD.shape[-1]))
        first = 1 + words
        return torch.cat((before_B1D, x_BQD[:, first : first + self.action_tokens - 1]), dim=1)


class _Context:
    """`DecoderContext` of tensors that `FusedDecoder.prepare` computed."""

    def __init__(self, text: Tensors, layout: TokenLayout, renumber: bool) -> None:
        self._text, self._vision, self._renumber = text, layout.vision, renumber
        self.text_mask_BT = text["text_mask"]

    def rows(self, layout: TokenLayout, kept_Bn: Tensor) -> Tensor:
        """Return the rows of the flattened batch that remain if only these vision tokens are kept."""
        bos_B1 = self._text[f"bos{layout.vision}"]
        return torch.cat((bos_B1, kept_Bn + (bos_B1 + 1), self._text[f"rest{layout.vision}"]), dim=1).flatten()

    def pruned(self, chosen: Selection, before: Frame, renumber: bool = False) -> Frame:
        """Return the frame of the tokens chosen from `before`."""
        count = chosen.layout.vision
        if (self._renumber or renumber) and count < self._vision:
            turn_BSU = self._text[f"turn{count}"]
        else:
            turn_BSU = take_rows(before.turn_BSU, chosen.rows)
        frame = Frame(chosen.layout, self._text[f"mask{count}"], turn_BSU)
        return frame if before.seen_BN is None else frame.hiding(before.seen_BN.gather(1, chosen.kept_Bn))


def _readable(layer: Any, needs: Collection[str]) -> nn.Module:
    """Return a copy of those parts of a transformers layer that a router with these needs reads."""
    part = nn.Module()
    part.input_layernorm = layer.input_layernorm
    if FROM_ATTENTION & set(needs):
        part.self_attn = nn.Module()
        part.self_attn.q_proj, part.self_attn.k_proj = layer.self_attn.q_proj, layer.self_attn.k_proj
    if FROM_NEURONS & set(needs):
        part.post_attention_layernorm, part.mlp = layer.post_attention_layernorm, nn.Module()
        part.mlp.gate_proj, part.mlp.up_proj, part.mlp.act_fn = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.act_fn
    return copy.deepcopy(part).requires_grad_(False)
