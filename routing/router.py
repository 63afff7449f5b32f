"""The interface of token routers, which reduce the vision tokens of a view. `routing/registry.py` lists all routers.

    RouterContext  facts about the tokens; the policy computes only the items that a router `needs`
    TokenRouter    tokens [B,N,D] + context -> RoutedTokens
    RoutedTokens   tokens [B,n,D], with their origin and their place in the sequence

All routers keep these rules, and `tests/routing/test_routers_contract.py` checks them:

- n is exact; chosen tokens keep their order; synthetic tokens are placed among them
- a sample gets the same result alone and in a batch: no loop over samples, and random numbers are drawn per sample
- scores are float32 whatever the precision of the tokens, and of equal scores the earlier token wins

Shape legend: B rows to route (samples, or samples times views), N tokens in, n tokens out, D token width, H x W grid of
a view, T text tokens, E language width, L vision layers asked for, C width of keys or entries of the state,
F width of encoder tokens, I neurons of an MLP, O earlier decisions, P tokens of all views as they leave the vision
towers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cogvla.files import read_object

MODES = ("bypass", "drop")
STAGES = ("encoder_block", "encoder_out", "projector_out", "llm_layer")
POSITIONS = ("keep", "compact", "v2pe")


@dataclass(frozen=True)
class RouterConfig:
    """A policy's token router, and the number of tokens that it keeps.

    Attributes:
        name: name of the router, one of `routing.registry.registered_routers()`; None: no router.
        budget: tokens to keep of each view: an integer is a number, a float is a share (1: one token, 1.0: all).
        stage: place of the router: `encoder_block`, `encoder_out`, `projector_out` or `llm_layer`; None: the router's
            default. `encoder_block` is inside of both vision towers, before their block `block`. `encoder_out` is
            before the projection, with both streams joined. `llm_layer` routes at `layers` only.
        options: options of the router by name, e.g. {variant: maxsum}, or a file that `calibrate_router` wrote; None:
            its defaults.
        mode: at a language layer, other tokens are removed from there on (`drop`), or skip this layer (`bypass`).
        position: position ids of the kept tokens: unchanged (`keep`), consecutive (`compact`) or scaled (`v2pe`).
        position_step: factor on the position ids, for position=v2pe.
        block: vision block, from 0, before which stage=encoder_block routes; None: half of the blocks.
        joint: let all views compete for V*n tokens; False: keep n tokens of each view.
        layers: language layers, from 0, before which tokens are routed (again, if `stage` is an earlier one).
        layer_router: name of the router at `layers`; None: `name`.
        layer_budgets: budgets at each of `layers`, as `budget`; (): `budget` at each.
            Shares are of all tokens of the vision towers.
        train_budgets: budgets of which every training step draws one at random (TokenFLEX); (): only `budget`.
        seed: random seed of the routers' draws.
        resample: draw again for every new observation; False: use the same draw for all.
        hand: entries of the state with the end effector's position, then those with its rotation, if any; for routers
            that read its motion.
        decision_steps: control steps between two decisions, for routers that remember; training takes its history from
            the data at this distance. None: a whole chunk.
    """

    name: str | None = None
    budget: int | float = 0.25
    stage: Literal["encoder_block", "encoder_out", "projector_out", "llm_layer"] | None = None
    options: Any = None
    mode: Literal["drop", "bypass"] = "drop"
    position: Literal["keep", "compact", "v2pe"] = "keep"
    position_step: float = 0.25
    block: int | None = None
    joint: bool = False
    layers: tuple[int, ...] = ()
    layer_router: str | None = None
    layer_budgets: tuple[int | float, ...] = ()
    train_budgets: tuple[int | float, ...] = ()
    seed: int = 0
    resample: bool = True
    hand: tuple[int, ...] = (0, 1, 2)
    decision_steps: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.options, str):
            object.__setattr__(self, "options", saved_options(self.options))
        if self.options is not None and not isinstance(self.options, Mapping):
            raise ValueError(
                f"router.options is {self.options!r}; give names and values, such as '{{variant: maxsum}}'"
            )
        for name in ("layers", "layer_budgets", "train_budgets", "hand"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, allowed in (("stage", (None, *STAGES)), ("mode", MODES), ("position", POSITIONS)):
            if getattr(self, name) not in allowed:
                known = ", ".join("null" if value is None else value for value in allowed)
                raise ValueError(f"router.{name} is {getattr(self, name)!r}; it must be one of {known}")
        for budget in (self.budget, *self.layer_budgets, *self.train_budgets):
            count_of(budget, None)
        if self.layer_budgets and len(self.layer_budgets) != len(self.layers):
            raise ValueError(
                f"router.layer_budgets has {len(self.layer_budgets)} entries for {len(self.layers)} router.layers"
            )
        if self.name is not None and self.stage == "llm_layer" and not self.layers:
            raise ValueError("router.stage=llm_layer needs router.layers, for example router.layers=[1]")
        if len(self.hand) < 3 or len(set(self.hand)) != len(self.hand) or min(self.hand) < 0:
            raise ValueError(f"router.hand must name x, y and z among the entries of the state, got {list(self.hand)}")
        if self.decision_steps is not None and self.decision_steps < 1:
            raise ValueError(f"router.decision_steps must be at least 1, got {self.decision_steps}")
        if not 0 < self.position_step < float("inf"):
            raise ValueError(f"router.position_step must be a positive number, got {self.position_step}")


def saved_options(file: str) -> dict[str, Any]:
    """Return the options in a file that `calibrate_router` wrote.

    Raises:
        ValueError: the file is missing or damaged, or is another one.
    """
    advice = "router.options takes names and values, or a file that `calibrate_router` wrote"
    options = read_object(Path(file), advice).get("options")
    if not isinstance(options, dict):
        raise ValueError(f"{file} has no options; {advice}")
    return options


def count_of(budget: int | float, tokens: int | None) -> int:
    """Return n for a budget (see `RouterConfig`) and a number of tokens.

    Args:
        budget: number of tokens (int), or share (float).
        tokens: tokens that there are; None: only check the budget, and return 0.

    Raises:
        ValueError: not a budget, or above the number of tokens.
    """
    whole = isinstance(budget, int) and not isinstance(budget, bool)
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not budget > 0 or (not whole and budget > 1):
        raise ValueError(
            f"a router's budget is a number of tokens or a share in (0, 1], for example 16 or 0.25; got {budget!r}"
        )
    if tokens is None:
        return 0
    if whole and budget > tokens:
        raise ValueError(f"a router's budget is {budget}, but there are only {tokens} tokens; choose 1 to {tokens}")
    return int(budget) if whole else max(1, round(budget * tokens))


@dataclass(frozen=True)
class RouterSizes:
    """Sizes that a router is built for.

    Attributes:
        tokens: N.
        width: D.
        text_width: E.
        grid: (H, W); None if the tokens are not a grid.
        budget: n, or the largest of several.
        encoder_width: F.
        views: pictures whose tokens follow each other in a row; 1 in the language model, where all are one sequence.
    """

    tokens: int
    width: int
    text_width: int
    grid: tuple[int, int] | None
    budget: int
    encoder_width: int = 0
    views: int = 1


@dataclass(frozen=True)
class RouterContext:
    """Facts about the tokens. Only the items that the router `needs` are there; the others are None.

    Attributes:
        budget: n.
        training: True while the policy is trained.
        draw_B: random seeds int64, one per row, for `routing.draws`.
        grid: (H, W); the tokens are patches of one view in row order.
        text_BTE: instruction tokens in the language model's space.
        text_mask_BT: bool, False on padding; comes with `text_BTE`.
        projector: function from tokens of this stage [...,D] to the language width [...,E].
        encoder_BNF: output of the vision towers, for routers after the projector.
        attention_LBN: attention that each token gets. In a tower: from [CLS], mean over heads; without [CLS], mean over
            heads and patches. In the language model: from the action tokens.
        received_BN: attention that each token gets from vision tokens, mean over heads and queries.
        attention_BNN: attention among vision tokens, mean over heads; rows are queries.
        keys_BNC: attention keys, mean over heads.
        pixels_B3HW: image, 0 to 255.
        score_BN: scores from the router before the language model, of the tokens that are left.
        growth_BN: increase of the attention from the action tokens since the layer before.
        guide_BN: attention that each token gets from the action tokens in a deeper language layer, if no token is
            removed; in training only, for routers with a `guide_layer`.
        share_B2: share of the text and action tokens' attention that goes to vision tokens, and share of the vision
            tokens' attention that goes to text and action tokens.
        neurons_BNI: bool, neurons of the language layer's MLP that each vision token activates.
        text_neurons_BTI: bool, the same for instruction tokens.
        text_attention_BN: attention that each token gets from the words in this language layer, mean over heads and
            words.
        text_match_BN: products of the words' queries and the token's key in this language layer, without rotation and
            softmax, mean over heads and words.
        age_B: number of decisions of this episode that are remembered, int64, 0 to O; 0 at its first decision.
        history_BOND: tokens of the last O decisions, the oldest first, as they came to the router. Where the episode is
            younger, the present takes the place of these and of the other past items, except for attention (0).
        past_pixels_BO3HW: images of the last O decisions, 0 to 255.
        alike_BON: cosine of each patch's pixels with those of the same patch at the last O decisions.
        motion_BOC: change of the state's entries `RouterConfig.hand` from each of the last O decisions to the next one
            (the last one to now), in units of the normalised state; 0 where the episode is younger.
        past_attention_BON: attention that each token got from the action tokens at the last O decisions, in layer
            `TokenRouter.watched_layer`. A token that was not in that layer has its value from the decision before, and
            0 if it never was there.
        past_seen_BON: bool, False for tokens that were not in that layer.
        patches_BPF: output of the vision towers for all views, for routers in the language model.
        owner_BP: int64, for each of `patches_BPF` the token that it went into, or else the nearest one of its view; -1
            if there is none.
    """

    budget: int
    training: bool = False
    draw_B: Tensor | None = None
    grid: tuple[int, int] | None = None
    text_BTE: Tensor | None = None
    text_mask_BT: Tensor | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    encoder_BNF: Tensor | None = None
    attention_LBN: Tensor | None = None
    received_BN: Tensor | None = None
    attention_BNN: Tensor | None = None
    keys_BNC: Tensor | None = None
    pixels_B3HW: Tensor | None = None
    score_BN: Tensor | None = None
    growth_BN: Tensor | None = None
    share_B2: Tensor | None = None
    neurons_BNI: Tensor | None = None
    text_neurons_BTI: Tensor | None = None
    text_attention_BN: Tensor | None = None
    text_match_BN: Tensor | None = None
    age_B: Tensor | None = None
    history_BOND: Tensor | None = None
    patches_BPF: Tensor | None = None
    owner_BP: Tensor | None = None
    guide_BN: Tensor | None = None
    past_pixels_BO3HW: Tensor | None = None
    alike_BON: Tensor | None = None
    motion_BOC: Tensor | None = None
    past_attention_BON: Tensor | None = None
    past_seen_BON: Tensor | None = None


PAST = ("history_BOND", "past_pixels_BO3HW", "alike_BON", "motion_BOC", "past_attention_BON", "past_seen_BON")
"""Items with an entry for each earlier decision."""
OF_TOKENS = frozenset({"history_BOND", "alike_BON", "past_attention_BON", "past_seen_BON"})
"""Items that are remembered of each token; nothing is of a token that another router made."""


def latest(context: RouterContext, decisions: int) -> RouterContext:
    """Return the context with no more than this number of earlier decisions."""
    found = {name: getattr(context, name) for name in PAST}
    shorter: dict[str, Any] = {name: value[:, -decisions:] for name, value in found.items() if value is not None}
    if context.age_B is not None:
        shorter["age_B"] = context.age_B.clamp(max=decisions)
    return replace(context, **shorter)


ITEMS = frozenset(f.name for f in fields(RouterContext)) - {"budget", "training", "text_mask_BT", "guide_BN"}
"""Names of the items that a router can need."""


@dataclass(frozen=True)
class RoutedTokens:
    """The result of a router.

    Attributes:
        tokens_BnD: kept or synthetic tokens, in the precision of the input.
        index_Bn: int64, index of each token among the N input tokens; -1 for a synthetic token.
        place_Bn: position of each token among the N input tokens: its index, or a place for a synthetic token.
        score_BN: float32 scores of the input tokens, higher is more worth keeping; None if the router has no scores.
        owner_BN: int64, for each input token the output token that contains it, -1 if it is lost; None if nothing is
            merged, or if all tokens are new and read all of them.
        mask_Bn: bool, False hides a token from all others; for routers whose number of tokens depends on the content
            (at language layers only). None: nothing is hidden.
        losses: weighted auxiliary losses by name; empty unless training.
    """

    tokens_BnD: Tensor
    index_Bn: Tensor
    place_Bn: Tensor
    score_BN: Tensor | None = None
    owner_BN: Tensor | None = None
    mask_Bn: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> Tensor:
        """The input token at each token's place, or nearest to it, int64 [B,n]."""
        return self.place_Bn.round().long() if self.place_Bn.is_floating_point() else self.place_Bn


