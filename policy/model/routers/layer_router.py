"""Token routers in the layers of the language model: implements `policy.model.language.LayerRouting`.

The vision tokens of all views form one sequence here and compete with each other.

Shape legend: B batch, S sequence, T text tokens, N vision tokens now, n of them kept, D width, C width of attention
keys, h heads, g key/value heads, e head width, P tokens as they leave the towers, F width of these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cogvla.policy.model.language import LayerContext
from cogvla.policy.model.language_layer import Frame, attention_rows, normed
from cogvla.policy.model.routers.memory import TokenMemory
from cogvla.routing.draws import child
from cogvla.routing.pruning import Selection, put_rows, rows_of
from cogvla.routing.router import RoutedTokens, RouterContext, TokenRouter

OF_WORDS = frozenset({"text_attention_BN", "text_match_BN"})
FROM_ATTENTION = OF_WORDS | {"attention_LBN", "received_BN", "attention_BNN", "keys_BNC", "growth_BN", "share_B2"}
FROM_NEURONS = frozenset({"neurons_BNI", "text_neurons_BTI"})
"""Items of `RouterContext` that are computed from a layer's queries and keys, and from its MLP."""
FROM_TOWERS = frozenset({"patches_BPF", "owner_BP"})
"""Items of `RouterContext` that come from the vision towers, past the language model."""
FROM_LANGUAGE = FROM_ATTENTION | FROM_NEURONS | FROM_TOWERS | {"draw_B", "text_BTE", "score_BN"}
"""Items of `RouterContext` that a language layer can provide."""


