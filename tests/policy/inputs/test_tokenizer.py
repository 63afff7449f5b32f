"""Instructions to ids: the word tokenizer, and a small pretrained one."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cogvla.policy.inputs.tokenizer import (
    PAD,
    UNKNOWN,
    PretrainedTokenizer,
    WordTokenizer,
    same_instruction,
    tokenizer_from_dict,
)

INSTRUCTIONS = ["Put the red cube on the plate", "open the drawer"]
PROMPT = "do {instruction} now"
KNOWN = ["cube", "drawer", "on", "open", "plate", "put", "red", "the"]


@pytest.fixture
def pretrained_folder(tmp_path: Path) -> Path:
    """A tokenizer in the format of the hub, which puts a BOS in front as Llama's does."""
    words = ["<unk>", "<s>", "</s>", "<p>", "do", "now", "open", "the", "drawer", "put", "cube", "away"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", pad_token="<p>")
    fast.save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def test_words_in_alphabetical_order_after_two_special_ones() -> None:
    tokenizer = WordTokenizer.from_instructions(INSTRUCTIONS)
    assert tokenizer.words == (PAD, UNKNOWN, "cube", "drawer", "on", "open", "plate", "put", "red", "the")
    assert WordTokenizer.from_instructions(INSTRUCTIONS[::-1]).words == tokenizer.words
    assert len(tokenizer) == 10


def test_ids_mask_and_padding() -> None:
    ids_BT, mask_BT = WordTokenizer.from_instructions(INSTRUCTIONS).encode(["open the drawer!", "PUT cube"])
    assert ids_BT.tolist() == [[5, 9, 3], [7, 2, 0]]
    assert mask_BT.tolist() == [[True, True, True], [True, True, False]]
    assert ids_BT.dtype == torch.int64
    assert mask_BT.dtype == torch.bool


def test_unknown_words_are_marked_and_count() -> None:
    ids_BT, mask_BT = WordTokenizer.from_instructions(INSTRUCTIONS).encode(["open the fridge"])
    assert ids_BT.tolist() == [[5, 9, 1]]
    assert mask_BT.all()


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("Open the drawer!", []),
        ("open the fridge, then the Fridge", ["fridge", "then"]),
        ("stir soup", ["stir", "soup"]),
    ],
)
def test_unknown_words_are_named_once(text: str, unknown: list[str]) -> None:
    assert WordTokenizer.from_instructions(INSTRUCTIONS).unknown_words(text) == unknown


def test_unknown_words_of_a_pretrained_tokenizer(pretrained_folder: Path) -> None:
    tokenizer = PretrainedTokenizer(str(pretrained_folder), PROMPT)
    assert tokenizer.unknown_words("Open the drawer") == []
    assert tokenizer.unknown_words("open a fridge a") == ["a", "fridge"]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(KNOWN), min_size=1), min_size=1))
def test_known_words_come_back(sentences: list[list[str]]) -> None:
    tokenizer = WordTokenizer.from_instructions(INSTRUCTIONS)
    ids_BT, mask_BT = tokenizer.encode([" ".join(words) for words in sentences])
    assert [[tokenizer.words[i] for i in ids[mask]] for ids, mask in zip(ids_BT, mask_BT, strict=True)] == sentences


def spelled(text: str, *known: str) -> list[str]:
    """The words of an instruction, for a policy that was trained with the instructions `known` (none: with it)."""
    tokenizer = WordTokenizer.from_instructions(known or [text])
    return tokenizer.spelled(tokenizer.encode([text])[0][0].tolist())


@settings(deadline=None)
@given(st.text(string.printable, min_size=1))
def test_words_of_ascii_are_what_they_always_were(text: str) -> None:
    before = re.findall(r"[a-z0-9']+", text.lower())
    if before:
        assert spelled(text, " ".join(before)) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("拿起红色的方块10", ["拿", "起", "红", "色", "的", "方", "块", "10"]),
        ("赤いﾌﾞﾛｯｸを取る。", ["赤", "い", "ブ", "ロ", "ッ", "ク", "を", "取", "る"]),
        ("หยิบสีแดง", ["ห", "ยิ", "บ", "สี", "แ", "ด", "ง"]),
        ("빨간 블록을 집어", ["빨간", "블록을", "집어"]),
        ("लाल गेंद उठाओ", ["लाल", "गेंद", "उठाओ"]),
        ("\u200fارفع الكتلة الحمراء\u200e", ["ارفع", "الكتلة", "الحمراء"]),
        ("Подними «красный» куб", ["подними", "красный", "куб"]),
        ("Cafe\u0301 ＡＢ１２ ﬁsh STRASSE", ["café", "ab12", "fish", "strasse"]),
        ("don’t pick up the ‘red’ one", ["don't", "pick", "up", "the", "red", "one"]),
        ("the 🔴\ufe0f block, not the 🔵", ["the", "🔴", "block", "not", "the", "🔵"]),
        ("turn by -5° or \u22125°, left-right", ["turn", "by", "-", "5", "°", "or", "-", "5", "°", "left", "right"]),
        ("A/B + 10² ½ ①", ["a", "/", "b", "+", "10²", "½", "①"]),
        ("put\n\tthe\u00a0\u200bcu\u00adbe\r\n", ["put", "the", "cube"]),
        ("put the cube " * 1000, ["put", "the", "cube"] * 1000),
    ],
)
def test_words_of_all_scripts(text: str, words: list[str]) -> None:
    assert spelled(text) == words


