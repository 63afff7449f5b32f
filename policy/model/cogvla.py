"""The CogVLA network, with instruction-driven routing and sparsification: pixels to a chunk of actions in one pass.

Shape legend: B batch, V views, M aggregation tokens per view, N = V*M, T text tokens, S state dimension, K chunk,
A action dimension, J action tokens, D language width, O earlier decisions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.heads.committed import CommittedInput, CommittedTokens
from cogvla.policy.model.heads.interface import HeadSizes, decoded
from cogvla.policy.model.heads.registry import HEADS
from cogvla.policy.model.language import DecoderContext, DecoderTrace, RoutedDecoder
from cogvla.policy.model.routers.memory import Memory
from cogvla.policy.model.routers.policy_router import PolicyRouter, Routed
from cogvla.policy.model.text_projection import TextProjection
from cogvla.policy.model.vision import DualVision, Observer, VisionCondition
from cogvla.routing.aggregation import two_layer
from cogvla.routing.layer_plan import LayerTokens
from cogvla.routing.layout import TokenLayout
from cogvla.routing.router import RouterConfig
from cogvla.routing.word_order import WordOrder


@dataclass(frozen=True)
class Past:
    """Earlier observations of an episode, the oldest first.

    Attributes:
        pixels: [B,O,V,3,H,W], as in `ModelInput`.
        state: [B,O,S], normalised.
        age: number of them that belong to the episode, the last ones, int64 [B].
    """

    pixels: Tensor
    state: Tensor
    age: Tensor

    def to(self, device: torch.device | str) -> Past:
        return Past(self.pixels.to(device), self.state.to(device), self.age.to(device))


@dataclass(frozen=True)
class ModelInput:
    """The input of the network.

    Attributes:
        pixels: [B,V,3,H,W], uint8, or float in [0,1].
        text_ids: int64 [B,T], without bos and stop; with a text encoder its states, float [B,T,E].
        text_mask: bool [B,T], False on padding.
        state: float [B,S], normalised.
        draw: random seeds int64 [B,2] of token routers in training: one per sample, and one that all samples of a step
            share; None outside of training.
        memory: what token routers remember of earlier decisions, see `policy.model.routers.memory`; None: nothing.
        past: earlier observations of the same episode, from which the memory is computed, for training; None: none.
        dense: keep all vision tokens, as if there were no token routers (they still remember).
        committed: actions that will be executed until the chunk is there; None: none. For policies that read them
            (`CogVLA.reads_committed`); others ignore them.
    """

    pixels: Tensor
    text_ids: Tensor
    text_mask: Tensor
    state: Tensor
    draw: Tensor | None = None
    memory: Memory | None = None
    past: Past | None = None
    dense: bool = False
    committed: CommittedInput | None = None

    def to(self, device: torch.device | str) -> ModelInput:
        def there(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: tensor.to(device) for name, tensor in value.items()}
            return value.to(device) if hasattr(value, "to") else value

        return ModelInput(**{f.name: there(getattr(self, f.name)) for f in fields(self)})

    def rows(self, index_b: Tensor) -> ModelInput:
        """Return the samples with these indices; `past` must be None."""
        assert self.past is None, "only training gives earlier observations"
        memory = None if self.memory is None else {name: value[index_b] for name, value in self.memory.items()}
        draw = None if self.draw is None else self.draw[index_b]
        committed = None if self.committed is None else self.committed.rows(index_b)
        given = (self.pixels[index_b], self.text_ids[index_b], self.text_mask[index_b], self.state[index_b])
        return ModelInput(*given, draw=draw, memory=memory, dense=self.dense, committed=committed)


@dataclass(frozen=True)
class ModelOutput:
    """The output of the network.

    Attributes:
        actions: normalised actions [B,K,A]; [B,0,A] if they were not decoded.
        vision: vision tokens [B,N,D] at the input of the language model.
        states: states [B,J,D] of the action tokens, which the head reads.
        debug: intermediate results, if asked for: the fields of `policy.model.language.DecoderTrace`, `layout`,
            `streams` (tower outputs), `stream_weights` [B,2], and `routed`, the result of a token router before the
            language model.
        gaze: if asked for, for each tower the logarithm of the aggregation tokens' attention to patches, [B*V,h,M,P].
        kept: index of each vision token among the towers' tokens, int64 [B,N], -1 for new ones; None: all, in order.
        losses: weighted auxiliary losses of token routers.
        memory: what token routers remember at the next decision; None: nothing.
    """

    actions: Tensor
    vision: Tensor
    states: Tensor
    debug: dict[str, Any] | None = None
    gaze: list[Tensor] | None = None
    kept: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Memory | None = None


@dataclass(frozen=True)
class TextFeatures:
    """All values that depend on the instruction only; they can be reused while it does not change."""

    bos_B1D: Tensor
    tail_BRD: Tensor  # words, action placeholders and stop
    context: DecoderContext
    vision: VisionCondition


class CogVLA(nn.Module):
    """
    ::

        pixels [B,V,3,H,W]          text_ids [B,T]                 state [B,S]
              |                          |                              |
              |            summary e [B,D]: mean, word order            |
              v                          |                              |
        dinov2 | siglip  <- FiLM --------+   M aggregation tokens       |
              |    |                     |   per view and tower         |
              v    v                     |                              v
        w0*P(x) + w1*P(x) <- softmax ----+                          Linear, GELU, Linear
              |                          |                              |
              v                          v                              v
        [ bos | vision N | state | text T | action J | stop ]   <-------+
              |
              v
        Llama layers: a FiLM router keeps the best vision tokens of each layer;
        causal, but actions and stop attend in both directions
              |
              v
        states of the J action tokens -> head -> actions [B,K,A]

    Args:
        config: configuration of the network.
        embodiment: the robot; gives views, image size, S, A and K.

    Raises:
        ValueError: the configuration does not fit the embodiment.
    """

    special_ids: Tensor

    def __init__(self, config: CogVLAConfig, embodiment: Embodiment) -> None:
        super().__init__()
        self.config, self.embodiment = config, embodiment
        self.width = width = config.language.width
        per_step = embodiment.action_dim if config.head.tokens_per_step == "action_dim" else 1
        self.action_tokens = per_step * embodiment.chunk
        self.vision = DualVision(config.vision, config.routing, embodiment, width)
        self.state = two_layer(embodiment.state_dim, width, width)
        self.decoder = RoutedDecoder(config.language, config.routing, config.head.shifted)
        kind, blocks, steps = config.head.kind, config.head.blocks, config.head.steps
        if kind == "discrete" and embodiment.action_normalisation == "mean_std":
            raise ValueError(
                "head.kind=discrete clips normalised actions to [-1, 1], which mean_std can exceed: choose "
                "action_normalisation q99 or min_max in the embodiment, or another head"
            )
        self.head = HEADS[kind](HeadSizes(width, embodiment.chunk, embodiment.action_dim, per_step, blocks, steps))
        self.placeholder: nn.Parameter | None = None
        if config.head.placeholder == "learned":
            self.placeholder = nn.Parameter(torch.randn(self.action_tokens, width))
        self.router = self._build_router()
        # Built last: the other modules then begin with the same random weights with and without it.
        reads = config.routing.summary == "contextual" and (config.routing.efa or config.routing.film)
        self.order = WordOrder(width) if reads else None
        self.text = self._build_text_projection()
        if config.head.prefix >= embodiment.chunk:
            raise ValueError(
                f"head.prefix is {config.head.prefix}, but a chunk has {embodiment.chunk} actions, of which the policy "
                "must decide at least one: lower it"
            )
        self.committed: CommittedTokens | None = None
        if config.head.prefix:
            self.committed = CommittedTokens(embodiment.action_dim, per_step, width)
        ids = torch.tensor([config.language.bos_token, config.language.stop_token])
        self.register_buffer("special_ids", ids, persistent=False)

    def _build_text_projection(self) -> TextProjection | None:
        language = self.config.language
        if language.encoder is None:
            return None
        if language.encoder_width is None:
            raise ValueError(
                "language.encoder needs encoder_width, the width of its states; "
                "`policy.inputs.text_encoder.with_encoder` reads it from the encoder"
            )
        std = language.init_std if language.embedding_std is None else language.embedding_std
        return TextProjection(language.encoder_width, self.width, std)

    def embed_text(self, text_ids_BT: Tensor) -> Tensor:
        """Return the embeddings [B,T,D] of `ModelInput.text_ids`."""
        return self.decoder.embed(text_ids_BT) if self.text is None else self.text(text_ids_BT)

    def recompute_blocks(self, on: bool) -> None:
        """Switch gradient checkpointing of all blocks of towers and language model; see `policy.model.recompute`."""
        self.decoder.recompute = on
        for _, tower in self.vision.named_towers():
            tower.recompute = on

    def with_router(self, router: RouterConfig) -> CogVLA:
        """Return the same network with another token router, or none; all other weights are shared, not copied."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.config = replace(self.config, routing=replace(self.config.routing, router=router))
        other.router = other._build_router()
        if other.router is not None:
            other.router.train(self.training)
        return other

    def _build_router(self) -> PolicyRouter | None:
        config = self.config
        if config.routing.router.name is None:
            return None
        robot, language = self.embodiment, config.language
        image = (robot.cameras[0].height, robot.cameras[0].width)
        views = len(robot.cameras)
        return PolicyRouter(config.routing, self.vision, views, language.width, language.layers, image, robot.state_dim)

    def empty_memory(self, batch: int) -> dict[str, Tensor] | None:
        """Return the memory of samples whose episode begins; None if no token router remembers."""
        if self.router is None or self.router.memory is None:
            return None
        return self.router.memory.empty(batch, next(self.state.parameters()))

    @property
    def reads_committed(self) -> bool:
        """True if the network uses `ModelInput.committed`: it was trained with them, or its head can be guided."""
        return self.committed is not None or self.head.guided

    @property
    def vision_tokens(self) -> int:
        """N, the number of vision tokens of all views in the language model's sequence."""
        return self.vision.tokens if self.router is None else self.router.tokens

    def plan(self, vision: int | None = None, dense: bool = False) -> tuple[LayerTokens, ...]:
        """Return the vision tokens of each language layer.

        Args:
            vision: number that enters the first; None: as many as configured.
            dense: no token router removes any.
        """
        if self.router is None or dense:
            return self.decoder.plan(self.vision.tokens if vision is None else vision)
        vision = self.vision_tokens if vision is None else vision
        return self.decoder.plan(vision, self.router.left, self.router.bypass)

    def encode_text(
        self, text_ids_BT: Tensor, text_mask_BT: Tensor, budget: int | float | None = None, dense: bool = False
    ) -> TextFeatures:
        """Compute embeddings, FiLM parameters, stream weights, mask and positions for the instructions.

        Args:
            text_ids_BT: token ids or a text encoder's states, see `ModelInput`.
            text_mask_BT: False on padding.
            budget: budget of the token router; None: the configured one.
            dense: see `ModelInput`.
        """
        embedded_BTD = self.embed_text(text_ids_BT)
        weight_BT1 = text_mask_BT[..., None].to(embedded_BTD.dtype)
        total_BD, count_B1 = (embedded_BTD * weight_BT1).sum(1), weight_BT1.sum(1)
        if self.config.routing.summary == "faithful":
            total_BD, count_B1 = total_BD + self.decoder.embed(self.special_ids).sum(0), count_B1 + 2
        summary_BD = total_BD / count_B1
        if self.order is not None:
            summary_BD = summary_BD + self.order(embedded_BTD, text_mask_BT)
        vision, gap = self.vision.tokens if dense else self.vision_tokens, 0
        if self.router is not None:
            vision = vision if budget is None or dense else self.router.leaves(budget)
            gap = self.router.gap(vision)
        layout = TokenLayout(vision=vision, text=text_mask_BT.shape[1], action=self.action_tokens)
        context = DecoderContext(self.decoder, layout, text_mask_BT, gap, self.plan(vision, dense))
        bos_1D, stop_1D = self.decoder.embed(self.special_ids).split(1)
        zeros_JD = embedded_BTD.new_zeros(self.action_tokens, self.width)
        answer_RD = torch.cat((zeros_JD if self.placeholder is None else self.placeholder, stop_1D))
        bos_B1D, answer_BRD = (tokens.expand(len(embedded_BTD), -1, -1) for tokens in (bos_1D, answer_RD))
        tail_BRD = torch.cat((embedded_BTD, answer_BRD), dim=1)
        return TextFeatures(bos_B1D, tail_BRD, context, self.vision.condition(summary_BD))

    def forward(
        self,
        inputs: ModelInput,
        text: TextFeatures | None = None,
        debug: bool = False,
        watch: bool = False,
        decode: bool = True,
        change: Callable[[Tensor], Tensor] | None = None,
        observer: Observer | None = None,
    ) -> ModelOutput:
        """Run one parallel pass.

        Args:
            inputs: see `ModelInput`.
            text: result of an earlier `encode_text` for the same instructions, to save time.
            debug: also return intermediate results (slower, since all rows of all layers are computed).
            watch: also return the attention of the aggregation tokens (`gaze`).
            decode: decode actions; False in training, which computes the head's error from the states.
            change: function applied to the vision tokens [B,N,D] before the language model, for training.
            observer: function called with every block of both towers, see `policy.model.vision.Observer`.
        """
        gaze: list[Tensor] | None = [] if watch else None
        routed: Routed | None = None
        if self.router is None:
            text = text or self.encode_text(inputs.text_ids, inputs.text_mask)
            streams = self.vision.streams(inputs.pixels, text.vision, gaze, observer=observer)
            vision_BND = self.vision.fusion(streams, text.vision.weights_B2)
        else:
            if text is None:
                budget = self.router.drawn_budget(inputs.draw)
                text = self.encode_text(inputs.text_ids, inputs.text_mask, budget, inputs.dense)
            if inputs.past is not None:
                inputs = replace(inputs, memory=self._replayed(self.router, inputs, inputs.past, text), past=None)
            streams, routed = self.route(self.router, inputs, text, gaze, observer)
            vision_BND = routed.vision_BnD
        if change is not None:
            vision_BND = change(vision_BND)
        output = self.decide(vision_BND, inputs.state, text, debug, decode, routed, inputs.committed)
        if output.debug is not None:
            output.debug.update(streams=streams, stream_weights=text.vision.weights_B2)
        return output if gaze is None else replace(output, gaze=gaze)

    def route(
        self,
        router: PolicyRouter,
        inputs: ModelInput,
        text: TextFeatures,
        gaze: list[Tensor] | None = None,
        observer: Observer | None = None,
    ) -> tuple[list[Tensor], Routed]:
        """Run the towers and the token router before the language model."""
        budget = router.drawn_budget(inputs.draw)
        probe, reducer = (None, None) if inputs.dense else (router.probe(), router.reducer(budget))
        remembered = router.recall(inputs.memory, inputs.state, inputs.pixels)
        streams = self.vision.streams(inputs.pixels, text.vision, gaze, probe, observer, reducer)
        guided = self.training and router.guide_layer is not None
        guide_BN = self._guide(streams, inputs, text) if guided else None
        given = inputs.draw if router.config.resample else None
        draw_B = router.draws(inputs.state) if given is None else given[:, 0]
        words_BTD, mask_BT = text.tail_BRD[:, : text.context.layout.text], text.context.text_mask_BT
        seen = words_BTD, mask_BT, inputs.pixels, draw_B, probe
        inside = budget, reducer, guide_BN, remembered, inputs.dense
        return streams, router(streams, self.vision.fusion, text.vision.weights_B2, *seen, *inside)

    @property
    def history(self) -> tuple[int, int]:
        """Number of earlier decisions that token routers remember, and control steps between them in training."""
        if self.router is None or self.router.memory is None:
            return 0, 1
        return self.router.memory.decisions, self.router.config.decision_steps or self.embodiment.chunk

    @torch.no_grad()
    def _replayed(self, router: PolicyRouter, inputs: ModelInput, past: Past, text: TextFeatures) -> Memory | None:
        """Return the memory after these earlier observations of the same instructions, without gradients."""
        memory = self.empty_memory(len(past.age))
        if memory is None:
            return None
        steps = past.age.new_tensor(past.pixels.shape[1])
        for step in range(past.pixels.shape[1]):
            pixels_BVCHW, state_BS = past.pixels[:, step], past.state[:, step]
            before = replace(inputs, pixels=pixels_BVCHW, state=state_BS, memory=memory, past=None, committed=None)
            if router.memory is not None and router.memory.watched is None:  # the language model changes nothing
                after = self.route(router, before, text)[1].next_memory()
            else:
                after = self(before, text, decode=False).memory
            assert after is not None
            there_B = step >= steps - past.age
            memory = {
                name: torch.where(there_B.view(-1, *(1,) * (value.dim() - 1)), after[name].to(value.dtype), value)
                for name, value in memory.items()
            }
        torch.clear_autocast_cache()  # it holds weights that were converted without gradients
        return memory

    @torch.no_grad()
    def _guide(self, streams: list[Tensor], inputs: ModelInput, text: TextFeatures) -> Tensor:
        """Return the attention [B,N] of the action tokens to all vision tokens in the router's `guide_layer`."""
        assert self.router is not None
        assert self.router.guide_layer is not None
        vision_BND = self.vision.fusion(streams, text.vision.weights_B2)
        whole = self.with_router(RouterConfig())
        features = whole.encode_text(inputs.text_ids, inputs.text_mask)
        inside = whole.decide(vision_BND, inputs.state, features, debug=True, decode=False).debug
        assert inside is not None
        return inside["attention"][self.router.guide_layer]

    def decide(
        self,
        vision_BND: Tensor,
        state_BS: Tensor,
        text: TextFeatures,
        debug: bool = False,
        decode: bool = True,
        routed: Routed | None = None,
        committed: CommittedInput | None = None,
    ) -> ModelOutput:
        """Run stages 2 and 3 and the head.

        Args:
            vision_BND: vision tokens at the input of the language model.
            state_BS: normalised states.
            text: result of `encode_text`.
            debug: see `forward`.
            decode: see `forward`.
            routed: result of the token routers; None without token routers.
            committed: see `ModelInput`.
        """
        batch, dtype = len(state_BS), vision_BND.dtype
        state_B1D = self.state(state_BS.to(dtype))[:, None]
        tail_BRD = text.tail_BRD.to(dtype)
        if self.committed is not None and committed is not None:
            tail_BRD = self.committed(committed, tail_BRD)
        sequence = (text.bos_B1D.to(dtype), vision_BND, state_B1D, tail_BRD)
        trace = DecoderTrace() if debug else None
        placed = (None, None) if routed is None else (routed.position_Bn, routed.layers)
        action_BJD = self.decoder(torch.cat(sequence, dim=1), text.context, trace, *placed)
        actions_BKA = action_BJD.new_empty(batch, 0, self.embodiment.action_dim)
        if decode:
            given = committed if self.reads_committed else None
            actions_BKA = decoded(self.head, action_BJD, given, self.committed is not None)
        losses = {} if routed is None else routed.losses()
        kept_BN = None if routed is None or routed.tokens is None else routed.tokens.index_Bn
        memory = None if routed is None else routed.next_memory()
        if trace is None:
            return ModelOutput(actions_BKA, vision_BND, action_BJD, kept=kept_BN, losses=losses, memory=memory)
        inside = {**vars(trace), "layout": text.context.layout}
        if routed is not None:
            inside["routed"] = routed.tokens
        return ModelOutput(actions_BKA, vision_BND, action_BJD, inside, kept=kept_BN, losses=losses, memory=memory)
