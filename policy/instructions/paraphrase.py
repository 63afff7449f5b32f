"""Other wordings of instructions: for training, and, with words and patterns that training never sees, for evaluation.

All draws come from the `random.Random` that is passed in, so the same generator gives the same wording.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable

from cogvla.policy.instructions.grammar import Sentence, several, things, words_of
from cogvla.policy.instructions.lexicon import (
    ADJECTIVES,
    CANONICAL,
    DONE,
    HELD_OUT,
    MOTIONS,
    NOUNS,
    ORDINALS,
    PICK,
    RELATIONS,
    THING,
    TRAIN,
    VERBS,
    WHICH,
)
from cogvla.policy.instructions.parser import parse
from cogvla.policy.instructions.patterns import (
    CHANGES,
    JOINTS,
    LINKS,
    MOVES,
    NEGATIONS,
    NUMBERS,
    PLACES,
    REQUESTS,
    WRAPPERS,
)
from cogvla.policy.instructions.references import by_attribute, contrasts, not_meant
from cogvla.policy.instructions.rendering import Wording, render

LEVELS = (1, 2, 3)
ANY_SENTENCE = ("do the following: {text}", "here is your job: {text}", "your next job is this: {text}")
"""Held-out patterns that are right around any text."""
TRIES = 20
BY_ATTRIBUTE = 0.2
"""Share of the wordings that name things by their colour alone, where that is enough."""
SHORTEST = 4
"""Letters of the shortest word that gets a typing error."""


def paraphrase(text: str, rng: random.Random, split: str = TRAIN, among: tuple[str, ...] = ()) -> str:
    """Draw another wording of an instruction, with the words and patterns of a split.

    Args:
        text: an instruction; one that the grammar does not know is returned as it is.
        rng: source of the draws.
        split: `train` (may also return the instruction itself) or `held_out`.
        among: all instructions of the data set or suite, see `references`.

    Raises:
        ValueError: there is no such split.
    """
    if split not in (TRAIN, HELD_OUT):
        raise ValueError(f"unknown split {split!r} of wordings; one of {TRAIN}, {HELD_OUT}")
    sentence = parse(text)
    if sentence is None:
        return text
    wording = Wording(rng, split, split, split, contrasts(among), not_meant(sentence, among))
    if rng.random() < BY_ATTRIBUTE:
        sentence = by_attribute(sentence, among) or sentence
    return _rendered(sentence, wording) or text


def reword(
    text: str, level: int, rng: random.Random, among: tuple[str, ...] = (), present: tuple[str, ...] | None = None
) -> str:
    """Draw a wording of an instruction for evaluation, which training never sees.

    Level 1 changes verbs; level 2 also patterns, politeness and order, or names a thing that is not meant; level 3 also
    nouns and colours (one word of each thing), or names things by their colour alone, or makes a typing error. Words
    that say which one (left, front, top) stay. A text that the grammar does not know gets a pattern around it.

    Args:
        text: an instruction.
        level: 1, 2 or 3.
        rng: source of the draws.
        among: all instructions of the data set or suite, see `references`.
        present: those that are possible in the scene, for the thing that is not meant; None: all may be.

    Raises:
        ValueError: there is no such level.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r} of wordings; one of {', '.join(map(str, LEVELS))}")
    sentence = parse(text)
    for _ in range(0 if sentence is None else TRIES):
        assert sentence is not None
        frames = CANONICAL if level == 1 else HELD_OUT
        meant, others, drawn = sentence, not_meant(sentence, among if present is None else present), rng.random()
        misspelt = level == 3 and drawn < 0.5
        if level == 3 and drawn > 1 - BY_ATTRIBUTE:
            meant = by_attribute(sentence, among) or sentence
        nouns = HELD_OUT if level == 3 and not misspelt else CANONICAL
        found = _rendered(meant, Wording(rng, HELD_OUT, frames, nouns, contrasts(among), others))
        if found is not None and misspelt:
            found = _misspelt(found, sentence, rng)
        if found is not None and words_of(found) != words_of(text):
            return found
    return rng.choice(ANY_SENTENCE).format(text=text)


def wordings(instructions: Iterable[str], count: int) -> dict[str, tuple[str, ...]]:
    """Return up to `count` training paraphrases of each instruction, without the instruction itself.

    They depend on the instructions only (`references`). Instructions that the grammar does not know, or whose meaning
    it cannot tell from that of another, get none.
    """
    return dict(_wordings(tuple(instructions), count))


@functools.lru_cache(maxsize=8)
def _wordings(instructions: tuple[str, ...], count: int) -> dict[str, tuple[str, ...]]:
    parses = {text: parse(text) for text in instructions}
    said: dict[Sentence, set[tuple[str, ...] | None]] = {}
    for text, sentence in parses.items():
        if sentence is not None:
            said.setdefault(sentence, set()).add(words_of(text))
    found: dict[str, tuple[str, ...]] = {}
    for text, sentence in parses.items():
        drawn: dict[str, None] = {}
        if sentence is not None and len(said[sentence]) == 1:
            rng = random.Random(text)
            drawn = dict.fromkeys(paraphrase(text, rng, among=instructions) for _ in range(2 * count))
        found[text] = tuple(other for other in drawn if words_of(other) != words_of(text))[:count]
    return found


def _rendered(sentence: Sentence, wording: Wording) -> str | None:
    """Return a wording that means exactly the same; None if there was none in some draws."""
    drawn = (render(sentence, wording) for _ in range(TRIES))
    return next((text for text in drawn if parse(text) == sentence), None)


def _misspelt(text: str, sentence: Sentence, rng: random.Random) -> str | None:
    """Make a typing error in one word, which must not be all that tells a thing from others."""
    kept = set(_WHICH)
    for thing in things(sentence):
        noun, adjectives, _ = thing.said
        kept.update(*(said.split() for said in adjectives))
        if not thing.adjectives and thing.which is None:
            kept.update(noun.split())
    parts = text.split(" ")
    open_to = [i for i, part in enumerate(parts) if len(part) >= SHORTEST and part.isalpha() and part not in kept]
    rng.shuffle(open_to)
    for i in open_to:
        word = parts[i]
        at = rng.randrange(1, len(word) - 2)
        changed = rng.choice(
            (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at - 1 :],
            )
        )
        if changed != word and changed.lower() not in KNOWN:
            return " ".join([*parts[:i], changed, *parts[i + 1 :]])
    return None


def _flat(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in (words_of(text.replace(THING, " ")) or ())}


_WHICH = _flat([*(said for entry in (*WHICH.values(), *RELATIONS.values()) for said in entry.all), *ORDINALS])
KNOWN = frozenset(
    _WHICH
    | {"the", "both", "of"}
    | _flat(several(said) for entry in NOUNS.values() for said in entry.all)
    | _flat(said for entry in (*VERBS.values(), PICK, *NOUNS.values(), *ADJECTIVES.values()) for said in entry.all)
    | _flat([*DONE.values(), *(said for more in (*MOTIONS.values(), *NUMBERS.values()) for said in more)])
    | _flat(
        " ".join(part for part in pattern.replace("}", "{").split("{")[::2])
        for patterns in (WRAPPERS, NEGATIONS, JOINTS, REQUESTS, MOVES, PLACES, CHANGES, LINKS)
        for pattern in patterns.all
    )
)
"""All words of the grammar: a typing error must not make another one."""