class LayerPass:
    """Routes the vision tokens of one forward pass.

    Args:
        routers: layer -> router and the number of tokens that it keeps, or all if they are fewer.
        bypass: True: tokens that are not kept skip the layer; False: they are removed.
        compact: renumber the positions after tokens are removed.
        draw_B: seeds of the first of these layers; those of the others are derived from them.
        score_BN: scores from the router before the language model; None: no scores.
        training: see `RouterContext`.
        timer: context manager that times the work of the routers.
        towers: `patches_BPF` and `owner_BP` of `RouterContext`; None if no router needs them.
        guide_BN: see `RouterContext`; None outside of training.
        memory: follows what routers remember; None: they remember nothing.

    Attributes:
        losses: auxiliary losses of the routers, by name and layer.
        chosen: layer -> tokens that it processes, if the others skip it.
    """

    def __init__(
        self,
        routers: Mapping[int, tuple[TokenRouter, int]],
        bypass: bool,
        compact: bool,
        draw_B: Tensor,
        score_BN: Tensor | None,
        training: bool,
        timer: AbstractContextManager[Any] | None = None,
        towers: tuple[Tensor, Tensor] | None = None,
        guide_BN: Tensor | None = None,
        memory: TokenMemory | None = None,
    ) -> None:
        self.memory = memory
        self.timer, self.guide_BN = timer or nullcontext(), guide_BN
        self.towers = towers
        self.routers, self.bypass, self.compact = routers, bypass, compact
        self.draw_B, self.score_BN, self.training = draw_B, score_BN, training
        self.losses: dict[str, Tensor] = {}
        self.chosen: dict[int, Selection] = {}
        self.earlier_BN: Tensor | None = None  # attention in the previous layer

    def shorten(
        self, layer: Any, index: int, x_BSD: Tensor, now: Frame, context: LayerContext
    ) -> tuple[Tensor, Frame, Selection | None]:
        left = None
        with self.timer:
            if index in self.routers:
                x_BSD, now, left = self._routed(layer, index, x_BSD, now, context)
            if self.memory is not None and self.memory.watched == index:
                self.memory.read(_read(layer, normed(layer.input_layernorm, x_BSD), now))
            after = self.routers.get(index + 1)
            if after is not None and "growth_BN" in after[0].needs:
                self.earlier_BN = _read(layer, normed(layer.input_layernorm, x_BSD), now)
        return x_BSD, now, left

    def _routed(
        self, layer: Any, index: int, x_BSD: Tensor, now: Frame, context: LayerContext
    ) -> tuple[Tensor, Frame, Selection | None]:
        """Return the sequence without the removed tokens, its frame, and those that stay, by their places.

        If the others skip the layer, all tokens are there, and `choose` returns those that it processes.
        """
        routed = self._route(layer, index, x_BSD, normed(layer.input_layernorm, x_BSD), now, context)
        place_Bn, layout = routed.rows, now.layout
        fewer = layout.with_vision(place_Bn.shape[1])
        chosen = Selection(place_Bn, rows_of(layout, place_Bn), fewer, score_BN=routed.score_BN, routed=routed)
        if self.bypass:
            assert routed.mask_Bn is None, "a router that hides tokens says so: `hides = True`"
            self.chosen[index] = chosen
            if not self.training:  # the kept tokens are the same to the bit
                return x_BSD, now, None
        shorter_BSD = torch.cat((x_BSD[:, layout.bos], routed.tokens_BnD, x_BSD[:, layout.rest]), dim=1)
        if self.bypass:  # the router learns through the tokens that it kept
            return put_rows(x_BSD, chosen.rows, shorter_BSD), now, None
        self._follow(routed.index_Bn, place_Bn, layout.vision)
        frame = context.pruned(chosen, before=now, renumber=self.compact)
        return shorter_BSD, frame if routed.mask_Bn is None else frame.hiding(routed.mask_Bn), chosen

    def choose(self, index: int) -> Selection | None:
        return self.chosen.get(index)

    def removed(self, chosen: Selection, tokens: int) -> None:
        self._follow(chosen.kept_Bn, chosen.kept_Bn, tokens)

    def _follow(self, index_Bn: Tensor, place_Bn: Tensor, tokens: int) -> None:
        """Keep what is known of those of the `tokens` that stay; `index_Bn` is -1 for new ones."""
        if self.memory is not None:
            self.memory.keep(index_Bn)
        if self.score_BN is not None:
            self.score_BN = self.score_BN.gather(1, place_Bn)
        if self.earlier_BN is not None:
            self.earlier_BN = self.earlier_BN.gather(1, place_Bn)
        if self.towers is not None:
            self.towers = self.towers[0], renumbered(self.towers[1], place_Bn, tokens)

    def _route(
        self, layer: Any, index: int, x_BSD: Tensor, h_BSD: Tensor, now: Frame, context: LayerContext
    ) -> RoutedTokens:
        router, most = self.routers[index]
        tokens_BND = x_BSD[:, now.layout.visual]
        if not now.layout.vision:
            none_B0 = torch.zeros(tokens_BND.shape[:2], dtype=torch.int64, device=x_BSD.device)
            return RoutedTokens(tokens_BND, none_B0, none_B0)
        items = language_items(router.needs, layer, x_BSD, h_BSD, now, context)
        if "text_BTE" in items:
            items["text_mask_BT"] = context.text_mask_BT
        if self.memory is not None and router.remembers:
            items |= self.memory.items(router.needs, router.remembers)
        if "score_BN" in router.needs:
            items["score_BN"] = self.score_BN
        if "growth_BN" in router.needs:
            read_BN = _read(layer, h_BSD, now)
            items["growth_BN"] = read_BN if self.earlier_BN is None else read_BN - self.earlier_BN
        if FROM_TOWERS & router.needs:
            assert self.towers is not None
            items["patches_BPF"], items["owner_BP"] = self.towers
        later = index - min(self.routers)  # every layer draws anew, and other than the views before the language model
        draw_B = child(self.draw_B, -later) if later else self.draw_B
        items |= {"draw_B": draw_B, "guide_BN": None if router.guide_layer is None else self.guide_BN}
        budget = min(most, now.layout.vision)
        routed: RoutedTokens = router(tokens_BND, RouterContext(budget, self.training, **items))
        self.losses |= {f"{name}_layer{index}": value for name, value in routed.losses.items()}
        return routed


def renumbered(owner_BP: Tensor, place_Bn: Tensor, tokens: int) -> Tensor:
    """Return the owners after only these of the `tokens` stayed; -1 for those whose token is gone."""
    if not tokens:
        return owner_BP  # all are gone already
    none_BN = torch.full((len(place_Bn), tokens), -1, device=place_Bn.device)
    number_BN = none_BN.scatter(
        1, place_Bn, torch.arange(place_Bn.shape[1], device=place_Bn.device).expand_as(place_Bn)
    )
    return torch.where(owner_BP < 0, -1, number_BN.gather(1, owner_BP.clamp_min(0)))


