"""Tell for every vision token where a policy stopped to use it, and by which score.

Shape legend: N tokens before routing, n tokens to choose from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvla.routing.router import RoutedTokens


@dataclass(frozen=True)
class TokenChoice:
    """One choice of tokens at one decision of the policy; tokens have the numbers of `routing_recording`.

    Attributes:
        stage: `router` before the language model, or `layer 3` and who chose there.
        among: tokens to choose from, int64 [n]; those that an earlier router made have negative numbers.
        kept: those of them that were kept and not hidden, int64.
        score: scores of the tokens to choose from, float [n], higher is more worth keeping; None: there are none.
        gone: the others are removed; False: they skip this layer.
        merged: bool [n], tokens whose content a new or kept token took; None: nothing is merged.
        hidden: tokens that were kept, but hidden from all others, int64; None: none is hidden.
        rows: tokens compete within each of this number of equal parts, the views.
    """

    stage: str
    among: Tensor
    kept: Tensor
    score: Tensor | None
    gone: bool
    merged: Tensor | None = None
    hidden: Tensor | None = None
    rows: int = 1


@dataclass(frozen=True)
class NotKept:
    """A choice that did not keep a token.

    Attributes:
        stage: stage of the choice.
        gone: nothing reads the token any more; False: it skips this layer.
        merged: a new or kept token took its content.
        score: its score; None: the method has no scores.
        lowest: lowest score that was kept, among those that it competed with.
        highest: highest score that was not kept; above `lowest` if the method does not simply rank. Both are None if no
            token was kept.
        hidden: it is hidden, not removed.
    """

    stage: str
    gone: bool
    merged: bool
    score: float | None
    lowest: float | None
    highest: float | None
    hidden: bool = False


def choices_of(inside: Mapping[str, Any], entering_n: Tensor, tokens: int, rows: int) -> tuple[TokenChoice, ...]:
    """Return the choices of a traced pass of one sample.

    Args:
        inside: `ModelOutput.debug`.
        entering_n: tokens that enter the language model; new ones have the number of their place.
        tokens: N.
        rows: number of parts, the views, that a router before the language model routes separately.
    """
    found = []
    if (routed := inside.get("routed")) is not None:
        everything_n, index_n = torch.arange(tokens, device=entering_n.device), routed.index_Bn[0]
        found.append(_choice("router", everything_n, index_n, routed.score_BN, True, routed, rows))
        entering_n = index_n
    for choice in inside["choices"]:
        among_n = entering_n if choice.among_BN is None else entering_n[choice.among_BN[0]]
        if choice.new_BN is not None:
            among_n = among_n.masked_fill(choice.new_BN[0], -1)
        among_n = torch.where(among_n < 0, -1 - torch.arange(len(among_n), device=among_n.device), among_n)
        told = among_n, choice.index_Bn[0], choice.score_BN, choice.gone, choice.routed
        found.append(_choice(f"layer {choice.layer}, {choice.by}", *told))
    return tuple(found)


def _choice(
    stage: str,
    among_n: Tensor,
    index_n: Tensor,
    score_BN: Tensor | None,
    gone: bool,
    routed: RoutedTokens | None,
    rows: int = 1,
) -> TokenChoice:
    """Return a choice that left these tokens, by their places in `among_n`; -1 for new ones."""
    score_n, merged_n, hidden_n, kept = None if score_BN is None else score_BN[0], None, None, index_n >= 0
    if routed is not None:
        if routed.owner_BN is not None:
            merged_n = routed.owner_BN[0] >= 0
        elif len(kept) and not kept.any():  # without owners, new tokens take something of all
            merged_n = torch.ones_like(among_n, dtype=torch.bool)
        if routed.mask_Bn is not None:
            hidden_n = among_n[index_n[kept & ~routed.mask_Bn[0]]]
            kept = kept & routed.mask_Bn[0]
    elif score_n is not None:  # LFP keeps hidden tokens, whose score is -inf, where too few others are left
        kept = score_n[index_n] > -math.inf
    return TokenChoice(stage, among_n, among_n[index_n[kept]], score_n, gone, merged_n, hidden_n, rows)


def fates(choices: Sequence[TokenChoice], tokens: int) -> list[tuple[NotKept, ...]]:
    """Return the choices that did not keep each of the N tokens, in order; the last one may have removed it."""
    found: list[list[NotKept]] = [[] for _ in range(tokens)]
    for choice in choices:
        kept, among = set(choice.kept.tolist()), choice.among.tolist()
        hidden = set() if choice.hidden is None else set(choice.hidden.tolist())
        score = [None] * len(among) if choice.score is None else [float(value) for value in choice.score]
        merged = [False] * len(among) if choice.merged is None else choice.merged.tolist()
        size = max(1, len(among) // choice.rows)
        bounds = [_bounds(among[i : i + size], score[i : i + size], kept) for i in range(0, len(among), size)]
        for place, token in enumerate(among):
            if token >= 0 and token not in kept and not (found[token] and found[token][-1].gone):
                told = choice.stage, choice.gone, merged[place], score[place], *bounds[place // size], token in hidden
                found[token].append(NotKept(*told))
    return [tuple(each) for each in found]


def _bounds(
    tokens: Sequence[int], scores: Sequence[float | None], kept: Collection[int]
) -> tuple[float | None, float | None]:
    """Return the lowest score that was kept, and the highest that was not; (None, None) if no token was kept."""
    known = [
        (token in kept, score)
        for token, score in zip(tokens, scores, strict=True)
        if score is not None and score > -math.inf
    ]
    stay, fall = ([score for there, score in known if there == which] for which in (True, False))
    return (min(stay), max(fall, default=None)) if stay else (None, None)
