"""Other wordings of the instructions: for training, and for validation those that training never uses.

All wordings of a data set are encoded once, and a step only draws indices of them.

Shape legend: B batch, T text, I instructions of the data, W wordings, O entries of the lists to draw from.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.inputs.tokenizer import UNKNOWN, Tokenizer, WordTokenizer, same_instruction
from cogvla.policy.instructions.paraphrase import LEVELS, reword, wordings

MOST = 0.7
"""Largest share of reworded samples: the data's own instructions must stay common."""
HELD_OUT = 6
"""Held-out wordings of an instruction: two of each level."""


@dataclass(frozen=True)
class InstructionAugmentation:
    """Other wordings of the instructions in training. The defaults change nothing.

    Attributes:
        share: share of the samples in [0,0.7] whose instruction is reworded, if it has other wordings.
        count: number of wordings of each instruction that the grammar makes; 0: only those of `data.paraphrases`.
        unknown: share of the words in [0,0.5] of reworded instructions that become the unknown word.
            Words that training never saw then do less harm. Tokenizers of pretrained language models need none.
    """

    share: float = 0.0
    count: int = 64
    unknown: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.share <= MOST:
            raise ValueError(f"wordings.share must be in [0,{MOST}], got {self.share}")
        if self.count < 0:
            raise ValueError(f"wordings.count must be at least 0, got {self.count}")
        if not 0 <= self.unknown <= 0.5:
            raise ValueError(f"wordings.unknown must be in [0,0.5], got {self.unknown}")


def training_wordings(data: DemonstrationData, config: InstructionAugmentation) -> dict[str, tuple[str, ...]]:
    """Return the wordings of each instruction for training: itself, then the user's, then those of the grammar.

    Raises:
        ValueError: the data has wordings that the configuration does not use.
    """
    if not config.share:
        if data.paraphrases:
            raise ValueError(
                "data.paraphrases needs wordings.share above 0: choose wordings=paraphrased, or leave the file out"
            )
        return {text: (text,) for text in data.instructions}
    made = wordings(data.instructions, config.count)
    return {text: (text, *data.paraphrases.get(text, ()), *made[text]) for text in data.instructions}


class Wordings:
    """The wordings of each instruction of a data set, as token ids.

    Args:
        data: gives the instructions, and the user's own wordings.
        tokenizer: tokenizer of the policy.
        config: shares and number.

    Attributes:
        texts: the wordings of each instruction, the data's own first.
        group_I: number of each instruction, equal for equal ones.

    Raises:
        ValueError: the tokenizer gives a wording of `data.paraphrases` the ids of another instruction's. Wordings of
            the grammar are left out in this case.
    """

    def __init__(self, data: DemonstrationData, tokenizer: Tokenizer, config: InstructionAugmentation) -> None:
        self.tokenizer, self.config, self.instructions = tokenizer, config, data.instructions
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(same_instruction(text), i) for i, text in enumerate(data.instructions)]
        self.group_I = torch.tensor(groups)
        self.texts = self._distinct(data, groups) if config.share else [[text] for text in data.instructions]
        self._ids_WT, self._mask_WT = tokenizer.inputs([text for some in self.texts for text in some])
        size_I = torch.tensor([len(some) for some in self.texts])
        self._own_I = size_I.cumsum(0) - size_I
        options = []
        for own, some, text in zip(self._own_I.tolist(), self.texts, data.instructions, strict=True):
            users = set(data.paraphrases.get(text, ()))
            theirs = [own + i for i, other in enumerate(some) if i and other in users]
            made = [own + i for i, other in enumerate(some) if i and other not in users]
            repeat = max(1, round(len(made) / max(1, len(theirs))))  # the user's get at least half of the draws
            options.append(theirs * repeat + made or [own])
        self._options_O = torch.tensor([row for some in options for row in some])
        self._length_I = torch.tensor([len(some) for some in options])
        self._first_I = self._length_I.cumsum(0) - self._length_I
        self._unknown = tokenizer.words.index(UNKNOWN) if isinstance(tokenizer, WordTokenizer) else None

    def draw(self, instruction_B: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """Draw the wording of each sample [B], and which words become unknown [B,T]; None without other wordings."""
        if not self.config.share:
            return None, None
        share_B, place_B = torch.rand(2, len(instruction_B), generator=generator, dtype=torch.float64)
        place_B = (place_B * self._length_I[instruction_B]).long()
        own_B, other_B = self._own_I[instruction_B], self._options_O[self._first_I[instruction_B] + place_B]
        wording_B = torch.where(share_B < self.config.share, other_B, own_B)
        unknown_BT = torch.rand(len(instruction_B), self._ids_WT.shape[1], generator=generator) < self.config.unknown
        return wording_B, unknown_BT & (wording_B != own_B)[:, None]

    def text(
        self, instruction_B: Tensor, wording_B: Tensor | None = None, unknown_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return inputs and mask [B,T] of wordings (None: of the instructions), padded to the longest of them."""
        rows_B = self._own_I[instruction_B] if wording_B is None else wording_B
        ids_BT, mask_BT = _rows(self._ids_WT, self._mask_WT, rows_B)
        if unknown_BT is not None and self._unknown is not None:
            ids_BT = ids_BT.masked_fill(unknown_BT[:, : ids_BT.shape[1]] & mask_BT, self._unknown)
        return ids_BT, mask_BT

    def held_out(self, instruction_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and mask [B,T] of held-out wordings, the same in every call."""
        return _rows(*self._held_out, instruction_B * HELD_OUT + torch.arange(len(instruction_B)) % HELD_OUT)

    def fingerprint(self) -> str:
        """Return a fingerprint of all wordings and their ids."""
        ids_WT, _ = self.tokenizer.encode([text for some in self.texts for text in some])
        content = json.dumps([self.texts, ids_WT.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def _held_out(self) -> tuple[Tensor, Tensor]:
        among = tuple(self.instructions)
        return self.tokenizer.inputs(
            [
                reword(text, LEVELS[number % len(LEVELS)], random.Random(f"{number} {text}"), among)
                for text in self.instructions
                for number in range(HELD_OUT)
            ]
        )

    def _distinct(self, data: DemonstrationData, groups: list[int]) -> list[list[str]]:
        """Return the wordings of each instruction whose ids are those of no other instruction."""
        worded = training_wordings(data, self.config)
        owner: dict[tuple[int, ...], tuple[int, str]] = {}
        kept: list[list[str]] = [[] for _ in groups]
        users = {text: set(some) for text, some in data.paraphrases.items()}
        entries = [(i, text, other) for i, text in enumerate(data.instructions) for other in worded[text]]
        entries.sort(key=lambda entry: 0 if entry[2] == entry[1] else 1 if entry[2] in users.get(entry[1], ()) else 2)
        for i, text, other in entries:
            ids_1T, _ = self.tokenizer.encode([other])
            number, first = owner.setdefault(tuple(ids_1T[0].tolist()), (groups[i], other))
            if number == groups[i] or other == text:
                kept[i].append(other)
            elif other in users.get(text, ()):
                raise ValueError(
                    f"data.paraphrases: the policy cannot tell {other!r} of {text!r} from {first!r} of "
                    f"{data.instructions[number]!r}: the tokenizer gives both the same ids. Use other words"
                )
        return kept


def _rows(ids_WT: Tensor, mask_WT: Tensor, rows_B: Tensor) -> tuple[Tensor, Tensor]:
    longest = int(mask_WT[rows_B].sum(1).max())
    return ids_WT[rows_B, :longest], mask_WT[rows_B, :longest]