@pytest.mark.parametrize("text", ["红", "café", "caf\u00e9s", "🔴", "°", "२", "куб"])
def test_what_a_policy_has_not_learned_is_marked_and_not_left_out(text: str) -> None:
    assert spelled(f"pick up {text}", "pick up the cafe") == ["pick", "up", UNKNOWN]


def test_signs_come_after_the_words_and_only_learned_ones_count() -> None:
    words = WordTokenizer.from_instructions(["turn by +5", "turn by -5 now"]).words
    assert words == (PAD, UNKNOWN, "5", "by", "now", "turn", "+", "-")
    assert spelled("turn by +5", "turn by 5") == ["turn", "by", "5"]
    assert WordTokenizer(words).with_words_of(["转 5%"]).words == (*words, "转", "%")


def test_the_policy_in_the_repository_reads_its_instructions_as_before() -> None:
    folder = Path(__file__).parents[3] / "checkpoints" / "tabletop_object"
    description = json.loads((folder / "config.json").read_text())["tokenizer"]
    tokenizer = tokenizer_from_dict(description)
    text = " ".join(description["words"][2:])
    assert tokenizer.encode([text.upper()])[0][0].tolist() == list(range(2, len(tokenizer)))


@pytest.mark.parametrize(
    "other",
    [
        "Open the drawer",
        " open  the\ndrawer ",
        "open the drawer.",
        "(open) the, drawer!",
        "open the\u200b drawer",
        "「open」 the drawer",
    ],
)
def test_spellings_of_one_instruction(other: str) -> None:
    assert same_instruction(other) == same_instruction("open the drawer") == "open the drawer"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("move by 0.5", "move by 05"),
        ("move by 0.5", "move by 0 5"),
        ("move by 10²", "move by 102"),
        ("block 1", "block 10"),
        ("left-right", "left right"),
        ("turn by -5", "turn by 5"),
        ("A/B", "A B"),
        ("红色", "红色的"),
        ("the resume", "the résumé"),
    ],
)
def test_different_instructions(one: str, other: str) -> None:
    assert same_instruction(one) != same_instruction(other)


@pytest.mark.parametrize("empty", ["", "   ", "?!", "\u200b\ufeff", "…。", "\n"])
def test_an_empty_instruction_is_explained(empty: str) -> None:
    with pytest.raises(ValueError, match="has no words; give the robot something to do"):
        WordTokenizer.from_instructions(INSTRUCTIONS).encode(["open the drawer", empty])


@pytest.mark.parametrize("words", [["a", "b"], [PAD, UNKNOWN, "a", "a"], []])
def test_bad_vocabularies(words: list[str]) -> None:
    with pytest.raises(ValueError, match="a vocabulary must start with <pad>, <unk>"):
        WordTokenizer(words)


def test_a_word_tokenizer_survives_its_description() -> None:
    tokenizer = WordTokenizer.from_instructions(INSTRUCTIONS)
    again = tokenizer_from_dict(tokenizer.to_dict())
    assert isinstance(again, WordTokenizer)
    assert again.words == tokenizer.words
    with pytest.raises(ValueError, match="unknown tokenizer kind 'letters'; one of words, pretrained"):
        tokenizer_from_dict({"kind": "letters"})


def test_pretrained_prompt_padding_and_no_bos(pretrained_folder: Path) -> None:
    tokenizer = PretrainedTokenizer(str(pretrained_folder), PROMPT)
    ids_BT, mask_BT = tokenizer.encode(["Open the drawer ", "put cube"])
    assert ids_BT.tolist() == [[4, 6, 7, 8, 5], [4, 9, 10, 5, 3]]
    assert mask_BT.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert len(tokenizer) == 12


def test_the_empty_token_is_appended_once(pretrained_folder: Path) -> None:
    ids_BT, _ = PretrainedTokenizer(str(pretrained_folder), PROMPT, empty_token=2).encode(["open"])
    assert ids_BT.tolist() == [[4, 6, 5, 2]]
    ids_BT, _ = PretrainedTokenizer(str(pretrained_folder), PROMPT, empty_token=5).encode(["open"])
    assert ids_BT.tolist() == [[4, 6, 5]]


def test_a_pretrained_tokenizer_is_kept_in_the_checkpoint(pretrained_folder: Path, tmp_path: Path) -> None:
    tokenizer = PretrainedTokenizer(str(pretrained_folder), PROMPT, empty_token=2)
    (tmp_path / "checkpoint").mkdir()
    tokenizer.save(tmp_path / "checkpoint")
    description = {**tokenizer.to_dict(), "source": "somewhere/that-is-gone"}
    again = tokenizer_from_dict(description, tmp_path / "checkpoint")
    torch.testing.assert_close(again.encode(["put cube away"]), tokenizer.encode(["put cube away"]))


def test_pretrained_bad_input(pretrained_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"must contain \{instruction\}"):
        PretrainedTokenizer(str(pretrained_folder), "do something")
    with pytest.raises(ValueError, match="has no words"):
        PretrainedTokenizer(str(pretrained_folder), PROMPT).encode(["open", " "])