class TokenRouter(nn.Module, ABC):
    """Base class of all routers. A subclass sets `needs` and implements `route`; its options are keyword arguments.

    Args:
        sizes: see `RouterSizes`.
    """

    needs: frozenset[str] = frozenset()
    """Items of `RouterContext` that the router reads."""
    stage: ClassVar[str] = "encoder_out"
    """Default stage."""
    stages: ClassVar[tuple[str, ...]] = STAGES[1:]
    """Stages that the router supports."""
    selects: ClassVar[bool] = True
    """True if every output token is an input token, False if the router can make new ones."""
    scores: bool = True
    """False if the router has no scores (`RoutedTokens.score_BN` is None)."""
    hides: bool = False
    """True if the router can hide tokens (`RoutedTokens.mask_Bn`); it then works at one language layer only."""
    projects: bool = False
    """True if the router replaces the projector: at `encoder_out`, its output has the language model's width."""
    guide_layer: int | None = None
    """Language layer whose attention to all tokens the router learns from (`RouterContext.guide_BN`); None: none."""
    remembers: int = 0
    """O, the number of earlier decisions that the router reads."""
    gated: bool = False
    """True if `prunes` says for each decision whether the router works; otherwise it always does."""

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__()
        self.sizes = sizes

    def leaves(self, budget: int) -> int:
        """Return the number of tokens that the router leaves for a budget.

        Raises:
            ValueError: the router does not support this budget.
        """
        return budget

    def shape(self, budget: int) -> tuple[int, int] | None:
        """Return rows and columns of the tokens that the router leaves; None: they are no grid."""
        return None

    def attention_blocks(self, depth: int) -> range:
        """Return the vision blocks, of `depth`, whose attention `attention_LBN` holds."""
        return range(depth - 1, depth)

    def watched_layer(self, depth: int) -> int:
        """Return the language layer, of `depth`, whose attention `past_attention_BON` holds."""
        return max(depth // 2 - 1, 0)

    def prunes(self, motion_BOC: Tensor, age_B: Tensor, run_B: Tensor) -> Tensor:
        """Return for each sample whether the router works in this decision, bool [B]; else all tokens are kept.

        A policy asks before the forward pass, on the CPU, so that the network has two fixed shapes.

        Args:
            motion_BOC: see `RouterContext`.
            age_B: see `RouterContext`.
            run_B: number of decisions without a break in which it worked, until now.
        """
        return torch.ones_like(age_B, dtype=torch.bool)

    @abstractmethod
    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        """Reduce tokens [B,N,D] to [B,n,D]; called by `forward` with autocast off."""

    def forward(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        """Call `route` with autocast off, so that scores are float32."""
        assert all(getattr(context, name) is not None for name in self.needs), f"{type(self).__name__} lacks context"
        with torch.autocast(tokens_BND.device.type, enabled=False):
            routed = self.route(tokens_BND, context)
        assert routed.tokens_BnD.shape[:2] == routed.index_Bn.shape == routed.place_Bn.shape
        return routed


class Calibrated(ABC):
    """A router with options that should be measured on the policy's own observations, as `calibrate_router` does."""

    trouble: ClassVar[str] = ""
    """Ending of the line about the rows that `troubled` finds, such as "run out of candidates"."""

    @abstractmethod
    def observed(self, tokens_BND: Tensor, context: RouterContext) -> Tensor:
        """Return what is averaged over all rows of all observations, [B,...]."""

    @abstractmethod
    def fitted(self, mean: Tensor) -> dict[str, float]:
        """Return the options that follow from the mean of `observed`."""

    def troubled(self, tokens_BND: Tensor, context: RouterContext) -> Tensor | None:
        """Return the rows for which the present options do not work, bool [B]; None: there is no such measure."""
        return None
