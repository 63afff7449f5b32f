"""A file of the user's own wordings: each instruction of a data set, with sentences that mean the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cogvla.configs.load import read_once
from cogvla.policy.inputs.tokenizer import same_instruction


def read_paraphrases(path: str | Path, instructions: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read a YAML or JSON file that maps instructions to lists of sentences, and check it against the data.

    Args:
        path: the file.
        instructions: distinct instructions of the data.

    Returns:
        The sentences of each instruction of the file, as the data writes it. Sentences that repeat the instruction or
        another sentence are left out.

    Raises:
        ValueError: the file is no such mapping, has an instruction that the data does not have or an instruction twice,
            an empty sentence, or a sentence of two instructions.
        OSError: the file cannot be read.
    """
    where = f"data.paraphrases={path}"
    values = read_once(Path(path), where)
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{where} must map each instruction to a list of sentences, got {_short(values)}")
    owners = {same_instruction(text): text for text in instructions}
    found: dict[str, tuple[str, ...]] = {}
    for key, sentences in values.items():
        text = owners.get(same_instruction(key)) if isinstance(key, str) else None
        if text is None:
            raise ValueError(f"{where}: the data has no instruction {key!r}; {_advice(key, instructions)}")
        if text in found:
            raise ValueError(f"{where} has the instruction {text!r} twice; put all its sentences into one list")
        found[text] = _sentences(f"{where}: {key!r}", sentences)
    said: dict[str, str] = dict(owners)
    for text, some in found.items():
        for sentence in some:
            other = said.setdefault(same_instruction(sentence), text)
            if other != text:
                raise ValueError(
                    f"{where}: {sentence!r} of {text!r} also means {other!r}; a policy cannot tell them apart. "
                    "Remove it, or word it so that it fits one of them"
                )
    return {
        text: tuple({same_instruction(s): s for s in some if same_instruction(s) != same_instruction(text)}.values())
        for text, some in found.items()
    }


def _sentences(where: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where} must have a list of sentences, got {_short(values)}")
    for number, sentence in enumerate(values, 1):
        if not isinstance(sentence, str):
            raise ValueError(f"{where}: sentence {number} is {_short(sentence)}, not a text; put it in quotes")
        if not same_instruction(sentence):
            raise ValueError(f"{where}: sentence {number} ({sentence!r}) has no words; write it, or remove it")
    return tuple(values)


def _advice(key: Any, instructions: Sequence[str]) -> str:
    close = get_close_matches(key, instructions, 1) if isinstance(key, str) else []
    if close:
        return f"the nearest is {close[0]!r}. Correct it, or remove the entry"
    some = ", ".join(repr(text) for text in instructions[:3])
    return f"it has {some}{', …' if len(instructions) > 3 else ''}. Correct it, or remove the entry"


def _short(value: Mapping[Any, Any] | Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
