"""The token routers of a policy, as `routing.router` configures them: before and in the language model.

::

    towers -> streams joined [B,V*N,F] -> ROUTER (encoder_out) -> fusion -> ROUTER (projector_out) -> language model
      ^- ROUTERS (encoder_block, policy.tower_reducer)
                                                                       ROUTERS at `layers` (policy.layer_router) -^

Each view is routed separately, as a row of the batch, unless the views are `joint`. Attention and other inputs of a
router are computed in addition to the towers, and only if the router needs them. What it remembers of earlier decisions
comes with the inputs and leaves with the result (`policy.model.routers.memory`).

Shape legend: B batch, V views, X = B*V (or B with joint views), N tokens of a row, n of them kept, F width of both
streams, D language width, T text tokens, S state, P tokens of all views as they leave the towers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cogvla.policy.model.config import RoutingConfig
from cogvla.policy.model.routers.attention_probe import FROM_VISION, AttentionProbe
from cogvla.policy.model.routers.keys import check_keys, check_unread
from cogvla.policy.model.routers.layer_router import FROM_TOWERS, LayerPass
from cogvla.policy.model.routers.memory import ATTENTION, Memory, MemoryLayout, Remembered, TokenMemory
from cogvla.policy.model.routers.offers import build_offered, items_offered
from cogvla.policy.model.routers.rows import joined, owners
from cogvla.policy.model.routers.tower_reducer import TowerReducer
from cogvla.policy.model.stopwatch import Stopwatch
from cogvla.policy.model.vision import WHITE, DualVision
from cogvla.routing.aggregation import StreamFusion
from cogvla.routing.draws import children, seeds_of
from cogvla.routing.layer_plan import plan_layers
from cogvla.routing.registry import registered_routers
from cogvla.routing.router import RoutedTokens, RouterContext, RouterSizes, TokenRouter, count_of


@dataclass(frozen=True)
class Routed:
    """The tokens that enter the language model.

    Attributes:
        vision_BnD: vision tokens of all views.
        position_Bn: their positions in the sequence, may be fractions; None: 1, 2, ...
        layers: routers for the decoder; None: no routers in it.
        tokens: result of the router before the language model, with the views in sequence; None: no such router.
        memory: follows what the routers remember; None: they remember nothing.
        remembered_BND: tokens to remember; None: none.
    """

    vision_BnD: Tensor
    position_Bn: Tensor | None = None
    layers: LayerPass | None = None
    tokens: RoutedTokens | None = None
    memory: TokenMemory | None = None
    remembered_BND: Tensor | None = None

    def next_memory(self) -> dict[str, Tensor] | None:
        """Return the memory for the next decision, None without memory; call it after the decoder has run."""
        return None if self.memory is None else self.memory.next(self.remembered_BND)

    def losses(self) -> dict[str, Tensor]:
        """Return the auxiliary losses of all routers; call it after the decoder has run."""
        before = {} if self.tokens is None else dict(self.tokens.losses)
        return before if self.layers is None else {**before, **self.layers.losses}


class PolicyRouter(nn.Module):
    """The token routers of a policy.

    Args:
        routing: configuration; `routing.router` names the router.
        vision: vision towers.
        views: V.
        width: D.
        layers: number of layers of the language model.
        image: (rows, columns) of a picture.
        state: S.

    Attributes:
        stopwatch: set it to time the routers and the computation of their inputs.
        memory: shapes of what the routers remember; None: nothing.

    Raises:
        ValueError: the router is unknown, needs inputs that this policy does not have, does not support the budget, or
            has a key that changes nothing (`keys`).
    """

    def __init__(
        self,
        routing: RoutingConfig,
        vision: DualVision,
        views: int,
        width: int,
        layers: int,
        image: tuple[int, int],
        state: int,
    ) -> None:
        super().__init__()
        self.config = config = routing.router
        assert config.name is not None
        self.stopwatch: Stopwatch | None = None
        self.views, self.all_tokens, self.width = views, vision.tokens, width
        self.rows = 1 if config.joint else views
        self.patches = not routing.efa
        self.picture = vision.grid if self.patches else None
        self.grid = None if config.joint else self.picture
        towers = [tower for _, tower in vision.named_towers()]
        self.widths = [tower.width for tower in towers]
        self.blocks, self.prefix, self.has_cls = towers[0].computed, towers[0].prefix, towers[0].has_cls
        self.prefixes = [tower.prefix for tower in towers]
        known = registered_routers()
        self.stage = config.stage or (known[config.name].stage if config.name in known else "encoder_out")
        check_keys(config, self.stage)
        self.before: TokenRouter | None = None
        self.inside, self.layers = nn.ModuleList(), nn.ModuleDict()
        self.tokens = self.all_tokens
        if self.stage != "llm_layer":
            budgets = (config.budget, *config.train_budgets)
            tokens, largest = self.all_tokens // self.rows, max(map(self._count, budgets))
            if self.stage == "encoder_block":
                self._build_inside(config.name, tokens, largest)
            else:
                token_width = sum(self.widths)
                entering = token_width if self.stage == "encoder_out" else width
                pictures = views // self.rows
                sizes = RouterSizes(tokens, entering, width, self.grid, largest, token_width, pictures)
                self.before = self._build(config.name, self.stage, sizes, config.options)
                self.probe()  # it asks for no more blocks than there are
            leaving = [self.leaves(budget) for budget in budgets]  # ValueError for one that the router cannot leave
            self.tokens = leaving[0]
        self.counts: dict[int, int] = {}
        self._build_layers(routing, layers)
        if len(self.inside) and any(FROM_TOWERS & router.needs for router in self._routers()):
            raise ValueError(
                "a router in the language model reads the patches, which router.stage=encoder_block has reduced: "
                "use another stage"
            )
        self._check_guide(routing, layers)
        self.memory = self._memory(layers, (views, 3, *image))
        check_unread(config, self.draws_numbers, () if self.memory is None else self.memory.shapes)
        if self.memory is not None and "state" in self.memory.shapes and max(config.hand) >= state:
            raise ValueError(
                f"router.hand names the entries {list(config.hand)} of the state, which has {state}; router "
                f"{config.name!r} reads the motion of the end effector: give the entries with its position"
            )

    def _memory(self, depth: int, pixels: tuple[int, ...]) -> MemoryLayout | None:
        """Return the shapes of what the routers remember."""
        routers = [router for router in self._routers() if router.remembers]
        if not routers:
            return None
        needs = {need for router in routers for need in router.needs}
        needs |= {"motion_BOC"} if any(router.gated for router in routers) else set()
        watched = {router.watched_layer(depth) for router in routers if ATTENTION & router.needs}
        if len(watched) > 1:
            raise ValueError(f"the routers watch the attention of different language layers: {sorted(watched)}")
        width = sum(self.widths) if self.stage == "encoder_out" else self.width
        decisions, tokens = max(router.remembers for router in routers), (self.all_tokens, width)
        layer = next(iter(watched), None)
        return MemoryLayout.of(needs, decisions, self.config.hand, pixels, tokens, self.picture, layer)

    @property
    def block(self) -> int:
        """Vision block before which the towers are reduced, with `stage=encoder_block`."""
        return self.blocks // 2 if self.config.block is None else self.config.block

    def _build_inside(self, name: str, tokens: int, largest: int) -> None:
        if self.grid is None:
            raise ValueError(
                "router.stage=encoder_block reduces patches of one view: set routing.efa=false and router.joint=false"
            )
        if not 0 <= self.block < self.blocks:
            raise ValueError(
                f"router.block is {self.block}, and these towers compute {self.blocks} blocks: choose 0 to "
                f"{self.blocks - 1}"
            )
        for width in self.widths:
            sizes = RouterSizes(tokens, width, self.width, self.grid, largest)
            self.inside.append(self._build(name, self.stage, sizes, self.config.options))

    def _check_guide(self, routing: RoutingConfig, layers: int) -> None:
        """Check the layer whose attention a router learns from."""
        if (guide := self.guide_layer) is None:
            return
        if len(self._routers()) > 1 or (routing.lfp and routing.mode == "drop"):
            raise ValueError("guide_layer needs a policy in which only this router removes tokens")
        first = max(self.counts, default=-1) + 1
        if not first <= guide < layers:
            raise ValueError(f"guide_layer is {guide}; it must be deeper than the router, {first} to {layers - 1} here")

    @property
    def guide_layer(self) -> int | None:
        """Language layer whose attention, with all tokens, a router learns from; None: no router does."""
        return next((r.guide_layer for r in self._routers() if r.guide_layer is not None), None)

    def _build_layers(self, routing: RoutingConfig, layers: int) -> None:
        config, each = self.config, self.all_tokens // self.views
        plan = partial(
            plan_layers, ratios=routing.keep_ratios(layers), drop=routing.mode == "drop", bypass=config.mode == "bypass"
        )
        name = config.layer_router or config.name or ""
        options = config.options if config.layer_router is None else None
        budgets = config.layer_budgets or (config.budget,) * len(config.layers)
        entering = {self.leaves(budget) for budget in (config.budget, *config.train_budgets)}
        for layer, budget in sorted(zip(config.layers, budgets, strict=True)):
            if not 0 <= layer < layers:
                raise ValueError(f"router.layers names layer {layer}; the language model has layers 0 to {layers - 1}")
            tokens = plan(max(entering), routed=self.left)[layer].arrive
            count = min(tokens, self.views * count_of(budget, each))
            sizes = RouterSizes(tokens, self.width, self.width, None, count, sum(self.widths))
            router = self._build(name, "llm_layer", sizes, options)
            if config.mode == "bypass" and not router.selects:
                raise ValueError(f"router {name!r} makes new tokens, which cannot bypass a layer; set router.mode=drop")
            if config.mode == "bypass" and router.hides:
                raise ValueError(f"router {name!r} hides tokens, which cannot bypass a layer; set router.mode=drop")
            if router.hides and len(config.layers) > 1:
                raise ValueError(
                    f"router {name!r} hides tokens, and would choose among them again: give one router.layers"
                )
            self.counts[layer], self.layers[str(layer)] = count, router
        for vision in sorted(entering, reverse=True):
            drawn = plan(vision, routed=self.left)
            for layer, count in self.counts.items():
                cast(TokenRouter, self.layers[str(layer)]).leaves(min(drawn[layer].arrive, count))

    def _build(self, name: str, stage: str, sizes: RouterSizes, options: Any) -> TokenRouter:
        scored, joint = self.before is not None and self.before.scores, self.config.joint
        grid, made = self.grid is not None, not all(router.selects for router in self._routers())
        offered = items_offered(stage, patches=self.patches, joint=joint, grid=grid, scored=scored, made=made)
        return build_offered(name, stage, sizes, options, offered, self.patches, made)

    def _count(self, budget: int | float) -> int:
        """Return the number of tokens of a row (one view, or all views if they are joint) for this budget."""
        return self.views // self.rows * count_of(budget, self.all_tokens // self.views)

    def leaves(self, budget: int | float) -> int:
        """Return the number of vision tokens of all views that enter the language model with this budget."""
        first = self._first()
        return self.all_tokens if first is None else self.rows * first.leaves(self._count(budget))

    def _first(self) -> TokenRouter | None:
        """Return the router before the language model, or the first tower's; None: there is none."""
        return cast(TokenRouter, self.inside[0]) if len(self.inside) else self.before

    def shape(self, tokens: int) -> tuple[int, int] | None:
        """Return rows and columns of a view's tokens if all views have this number of them; None: they are no grid."""
        first = self._first()
        return None if first is None else first.shape(tokens // self.views)

    @property
    def left(self) -> dict[int, int]:
        """Language layer -> number of vision tokens that its router leaves; for routed layers."""
        routers = {layer: cast(TokenRouter, self.layers[str(layer)]) for layer in self.counts}
        return {layer: routers[layer].leaves(count) for layer, count in self.counts.items()}

    def needed_of_layers(self) -> dict[int, frozenset[str]]:
        """Return the context items that routers read of each language layer; a layer that none reads is missing."""
        found = {layer: cast(TokenRouter, self.layers[str(layer)]).needs for layer in self.counts}
        for layer, needs in list(found.items()):
            if "growth_BN" in needs and layer > 0:  # it compares with the layer before
                found[layer - 1] = found.get(layer - 1, frozenset()) | {"growth_BN"}
        if self.memory is not None and self.memory.watched is not None:
            found[self.memory.watched] = found.get(self.memory.watched, frozenset()) | {"attention_LBN"}
        return found

    @property
    def gate(self) -> TokenRouter | None:
        """The router that says for each decision whether tokens are removed; None: they always are."""
        return next((router for router in self._routers() if router.gated), None)

    @property
    def remembering(self) -> str | None:
        """The name of the first router that remembers earlier decisions; None: none does."""
        if self.memory is None:
            return None
        first, config = self._first(), self.config
        return config.name if first is not None and first.remembers else config.layer_router or config.name

    def forgetful(self) -> ValueError:
        """Return the error of a place that gives no memory to routers that need it."""
        return ValueError(
            f"router {self.remembering!r} remembers earlier decisions of an episode, and none are given here: run the "
            "policy with `Policy.act`, train it with `train_policy`, or set ModelInput.memory (`CogVLA.empty_memory` "
            "at the start of an episode)"
        )

    def recall(self, memory: Memory | None, state_BS: Tensor, pixels_BVCHW: Tensor) -> Remembered | None:
        """Return what the routers remember of these samples; None if they remember nothing.

        Raises:
            ValueError: they remember, and there is no memory, or one of other shapes.
        """
        if self.memory is None:
            return None
        if memory is None:
            raise self.forgetful()
        return Remembered(self.memory, memory, state_BS, pixels_BVCHW)

    @property
    def bypass(self) -> bool:
        """True if tokens that a language layer does not keep skip only this layer; otherwise they are removed."""
        return self.config.mode == "bypass"

    def gap(self, tokens: int) -> int:
        """Return the number of free positions after `tokens` vision tokens, see `DecoderContext`."""
        if self._first() is None or self.config.position == "compact":
            return 0
        return math.ceil(self._step * self.all_tokens) - tokens

    @property
    def _step(self) -> float:
        return self.config.position_step if self.config.position == "v2pe" else 1.0

    def probe(self) -> AttentionProbe | None:
        """Return the probe for the first tower; None if the router needs nothing from it."""
        if self.before is None or not self.before.needs & FROM_VISION:
            return None
        blocks = self.before.attention_blocks(self.blocks)
        return AttentionProbe(self.before.needs, blocks, self.prefix, self.has_cls, self.stopwatch)

    def reducer(self, budget: int | float | None = None) -> TowerReducer | None:
        """Return what reduces the patches inside of the towers; None if nothing does; `budget` as in `forward`."""
        if not len(self.inside):
            return None
        count = self._count(self.config.budget if budget is None else budget)
        routers = [cast(TokenRouter, router) for router in self.inside]
        context = RouterContext(count, self.training, grid=self.grid)
        return TowerReducer(routers, self.block, self.prefixes, context, self.stopwatch)

    @property
    def draws_numbers(self) -> bool:
        """True if a router draws random numbers."""
        return any("draw_B" in router.needs for router in self._routers())

    def draws(self, state_BS: Tensor) -> Tensor:
        """Return the seeds [B] for observations with these states."""
        if self.config.resample and self.draws_numbers:
            return seeds_of(state_BS, self.config.seed)
        return torch.full((len(state_BS),), self.config.seed, dtype=torch.int64, device=state_BS.device)

    def _routers(self) -> list[TokenRouter]:
        before = [] if self.before is None else [self.before]
        return before + [cast(TokenRouter, router) for router in (*self.inside, *self.layers.values())]

    def drawn_budget(self, draw_B2: Tensor | None) -> int | float | None:
        """Return the budget of this training step; None: the configured one."""
        if draw_B2 is None or not self.config.train_budgets:
            return None
        return self.config.train_budgets[int(draw_B2[0, 1]) % len(self.config.train_budgets)]

    def forward(
        self,
        streams: Sequence[Tensor],
        fusion: StreamFusion,
        weights_B2: Tensor | None,
        words_BTD: Tensor,
        text_mask_BT: Tensor,
        pixels_BVCHW: Tensor,
        draw_B: Tensor,
        probe: AttentionProbe | None,
        budget: int | float | None = None,
        reducer: TowerReducer | None = None,
        guide_BN: Tensor | None = None,
        remembered: Remembered | None = None,
        dense: bool = False,
    ) -> Routed:
        """Route the towers' streams [B,V*N,F] and project them for the language model.

        Args:
            streams: output of each tower.
            fusion: projects and fuses the streams.
            weights_B2: stream weights for `fusion`; None unless streams are mixed.
            words_BTD: embedded instruction.
            text_mask_BT: True for real tokens of the instruction.
            pixels_BVCHW: the pictures that the towers saw.
            draw_B: seeds.
            probe: result of `probe()`, after the towers ran with it.
            budget: budget that replaces the configured one; None: the configured one.
            reducer: result of `reducer()`, after the towers ran with it.
            guide_BN: attention that the towers' tokens get in `guide_layer`; None outside of training.
            remembered: result of `recall`.
            dense: keep all tokens, as if there were no routers, but remember.
        """
        routed: RoutedTokens | None = None
        position_Bn: Tensor | None = None
        remembered_BND: Tensor | None = None
        history = remembered is not None and "tokens" in remembered.layout.shapes
        if reducer is not None:
            assert reducer.routed is not None
            vision_BnD = fusion(streams, weights_B2)
            routed = self._joined(replace(reducer.routed, losses=reducer.losses), vision_BnD)
        elif self.before is None or dense:
            vision_BnD = fusion(streams, weights_B2)
            if history:
                remembered_BND = torch.cat(list(streams), dim=-1) if self.stage == "encoder_out" else vision_BnD
            if dense and (self.before is not None or len(self.inside)) and self._step != 1:
                place_n = torch.arange(vision_BnD.shape[1], device=vision_BnD.device)
                position_Bn = (1 + self._step * place_n).expand(len(vision_BnD), -1)
        else:
            joined_BNF = torch.cat(list(streams), dim=-1)
            weights_X2 = None if weights_B2 is None else weights_B2.repeat_interleave(self.rows, dim=0)

            def project(x_XNF: Tensor) -> Tensor:
                return fusion(x_XNF.split(self.widths, dim=-1), weights_X2)

            projector = partial(_projected, fusion, self.widths, weights_X2)
            count = self._count(self.config.budget if budget is None else budget)
            x_XNC = joined_XNF = rearrange(joined_BNF, "b (r n) w -> (b r) n w", r=self.rows)
            if self.stage == "projector_out":
                x_XNC = project(joined_XNF)
            with self.stopwatch or nullcontext():
                items = self._items(words_BTD, text_mask_BT, pixels_BVCHW, draw_B, probe)
                if guide_BN is not None:
                    items["guide_BN"] = rearrange(guide_BN, "b (r n) -> (b r) n", r=self.rows)
                items |= {"encoder_BNF": joined_XNF} if self.stage == "projector_out" else {"projector": projector}
                if remembered is not None:
                    items |= remembered.items(self.before.needs, self.before.remembers, self.rows, None)
                if history and remembered is not None:
                    remembered_BND = rearrange(x_XNC, "(b r) n w -> b (r n) w", r=self.rows)
                if "history_BOND" in self.before.needs and remembered is not None and remembered_BND is not None:
                    items["history_BOND"] = remembered.history(remembered_BND, self.before.remembers, self.rows)
                routed = cast(RoutedTokens, self.before(x_XNC, RouterContext(count, self.training, **items)))
            raw = self.stage == "encoder_out" and not self.before.projects
            x_XnD = project(routed.tokens_BnD) if raw else routed.tokens_BnD
            vision_BnD = rearrange(x_XnD, "(b r) k d -> b (r k) d", r=self.rows)
            routed = self._joined(routed, vision_BnD)
        if routed is not None and self.config.position != "compact":
            position_Bn = 1 + (routed.place_Bn if self._step == 1 else self._step * routed.place_Bn)
        layers = None
        memory = None
        if remembered is not None:
            memory = TokenMemory(remembered, None if routed is None else routed.index_Bn)
        if (self.layers and not dense) or (memory is not None and memory.watched is not None):
            counts = {} if dense else self.counts
            routers = {layer: (cast(TokenRouter, self.layers[str(layer)]), count) for layer, count in counts.items()}
            score_BN = None
            if routed is not None and routed.score_BN is not None:
                score_BN = routed.score_BN.gather(1, routed.rows)
            compact = self.config.position == "compact"
            towers = None
            if any(FROM_TOWERS & router.needs for router, _ in routers.values()):
                towers = torch.cat(list(streams), dim=-1), self._owners(routed, draw_B)
            passing = self.bypass, compact, draw_B, score_BN, self.training, self.stopwatch
            layers = LayerPass(routers, *passing, towers=towers, guide_BN=guide_BN, memory=memory)
        return Routed(vision_BnD, position_Bn, layers, routed, memory, remembered_BND)

    def _items(
        self,
        words_BTD: Tensor,
        text_mask_BT: Tensor,
        pixels_BVCHW: Tensor,
        draw_B: Tensor,
        probe: AttentionProbe | None,
    ) -> dict[str, Any]:
        """Build the context items that the router needs."""
        assert self.before is not None
        needs, rows = self.before.needs, self.rows
        items: dict[str, Any] = {"grid": self.grid}
        if "draw_B" in needs:
            items["draw_B"] = rearrange(children(draw_B, rows), "b r -> (b r)")
        if "text_BTE" in needs:
            items["text_BTE"] = repeat(words_BTD, "b t d -> (b r) t d", r=rows)
            items["text_mask_BT"] = repeat(text_mask_BT, "b t -> (b r) t", r=rows)
        if "pixels_B3HW" in needs:
            scale = 1.0 if pixels_BVCHW.dtype == torch.uint8 else WHITE
            items["pixels_B3HW"] = pixels_BVCHW.flatten(0, 1).float() * scale
        for name, value in ({} if probe is None else probe.items()).items():
            if self.config.joint:  # one row of all views
                pattern = {"attention_LBN": "l (b v) n -> l b (v n)", "received_BN": "(b v) n -> b (v n)"}
                value = rearrange(value, pattern.get(name, "(b v) n c -> b (v n) c"), v=self.views)
            items[name] = value
        return items

    def _owners(self, routed: RoutedTokens | None, draw_B: Tensor) -> Tensor:
        """Return for each token of the towers the token that it went into, see `owners`."""
        if routed is None:
            return torch.arange(self.all_tokens, device=draw_B.device).expand(len(draw_B), -1)
        return owners(routed, self.all_tokens, self.views, 1 if self.picture is None else self.picture[1])

    def _joined(self, routed: RoutedTokens, vision_BnD: Tensor) -> RoutedTokens:
        return joined(routed, vision_BnD, self.rows, self.all_tokens // self.rows)


def _projected(fusion: StreamFusion, widths: list[int], weights_X2: Tensor | None, x_XNF: Tensor) -> Tensor:
    """Apply the fusion to tokens, in float32 if tokens and weights differ in precision."""
    if all(parameter.dtype == x_XNF.dtype for parameter in fusion.parameters()):
        return fusion(x_XNF.split(widths, dim=-1), weights_X2)
    with _LinearInFloat32():
        return fusion(x_XNF.float().split(widths, dim=-1), weights_X2)


class _LinearInFloat32(TorchFunctionMode):
    """Computes linear layers with their weights in float32, also while they are recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = [value if value is None else value.float() for value in args]
        return func(*args, **(kwargs or {}))
