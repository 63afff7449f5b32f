"""Tell for every vision token where a policy stopped to use it, and by which score.

Shape legend: N tokens before routing, n tokens to choose from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenChoice:
    """One choice of tokens at one decision of the policy; tokens have the numbers of `routing_recording`.

    Attributes:
        stage: `router` before the language model, or `layer 3` and who chose there.
        among: tokens to choose from, int64 [n].
        kept: tokens that were kept, int64.
        score: scores of the tokens to choose from, float [n], higher is more worth keeping; None: there are none.
        gone: the others are removed; False: they skip this layer.
        merged: bool [n], tokens whose content a new or kept token took; None: nothing is merged.
        rows: tokens compete within each of this number of equal parts, the views.
    """

    stage: str
    among: Tensor
    kept: Tensor
    score: Tensor | None
    gone: bool
    merged: Tensor | None = None
    rows: int = 1


@dataclass(frozen=True)
class NotKept:
    """A choice that did not keep a token.

    Attributes:
        stage: stage of the choice.
        gone: the token is removed; False: it skips this layer.
        merged: a new or kept token took its content.
        score: its score; None: the method has no scores.
        lowest: lowest score that was kept, among those that it competed with.
        highest: highest score that was not kept; above `lowest` if the method does not simply rank.
    """

    stage: str
    gone: bool
    merged: bool
    score: float | None
    lowest: float | None
    highest: float | None


def choices_of(inside: Mapping[str, Any], entering_n: Tensor, tokens: int, rows: int) -> tuple[TokenChoice, ...]:
    """Return the choices of a traced pass of one sample.

    Args:
        inside: `ModelOutput.debug`.
        entering_n: tokens that enter the language model.
        tokens: N.
        rows: number of parts, the views, that a router before the language model routes separately.
    """
    found = []
    if (routed := inside.get("routed")) is not None:
        index_n, everything = routed.index_Bn[0], torch.arange(tokens, device=entering_n.device)
        score = None if routed.score_BN is None else routed.score_BN[0]
        merged = None if routed.owner_BN is None else routed.owner_BN[0] >= 0
        found.append(TokenChoice("router", everything, index_n[index_n >= 0], score, True, merged, rows))
    for choice in inside["choices"]:
        among_n = entering_n if choice.among_BN is None else entering_n[choice.among_BN[0]]
        score = None if choice.score_BN is None else choice.score_BN[0]
        stage = f"layer {choice.layer}, {choice.by}"
        found.append(TokenChoice(stage, among_n, entering_n[choice.kept_Bn[0]], score, choice.gone))
    return tuple(found)


def fates(choices: Sequence[TokenChoice], tokens: int) -> list[tuple[NotKept, ...]]:
    """Return the choices that did not keep each of the N tokens, in order; the last one may have removed it."""
    found: list[list[NotKept]] = [[] for _ in range(tokens)]
    for choice in choices:
        kept, among = set(choice.kept.tolist()), choice.among.tolist()
        score = [None] * len(among) if choice.score is None else [float(value) for value in choice.score]
        merged = [False] * len(among) if choice.merged is None else choice.merged.tolist()
        size = max(1, len(among) // choice.rows)
        bounds = [_bounds(among[i : i + size], score[i : i + size], kept) for i in range(0, len(among), size)]
        for place, token in enumerate(among):
            if token not in kept and not (found[token] and found[token][-1].gone):
                told = choice.stage, choice.gone, merged[place], score[place], *bounds[place // size]
                found[token].append(NotKept(*told))
    return [tuple(each) for each in found]


def _bounds(
    tokens: Sequence[int], scores: Sequence[float | None], kept: Collection[int]
) -> tuple[float | None, float | None]:
    """Return the lowest score that was kept, and the highest that was not."""
    known = [(token in kept, score) for token, score in zip(tokens, scores, strict=True) if score is not None]
    stay, fall = ([score for there, score in known if there == which] for which in (True, False))
    return min(stay, default=None), max(fall, default=None)
