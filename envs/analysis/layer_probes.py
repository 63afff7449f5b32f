"""Measure by the change of the actions what the layers of the language model take from vision tokens.

- `horizon`: some or all of the tokens are removed before a layer (information horizon);
- `injection`: the tokens skip the first layers, and enter at a later one as they leave the projector (EmbedLens);
- `single_tokens`: all tokens but one are removed before a layer.

The papers use the probability of the right answer. Here the answer with all tokens counts as right: p = exp(-change of
the normalised actions).

Shape legend: B samples, N vision tokens, n kept, L language layers, S sequence, T text tokens, D width, K chunk,
A action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogvla.envs.analysis.routing_recording import Moment
from cogvla.policy.model.cogvla import CogVLA, ModelInput, TextFeatures
from cogvla.policy.model.language import DecoderContext, LayerContext
from cogvla.policy.model.language_layer import Frame
from cogvla.policy.model.routers.layer_router import LayerPass
from cogvla.policy.model.routers.policy_router import Routed
from cogvla.routing.diagnostics import information, information_horizon
from cogvla.routing.draws import seeds_of, uniform
from cogvla.routing.pruning import Selection, rows_of, take_rows
from cogvla.routing.router import RouterSizes, count_of
from cogvla.routing.routers.carried import Carried
from cogvla.routing.selection import best

SHARES = (0.0, 0.1, 0.25, 0.5)
"""Shares of the vision tokens, drawn at random, that stay for `horizon`."""
TELLING = 0.05
"""A token tells something if its information is above this share of what all tokens tell the first layer."""


@torch.inference_mode()
def horizon(model: CogVLA, moments: Sequence[Moment]) -> dict[str, Any]:
    """Measure the change of the actions if vision tokens are removed before a layer, and find the horizon.

    The horizon is the first layer from which on the change is small if all of them are removed. The removed tokens of
    the other shares are drawn at random.
    """
    layers = range(model.config.language.layers)
    changes = {share: torch.zeros(len(layers)) for share in SHARES}
    for moment in moments:
        whole_BKA = model(moment.inputs).actions
        for share, change_L in changes.items():
            for layer in layers:
                fewer_BKA = keeping(model, moment.inputs, layer, share)
                change_L[layer] += float((fewer_BKA - whole_BKA).abs().mean()) / len(moments)
    information_L = information(changes[0.0])
    return {
        "action_change": changes[0.0].tolist(),
        "information": information_L.tolist(),
        "by_share": {f"{share:.0%} kept": information(change_L).tolist() for share, change_L in changes.items()},
        "horizon": information_horizon(information_L),
        "layers": len(layers),
    }


def keeping(model: CogVLA, inputs: ModelInput, layer: int, share: float) -> Tensor:
    """Return the normalised actions [B,K,A] if this share of the vision tokens, at random, stays from a layer on.

    The policy's own routers choose among them.
    """
    router = model.router
    text = model.encode_text(inputs.text_ids, inputs.text_mask, dense=inputs.dense)
    if router is None:
        routed = Routed(model.vision(inputs.pixels, text.vision))
    else:
        routed = model.route(router, inputs, text)[1]
    views = len(model.embodiment.cameras)
    count = views * count_of(share, model.vision.tokens // views) if share else 0
    compact = router is not None and router.config.position == "compact"
    draw_B = seeds_of(inputs.state, 0 if router is None else router.config.seed)
    fewer: Any = _Fewer(routed.layers, text.context, layer, count, compact, draw_B)
    routed = replace(routed, layers=fewer, memory=None)
    return model.decide(routed.vision_BnD, inputs.state, text, routed=routed, committed=inputs.committed).actions


class _Fewer:
    """Random vision tokens are removed before one layer; implements `policy.model.language.LayerRouting`.

    Args:
        own: the policy's routers in the language model; None: it has none.
        context: context of the instructions; its plan is changed to the tokens that are left.
        layer: the layer.
        count: number of tokens that stay, or all if they are fewer.
        compact: renumber the positions.
        draw_B: seeds of the draw.
    """

    def __init__(
        self, own: LayerPass | None, context: DecoderContext, layer: int, count: int, compact: bool, draw_B: Tensor
    ) -> None:
        self.own, self.context, self.layer, self.count = own, context, layer, count
        self.compact, self.draw_B = compact, draw_B
        self.losses: dict[str, Tensor] = {} if own is None else own.losses

    def shorten(
        self, layer: Any, index: int, x_BSD: Tensor, now: Frame, context: LayerContext
    ) -> tuple[Tensor, Frame, Selection | None]:
        if index == self.layer:
            tokens = now.layout.vision
            kept_Bn = best(uniform(self.draw_B, tokens), min(self.count, tokens))
            chosen = Selection(kept_Bn, rows_of(now.layout, kept_Bn), now.layout.with_vision(kept_Bn.shape[1]))
            x_BSD, now = take_rows(x_BSD, chosen.rows), context.pruned(chosen, before=now, renumber=self.compact)
            self.removed(chosen, tokens)
        if self.own is not None:
            x_BSD, now, _ = self.own.shorten(layer, index, x_BSD, now, context)
        plan = list(self.context.plan)
        plan[index] = replace(plan[index], process=min(plan[index].process, now.layout.vision))
        self.context.plan = tuple(plan)
        return x_BSD, now, None

    def choose(self, index: int) -> Selection | None:
        return None if self.own is None else self.own.choose(index)

    def removed(self, chosen: Selection, tokens: int) -> None:
        if self.own is not None:
            self.own.removed(chosen, tokens)


class _Injected(LayerPass):
    """Vision tokens skip all layers before one."""

    def __init__(self, layer: int, draw_B: Tensor) -> None:
        super().__init__({}, True, False, draw_B, None, False)
        self.layer = layer

    def shorten(
        self, layer: Any, index: int, x_BSD: Tensor, now: Frame, context: LayerContext
    ) -> tuple[Tensor, Frame, Selection | None]:
        if index < self.layer:
            none_B0 = torch.zeros(len(x_BSD), 0, dtype=torch.int64, device=x_BSD.device)
            self.chosen[index] = Selection(none_B0, rows_of(now.layout, none_B0), now.layout.with_vision(0))
        return x_BSD, now, None


@torch.inference_mode()
def injection(model: CogVLA, moments: Sequence[Moment]) -> list[float] | None:
    """Return the change of the actions [L] if the vision tokens enter at each layer only; 0 at the first layer.

    None for a policy with a token router, or one that removes tokens in its layers (LFP with mode=drop).
    """
    if model.router is not None or (model.config.routing.lfp and model.config.routing.mode == "drop"):
        return None
    layers = range(model.config.language.layers)
    changes = torch.zeros(len(layers))
    for moment in moments:
        text, vision_BND = _seen(model, moment)
        whole_BKA = model.decide(vision_BND, moment.inputs.state, text).actions
        for layer in layers:
            draw_B = torch.zeros(len(vision_BND), dtype=torch.int64, device=vision_BND.device)
            late = Routed(vision_BND, layers=_Injected(layer, draw_B))
            late_BKA = model.decide(vision_BND, moment.inputs.state, text, routed=late).actions
            changes[layer] += float((late_BKA - whole_BKA).abs().mean()) / len(moments)
    return changes.tolist()


@torch.inference_mode()
def single_tokens(model: CogVLA, moments: Sequence[Moment]) -> dict[str, list[float]] | None:
    """Measure what each vision token tells each layer: p(all tokens but it are removed) - p(all are removed).

    Returns:
        For each layer the mean over tokens, the largest, and the share of tokens that tell something (`TELLING`). None
        for a policy with a token router.
    """
    if model.router is not None:
        return None
    layers = range(model.config.language.layers)
    told = torch.stack([_told(model, moment) for moment in moments])  # moments, L, N+1
    least = TELLING * told[:, :1, -1:]
    return {
        "mean": [float(told[:, layer, :-1].mean()) for layer in layers],
        "largest": [float(told[:, layer, :-1].amax(-1).mean()) for layer in layers],
        "telling": [float((told[:, layer, :-1] > least[:, 0]).float().mean()) for layer in layers],
    }


def _told(model: CogVLA, moment: Moment) -> Tensor:
    """Return what each token tells each layer, [L,N+1]; last what all tokens tell."""
    text, vision_BND = _seen(model, moment)
    whole_BKA = model.decide(vision_BND, moment.inputs.state, text).actions
    tokens = vision_BND.shape[1]
    rows = []
    for layer in range(model.config.language.layers):
        none_1KA = keeping(model, moment.inputs, layer, 0.0)
        ids_1T, mask_1T = moment.inputs.text_ids, moment.inputs.text_mask
        many = model.encode_text(ids_1T.expand(tokens, *ids_1T.shape[1:]), mask_1T.expand(tokens, -1))
        many.context.plan = model.decoder.plan(tokens, {layer: 1})
        router = Carried(RouterSizes(tokens, model.width, model.width, None, 1)).eval()
        score_NN = torch.eye(tokens, device=vision_BND.device)  # sample k keeps token k
        draw_N = torch.zeros(tokens, dtype=torch.int64, device=vision_BND.device)
        only = LayerPass({layer: (router, 1)}, False, False, draw_N, score_NN, False)
        seen_NND = vision_BND.expand(tokens, -1, -1)
        state_NS = moment.inputs.state.expand(tokens, -1)
        one_NKA = model.decide(seen_NND, state_NS, many, routed=Routed(seen_NND, layers=only)).actions
        p_N, p_none = (torch.exp(-(x - whole_BKA).abs().flatten(1).mean(1)) for x in (one_NKA, none_1KA))
        rows.append(torch.cat((p_N - p_none, 1 - p_none)))
    return torch.stack(rows).cpu()


def _seen(model: CogVLA, moment: Moment) -> tuple[TextFeatures, Tensor]:
    text = model.encode_text(moment.inputs.text_ids, moment.inputs.text_mask)
    return text, model.vision(moment.inputs.pixels, text.vision)
