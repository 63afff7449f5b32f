"""What a token router is: vision tokens of a view in, fewer of them out. The catalogue is `routing/registry.py`.

    RouterContext  what the policy knows about these tokens; only the items that a router `needs` are computed
    TokenRouter    tokens [B,N,D] + context -> RoutedTokens
    RoutedTokens   tokens [B,K,D], where they come from and where they are placed

Rules that hold for all of them, and that `tests/routing/test_routers_contract.py` checks:

- K is exact, chosen tokens keep their order, synthetic ones are placed among them
- a sample is routed alike alone and in a batch: there is no loop over samples, and what is random is drawn per sample
- scores are float32 whatever the precision of the tokens, and ties go to the earlier token

Shape legend: B rows to route (samples, or samples times views), N tokens in, K tokens out, D token width, H x W grid of
a view, T text tokens, E language width, L vision layers asked for, C width of keys, W width of encoder tokens,
F neurons of an MLP, or observations of a history.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cogvla.routing.pruning import MODES

STAGES = ("encoder_out", "projector_out", "llm_layer")
POSITIONS = ("keep", "compact", "v2pe")


@dataclass(frozen=True)
class RouterConfig:
    """Which router a policy has, and how many tokens it leaves.

    Attributes:
        name: one of `routing.registry.ROUTERS`; None is no router.
        budget: tokens left of each view. A whole number counts them, a number with a point is a share (1 is one token,
            1.0 are all).
        stage: where: `encoder_out` (both streams joined, before projection), `projector_out`, or `llm_layer`, which is
            at `layers` only; None is the router's own.
        options: of the router by name, e.g. {variant: maxsum}; None is its defaults.
        mode: what happens at a language layer: tokens not kept are gone (`drop`) or skip that layer only (`bypass`).
        position: of tokens left: their own (`keep`), numbered anew (`compact`), or their own in steps of
            `position_step` (`v2pe`).
        position_step: see `position`.
        joint: all views compete for V*K places; otherwise each view keeps K.
        layers: language layers, from 0, before which tokens are routed once more, or for the first time.
        layer_router: name of the router there; None is `name`.
        layer_budgets: tokens left at each of `layers`, as `budget`, of all tokens that the vision towers gave; () is
            `budget` at each.
        train_budgets: budgets of which every training step draws one (TokenFLEX); () is `budget` only.
        seed: of what is random.
        resample: whether other observations draw anew; False takes the same draw for all.
    """

    name: str | None = None
    budget: int | float = 0.25
    stage: Literal["encoder_out", "projector_out", "llm_layer"] | None = None
    options: Mapping[str, Any] | None = None
    mode: Literal["drop", "bypass"] = "drop"
    position: Literal["keep", "compact", "v2pe"] = "keep"
    position_step: float = 0.25
    joint: bool = False
    layers: tuple[int, ...] = ()
    layer_router: str | None = None
    layer_budgets: tuple[int | float, ...] = ()
    train_budgets: tuple[int | float, ...] = ()
    seed: int = 0
    resample: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "layer_budgets", "train_budgets"):
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
        if self.position_step <= 0:
            raise ValueError(f"router.position_step must be positive, got {self.position_step}")


def count_of(budget: int | float, tokens: int | None) -> int:
    """K of a budget (see `RouterConfig`) of so many tokens; None only checks that it is one."""
    whole = isinstance(budget, int) and not isinstance(budget, bool)
    if not isinstance(budget, int | float) or isinstance(budget, bool) or budget <= 0 or (not whole and budget > 1):
        raise ValueError(
            f"a router's budget is a whole number of tokens or a share in (0, 1], such as 16 or 0.25; got {budget!r}"
        )
    if tokens is None:
        return 0
    if whole and budget > tokens:
        raise ValueError(f"a router's budget of {budget} is above the {tokens} tokens there are; give 1 to {tokens}")
    return int(budget) if whole else max(1, round(budget * tokens))


@dataclass(frozen=True)
class RouterSizes:
    """What a router is built for.

    Attributes:
        tokens: N.
        width: D.
        text_width: E.
        grid: (H, W); None where tokens are no grid.
        budget: K, or the largest of several.
    """

    tokens: int
    width: int
    text_width: int
    grid: tuple[int, int] | None
    budget: int


@dataclass(frozen=True)
class RouterContext:
    """What a policy knows about the tokens. A router reads only what it `needs`; the rest is None.

    Attributes:
        budget: K.
        training: whether the policy is being trained.
        draw_B: int64, one number per row, which all randomness follows from (`routing.draws`).
        grid: (H, W), tokens are patches of one view in row order.
        text_BTE: the instruction's words in the language model's space, with `text_mask_BT`, False on padding.
        text_mask_BT: comes with `text_BTE`.
        projector: tokens of this stage [...,D] to the language width [...,E].
        encoder_BNW: tokens as the towers gave them, where the routed ones are projected already.
        attention_LBN: attention that every token gets: in a tower from [CLS], mean over heads, or where there is none
            the mean over patches; in the language model from the action tokens.
        received_BN: attention that every token gets from vision tokens, mean over heads and queries.
        attention_BNN: head-mean attention among vision tokens; rows are queries.
        keys_BNC: head-mean keys.
        pixels_B3HW: the picture, 0 to 255.
        score_BN: scores that the router before the language model gave the tokens still there.
        growth_BN: by how much the attention from the action tokens grew since the layer before.
        share_B2: of the attention of words and actions, the share that goes to vision tokens; and the converse.
        neurons_BNF: bool, neurons of the language layer's MLP that each vision token activates.
        text_neurons_BTF: the same of the words.
        history_BFND: tokens of F earlier observations, the oldest first.
    """

    budget: int
    training: bool = False
    draw_B: Tensor | None = None
    grid: tuple[int, int] | None = None
    text_BTE: Tensor | None = None
    text_mask_BT: Tensor | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    encoder_BNW: Tensor | None = None
    attention_LBN: Tensor | None = None
    received_BN: Tensor | None = None
    attention_BNN: Tensor | None = None
    keys_BNC: Tensor | None = None
    pixels_B3HW: Tensor | None = None
    score_BN: Tensor | None = None
    growth_BN: Tensor | None = None
    share_B2: Tensor | None = None
    neurons_BNF: Tensor | None = None
    text_neurons_BTF: Tensor | None = None
    history_BFND: Tensor | None = None


ITEMS = frozenset(f.name for f in fields(RouterContext)) - {"budget", "training", "text_mask_BT"}
"""What a router can need."""


@dataclass(frozen=True)
class RoutedTokens:
    """What is left.

    Attributes:
        tokens_BKD: in the precision of the tokens.
        index_BK: int64, which token each one is; -1 for a synthetic one.
        place_BK: where each stands among the N tokens, as a position: its index, or that of a synthetic token.
        score_BN: float32, higher is more worth keeping; None for a router that scores nothing.
        owner_BN: int64, the place in K that took a token in, -1 where it is lost; None where nothing is merged.
        mask_BK: False hides a token from all others, where the content decides how many stay (at language layers only);
            None: all are seen.
        losses: auxiliary objectives by name, already weighted; empty outside of training.
    """

    tokens_BKD: Tensor
    index_BK: Tensor
    place_BK: Tensor
    score_BN: Tensor | None = None
    owner_BN: Tensor | None = None
    mask_BK: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)


class TokenRouter(nn.Module, ABC):
    """Base of all routers. A subclass says what it needs and writes `route`; options are keywords of its constructor.

    Args:
        sizes: see there.
    """

    needs: frozenset[str] = frozenset()
    """Items of `RouterContext`."""
    stage: ClassVar[str] = "encoder_out"
    """Where it works if nothing else is said."""
    stages: ClassVar[tuple[str, ...]] = STAGES
    """Where it can work."""
    selects: ClassVar[bool] = True
    """Whether what it leaves are tokens that came in, and not new ones."""

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__()
        self.sizes = sizes

    def leaves(self, budget: int) -> int:
        """Tokens that are left for a budget; ValueError where this router cannot keep to it."""
        return budget

    def attention_blocks(self, depth: int) -> range:
        """Which of so many vision blocks `attention_LBN` is asked of."""
        return range(depth - 1, depth)

    @abstractmethod
    def route(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        """See `forward`."""

    def forward(self, tokens_BND: Tensor, context: RouterContext) -> RoutedTokens:
        """Route; autocast is off inside, so that scores are float32."""
        assert all(getattr(context, name) is not None for name in self.needs), f"{type(self).__name__} lacks context"
        with torch.autocast(tokens_BND.device.type, enabled=False):
            routed = self.route(tokens_BND, context)
        assert routed.tokens_BKD.shape[:2] == routed.index_BK.shape == routed.place_BK.shape
        return routed