def language_items(
    needs: Collection[str], layer: Any, x_BSD: Tensor, h_BSD: Tensor, now: Frame, context: LayerContext
) -> dict[str, Any]:
    """Compute the context items in `needs` from a language layer.

    Args:
        needs: names of `FROM_LANGUAGE`; others are ignored.
        layer: transformers layer.
        x_BSD: input of the layer.
        h_BSD: input after the layer's first norm.
        now: mask and positions of the input.
        context: context of the instructions.
    """
    layout, items = now.layout, {}
    visual, rest = layout.visual, layout.rest
    if "text_BTE" in needs:
        items["text_BTE"] = x_BSD[:, layout.words]
    with torch.no_grad():
        if "attention_LBN" in needs:
            items["attention_LBN"] = _read(layer, h_BSD, now)[None]
        if {"received_BN", "attention_BNN", "share_B2"} & set(needs):
            vision_BNS = attention_rows(layer, h_BSD, now, visual)
            items |= {"received_BN": vision_BNS[..., visual].mean(1), "attention_BNN": vision_BNS[..., visual]}
        if "share_B2" in needs:
            real_BQ = layout.valid(context.text_mask_BT)[:, rest]
            to_vision_BQ = attention_rows(layer, h_BSD, now, rest)[..., visual].sum(-1)
            from_rest_B = (to_vision_BQ * real_BQ).sum(1) / real_BQ.sum(1)
            items["share_B2"] = torch.stack((from_rest_B, vision_BNS[..., rest].sum(-1).mean(1)), dim=1)
        if OF_WORDS & set(needs):
            items |= _of_words(needs, layer, h_BSD, now, context.text_mask_BT)
        if "keys_BNC" in needs:
            head_width = now.turn_BSU.shape[-1] // 2
            keys_BND = layer.self_attn.k_proj(h_BSD[:, visual])
            items["keys_BNC"] = rearrange(keys_BND, "b n (h c) -> b n h c", c=head_width).float().mean(2)
        if FROM_NEURONS & set(needs):
            items |= {
                "neurons_BNI": active_neurons(layer, x_BSD[:, visual]),
                "text_neurons_BTI": active_neurons(layer, x_BSD[:, layout.words]),
            }
    return items


@torch.no_grad()
def _read(layer: Any, h_BSD: Tensor, now: Frame) -> Tensor:
    """Return the attention [B,N] from the action tokens to vision tokens."""
    return attention_rows(layer, h_BSD, now, now.layout.actions).mean(1)[:, now.layout.visual]


def _of_words(needs: Collection[str], layer: Any, h_BSD: Tensor, now: Frame, text_mask_BT: Tensor) -> dict[str, Tensor]:
    """Return what the real words of the instruction look for: attention, or products without rotation."""
    layout, items = now.layout, {}
    share_BT1 = (text_mask_BT / text_mask_BT.sum(1, keepdim=True).clamp_min(1))[..., None].float()
    if "text_attention_BN" in needs:
        rows_BTN = attention_rows(layer, h_BSD, now, layout.words)[..., layout.visual]
        items["text_attention_BN"] = (rows_BTN * share_BT1).sum(1)
    if "text_match_BN" in needs:
        head_width, split = now.turn_BSU.shape[-1] // 2, "b s (h e) -> b h s e"
        q_BhTe = rearrange(layer.self_attn.q_proj(h_BSD[:, layout.words]), split, e=head_width).float()
        k_BgNe = rearrange(layer.self_attn.k_proj(h_BSD[:, layout.visual]), split, e=head_width).float()
        q_Bh1e = (q_BhTe * share_BT1[:, None]).sum(2, keepdim=True)
        k_BhNe = k_BgNe.repeat_interleave(q_BhTe.shape[1] // k_BgNe.shape[1], dim=1)
        items["text_match_BN"] = (k_BhNe * q_Bh1e).sum(-1).mean(1) * head_width**-0.5
    return items


def active_neurons(layer: Any, x_BND: Tensor) -> Tensor:
    """Return which MLP neurons are positive for these tokens, bool [B,N,I]; the layer's attention is skipped."""
    h_BND = normed(layer.post_attention_layernorm, x_BND)
    return layer.mlp.act_fn(layer.mlp.gate_proj(h_BND)) * layer.mlp.up_proj(h_BND) > 0
