"""Tokenizers, which convert instructions to token ids.

There are two: a word tokenizer for policies that are trained from scratch, whose vocabulary is the words of the
training data; and a wrapper for the tokenizer of a pretrained language model, with the paper's prompt. A third one
computes states instead of ids (`policy.inputs.text_encoder`).

Shape legend: B batch, T text length, E width of a text encoder.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvla.policy.inputs.pretrained_source import load_pretrained
from cogvla.policy.interface import InstructionError

PAD, UNKNOWN = "<pad>", "<unk>"
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
)  # fmt: skip
"""Patterns of the files that a pretrained tokenizer is saved in."""
PAPER_PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
EMPTY_TOKEN = 29871
"""Llama's empty token, which OpenVLA and policies based on it append to the prompt."""
SIGNS = frozenset("+-#%&*/<=>@$\\^|~")
"""ASCII characters that are words of their own, `-` only as the sign of a number. Other ASCII separates words."""
UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x31FF),  # kana, Bopomofo
    (0x3400, 0x9FFF),  # Chinese characters
    (0x20000, 0x3FFFF),
)
"""First and last character of scripts without spaces between words. Each of their letters is a word."""
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_MEANINGFUL = ("<super>", "<sub>", "<fraction>", "<circle>", "<square>")
_WORD = re.compile("[wd][wdm]*|um*|s|(?<![wdum])-(?=d)")
"""A word, in the kinds of characters that `_kind` returns."""


class Tokenizer(ABC):
    """Interface of tokenizers and text encoders."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of known tokens."""

    @abstractmethod
    def encode(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode B instructions as ids int64 [B,T] and mask bool [B,T] (True: a token), padded on the right.

        Raises:
            InstructionError: an instruction without words.
        """

    def inputs(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the network reads, ids [B,T] or the states [B,T,E] of a text encoder, and the mask [B,T]."""
        return self.encode(instructions)

    @abstractmethod
    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text that the tokenizer does not know, each once."""

    @abstractmethod
    def spelled(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return a description for `config.json`."""


class WordTokenizer(Tokenizer):
    """Splits instructions into words in any script; words that are not in the vocabulary become `<unk>`.

    - Case, other forms of a letter (full width, ligatures) and invisible characters make no difference.
    - A word is a run of letters, digits and apostrophes, in scripts without spaces (`UNSPACED`) a single letter, else
      a symbol such as an emoji, a unit or one of `SIGNS`. Punctuation separates words.
    - A sign of ASCII that is not in the vocabulary is left out, as policies expect that were trained without any.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if list(words[:2]) != [PAD, UNKNOWN] or len(set(words)) != len(words):
            raise ValueError(
                f"a vocabulary must start with {PAD}, {UNKNOWN} and have no word twice; got {list(words)[:4]}…"
            )
        self.words = tuple(words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def from_instructions(cls, instructions: Iterable[str]) -> WordTokenizer:
        """Build a tokenizer for the words of these instructions, in alphabetical order, the signs after the words."""
        return cls([PAD, UNKNOWN, *_vocabulary(instructions)])

    def with_words_of(self, instructions: Iterable[str]) -> WordTokenizer:
        """Return a tokenizer that also knows the words of these instructions; known words keep their ids."""
        return WordTokenizer([*self.words, *(word for word in _vocabulary(instructions) if word not in self._ids)])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [
            [self._ids.get(word, 1) for word in _split(text) if word in self._ids or word not in SIGNS]
            for text in instructions
        ]
        for text, row in zip(instructions, rows, strict=True):
            if not row:
                raise InstructionError(f"instruction {text!r} has no words; give the robot something to do")
        return _pad(rows, pad_id=0)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text that become `<unk>`, each once."""
        return [word for word in dict.fromkeys(_split(text)) if word not in self._ids]

    def spelled(self, ids: Sequence[int]) -> list[str]:
        """Return the word of each id; `<unk>` for unknown ids."""
        return [self.words[i] if i < len(self.words) else UNKNOWN for i in ids]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "words", "words": list(self.words)}


class TransformersTokenizer(Tokenizer):
    """Base of the tokenizers of pretrained models.

    Args:
        source: hub id, folder or GGUF file.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(self, source: str) -> None:
        from transformers import AutoTokenizer

        self.source = source
        self._tokenizer = load_pretrained(AutoTokenizer, source)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text with a part that becomes the unknown token, each once; most have none."""
        unknown, encode = self._tokenizer.unk_token_id, self._tokenizer
        words = dict.fromkeys(text.lower().split())
        return [word for word in words if unknown in encode(word, add_special_tokens=False).input_ids]

    def spelled(self, ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.decode([i]).strip() for i in ids]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return _pad(rows, pad_id=self._tokenizer.pad_token_id or 0)


