"""Checks of the training data: instructions that a policy cannot tell apart, and what normalisation makes of actions.

Shape legend: N frames, D state or action dimension, I instructions, 2 minimum and maximum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.inputs.normalise import Statistics, normalisers, of_each, rarely_used
from cogvla.policy.inputs.tokenizer import Tokenizer, same_instruction
from cogvla.policy.interface import Embodiment

CLIPPED, BEYOND, LISTED = 0.05, 0.25, 5
"""Share of an instruction's frames that is worth a note; how far outside, in widths of the range; longest list."""
BEYOND_TOKENS = 0.01
"""How far outside of -1 to 1 an action may be without a note: about one token of the discrete head."""


def check_instructions(tokenizer: Tokenizer, data: DemonstrationData) -> None:
    """Check the instructions of all frames with `check_texts`; ValueError names the first wrong ones."""
    present, rows = np.unique(data.instruction_N.numpy(), return_index=True)
    check_texts(
        tokenizer,
        [(data.instructions[i], data.episode_name(int(row))) for i, row in zip(present, rows, strict=True)],
    )


def check_texts(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> None:
    """Check that every instruction has words, and that different instructions have different token ids.

    Instructions that differ only in case, spaces, or punctuation beside words count as equal.

    Args:
        tokenizer: tokenizer of the policy.
        texts: instructions, each with the name of an episode that has it.

    Raises:
        ValueError: one is empty, or two have the same ids; the message names the episodes.
    """
    seen: dict[tuple[int, ...], tuple[str, str]] = {}
    for text, episode in texts:
        if not same_instruction(text):
            raise ValueError(
                f"{episode} of the data has the instruction {text!r}, which has no words: record what the robot is "
                "asked to do, or leave the episode out"
            )
        ids_1T, _ = tokenizer.encode([text])
        other, first = seen.setdefault(tuple(ids_1T[0].tolist()), (text, episode))
        if same_instruction(other) != same_instruction(text):
            raise ValueError(
                f"the policy cannot tell {other!r} ({first} of the data) from {text!r} ({episode}): the tokenizer "
                "gives both the same ids. Write the difference in words that it knows"
            )


def check_tokens(data: DemonstrationData, embodiment: Embodiment) -> None:
    """Check that a head of tokens, which stand for -1 to 1, can express all actions of the data; else ValueError."""
    for statistics in of_each(data.statistics()).values():
        low_D, high_D = statistics["action"].min, statistics["action"].max
        ends_2D = normalisers(embodiment, statistics)[1](torch.tensor([low_D, high_D]))
        beyond = (ends_2D.abs() > 1 + BEYOND_TOKENS).any(0).nonzero().flatten().tolist()
        if beyond:
            d = beyond[0]
            raise ValueError(
                f"head.kind=discrete has tokens for normalised actions from -1 to 1, but action {d} is not normalised, "
                f"and goes from {low_D[d]:.4g} to {high_D[d]:.4g}: set embodiment.action_normalisation=q99 or min_max "
                "and its action_normalise_mask, or choose another head"
            )


def rare_dimensions(data: DemonstrationData, embodiment: Embodiment) -> list[str]:
    """Return a line for each dimension whose range of normalisation is not q01 to q99, because it rests nearly always.

    The lines are about dimensions that the embodiment normalises by q99; see `Statistics.of`.
    """
    if data.each:
        return [f"{name}: {line}" for name, one in _sets(data) for line in rare_dimensions(one, embodiment)]
    everything = (True,) * embodiment.state_dim
    lines = []
    for name, values_ND, kind, mask in (
        ("state", data.state_NS, embodiment.state_normalisation, everything),
        ("action", data.action_NA, embodiment.action_normalisation, embodiment.action_normalise_mask),
    ):
        if kind != "q99":
            continue
        x_ND = values_ND[data.all_rows].numpy()
        statistics, rare_2D = Statistics.of(x_ND), rarely_used(x_ND)
        for d in np.flatnonzero(rare_2D.any(0) & np.array(mask)):
            used = " and ".join(word for word, rare in zip(("minimum", "maximum"), rare_2D[:, d], strict=True) if rare)
            lines.append(
                f"{name} {d} rests near {np.median(x_ND[:, d]):.4g} in nearly all frames: it is normalised from "
                f"{statistics.q01[d]:.4g} to {statistics.q99[d]:.4g}, with its {used} in place of the quantile"
            )
    return lines


def clipped_instructions(data: DemonstrationData, embodiment: Embodiment) -> list[str]:
    """Return a line for each instruction many of whose actions are far outside of q01 to q99, where they are clipped.

    Quantiles are those of all data: what only one of many tasks needs, such as turning the hand, may be lost.
    """
    if data.each:
        return [f"{name}: {line}" for name, one in _sets(data) for line in clipped_instructions(one, embodiment)]
    if embodiment.action_normalisation != "q99":
        return []
    x_ND, instruction_N = data.action_NA[data.all_rows].numpy(), data.instruction_ids.numpy()
    statistics = Statistics.of(x_ND)
    low_D, high_D = np.array(statistics.q01), np.array(statistics.q99)
    margin_D = BEYOND * (high_D - low_D)
    outside_ND = ((x_ND < low_D - margin_D) | (x_ND > high_D + margin_D)) & np.array(embodiment.action_normalise_mask)
    counts_I = np.maximum(np.bincount(instruction_N), 1)
    share_DI = np.stack([np.bincount(instruction_N, outside_N) for outside_N in outside_ND.T]) / counts_I
    worst_I, share_I = share_DI.argmax(0), share_DI.max(0)
    found = [i for i in np.argsort(-share_I, kind="stable") if share_I[i] > CLIPPED]
    if not found:
        return []
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    said = "; ".join(f"{data.instructions[i]!r}: {share_I[i]:.0%} of action {worst_I[i]}" for i in found[:LISTED])
    ranges = ", ".join(f"{d}: {low_D[d]:.3g} to {high_D[d]:.3g}" for d in sorted(set(worst_I[found])))
    return [
        f"normalisation by q01 to q99 (action {ranges}) clips what some instructions need: {said}{more}; "
        "embodiment.action_normalisation=min_max keeps it"
    ]


def _sets(data: DemonstrationData) -> list[tuple[str, DemonstrationData]]:
    """Return each data set of a mixture, with its name, as data of its own."""
    rows = data.all_rows
    return [(p.name, replace(data, rows=rows[p.holds(rows)], each=False)) for p in data.parts]