class PretrainedTokenizer(TransformersTokenizer):
    """The tokenizer of a pretrained language model, with the prompt of OpenVLA and CogVLA.

    It does not add BOS, because the token layout adds it.

    Args:
        source: hub id, folder or GGUF file of the tokenizer.
        prompt: text with `{instruction}`.
        empty_token: id that is appended to the prompt unless it is its last token, as in OpenVLA (29871 for Llama-2);
            None: nothing.
    """

    def __init__(self, source: str, prompt: str = PAPER_PROMPT, empty_token: int | None = None) -> None:
        if "{instruction}" not in prompt:
            raise ValueError("the prompt must contain {instruction}")
        super().__init__(source)
        self.prompt, self.empty_token = prompt, empty_token

    def encode(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = []
        for text in instructions:
            check_not_empty(text)
            prompt = self.prompt.format(instruction=text.strip().lower())
            row = list(self._tokenizer(prompt, add_special_tokens=False).input_ids)
            if self.empty_token is not None and row[-1:] != [self.empty_token]:
                row.append(self.empty_token)
            rows.append(row)
        return self._padded(rows)

    def save(self, folder: Path) -> None:
        """Save the tokenizer's files in a checkpoint, so that it can be loaded without the hub."""
        self._tokenizer.save_pretrained(folder)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "pretrained",
            "source": self.source,
            "prompt": self.prompt,
            "empty_token": self.empty_token,
        }


def tokenizer_from_dict(description: dict[str, Any], folder: Path | None = None) -> Tokenizer:
    """Rebuild a tokenizer from a checkpoint's `config.json`; `folder` holds a pretrained one's files."""
    match description.get("kind"):
        case "words":
            return WordTokenizer(description["words"])
        case "pretrained":
            local = folder is not None and (folder / "tokenizer_config.json").exists()
            return PretrainedTokenizer(
                str(folder) if local else description["source"], description["prompt"], description["empty_token"]
            )
        case other:
            raise ValueError(f"unknown tokenizer kind {other!r}; one of words, pretrained")


def same_instruction(text: str) -> str:
    """Return what is equal for spellings of one instruction: case, spaces, and punctuation beside words are ignored."""
    parts = []
    for part in _normalised(text).split():
        first, last = (re.search("[^ ]", kinds) for kinds in (_kinds(part), _kinds(part)[::-1]))
        if first and last:
            parts.append(part[first.start() : len(part) - last.start()])
    return " ".join(parts)


def check_not_empty(text: str) -> None:
    """Raise InstructionError if an instruction has no words."""
    if not _split(text):
        raise InstructionError(f"instruction {text!r} has no words; give the robot something to do")


def _split(text: str) -> list[str]:
    text = _normalised(text)
    return [text[match.start() : match.end()] for match in _WORD.finditer(_kinds(text))]


def _vocabulary(instructions: Iterable[str]) -> list[str]:
    words = {word for text in instructions for word in _split(text)}
    return sorted(words, key=lambda word: (word in SIGNS, word))


def _normalised(text: str) -> str:
    """Return the text in one form: composed, in lower case, without invisible characters, with plain apostrophes.

    Full width, ligatures and the like become plain letters; 10\u00b2 does not become 102, nor \u2460 1.
    """
    visible = "".join(c for c in _INVISIBLE.sub("", text) if unicodedata.category(c) != "Cf")
    plain = "".join(
        c if unicodedata.decomposition(c).startswith(_MEANINGFUL) else unicodedata.normalize("NFKC", c)
        for c in unicodedata.normalize("NFC", visible)
    )
    folded = unicodedata.normalize("NFC", plain.casefold())
    return re.sub(r"(?<=\w)[\u2019\u02bc](?=\w)", "'", folded).replace("\u2212", "-")


def _kinds(text: str) -> str:
    return "".join(_kind(character) for character in text)


def _kind(character: str) -> str:
    """Return w: letter, u: letter of an unspaced script, d: digit, m: mark, s: symbol, - or a space: separator."""
    major = unicodedata.category(character)[0]
    if character.isascii():
        if character in SIGNS:
            return "-" if character == "-" else "s"
        return {"L": "w", "N": "d"}.get(major, "w" if character == "'" else " ")
    if major == "L" and any(first <= ord(character) <= last for first, last in UNSPACED):
        return "u"
    if unicodedata.category(character) == "Cc":
        return " "
    return {"L": "w", "N": "d", "M": "m", "P": " ", "Z": " "}.get(major, "s")


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    ids_BT = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], dtype=torch.long)
    mask_BT = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids_BT, mask_BT
