"""References to the things of an instruction, among the other instructions of its data set.

A thing may be called by its colour alone ("the red one") if nothing that could be meant has this colour, too. A thing
of another instruction may be named as not meant ("not the blue cube").
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from cogvla.policy.instructions.grammar import PRONOUNS, Phrase, Sentence, Step, things
from cogvla.policy.instructions.lexicon import ANYTHING, ORDINALS
from cogvla.policy.instructions.parser import parse


@functools.lru_cache(maxsize=16)
def contrasts(instructions: tuple[str, ...]) -> frozenset[str]:
    """Return the nouns and adjectives that a data set says in two ways ("block" and "cube").

    They may be different things there, so they must stay as they are.
    """
    ways: dict[str, set[str]] = {}
    for sentence in _parsed(instructions):
        for thing in things(sentence):
            noun, adjectives, _ = thing.said
            for name, said in ((thing.noun, noun), *zip(thing.adjectives, adjectives, strict=True)):
                ways.setdefault(name, set()).add(said)
    return frozenset(name for name, said in ways.items() if len(said) > 1)


def not_meant(sentence: Sentence, instructions: tuple[str, ...]) -> tuple[Phrase, ...]:
    """Return things that the same could be done to, according to other instructions, and that this one does not name.

    Only names tell them apart: where a thing is, another may be, too. Sentences of two steps have none.
    """
    step = sentence.steps[0]
    if len(sentence.steps) > 1 or len(step.theme) > 1 or not _by_name(step.theme[0]):
        return ()
    named = list(things(sentence))
    found = {
        other.steps[0].theme[0]: None
        for other in _parsed(instructions)
        if len(other.steps) == 1
        and replace(other.steps[0], theme=step.theme) == step
        and len(other.steps[0].theme) == 1
    }
    return tuple(thing for thing in found if _by_name(thing) and all(_differ(thing, one) for one in named))


def by_attribute(sentence: Sentence, instructions: tuple[str, ...]) -> Sentence | None:
    """Return the sentence with things named by their adjectives alone.

    Returns None if these tell no thing apart, or if the sentence is not one of the instructions.
    """
    rivals: dict[str, set[Phrase]] = {}
    known = _parsed(instructions)
    if sentence not in known:
        return None
    for other in known:
        for step in other.steps:
            rivals.setdefault(step.act, set()).update(_of(step))

    def renamed(step: Step, thing: Phrase) -> Phrase:
        words = _words(thing.adjectives)
        alone = (
            _by_name(thing)
            and words
            and all(
                not words & _words(rival.adjectives)
                for rival in rivals[step.act]
                if (rival.noun, rival.adjectives) != (thing.noun, thing.adjectives)
            )
        )
        return replace(thing, noun=ANYTHING, said=(ANYTHING, *thing.said[1:])) if alone else thing

    steps = tuple(replace(s, theme=tuple(renamed(s, thing) for thing in s.theme)) for s in sentence.steps)
    return None if steps == sentence.steps else replace(sentence, steps=steps)


@functools.lru_cache(maxsize=16)
def _parsed(instructions: tuple[str, ...]) -> tuple[Sentence, ...]:
    return tuple(sentence for text in instructions if (sentence := parse(text)) is not None)


def _of(step: Step) -> Iterator[Phrase]:
    yield from (thing for thing in (*step.theme, step.goal) if thing is not None and thing.noun not in PRONOUNS)


def _by_name(thing: Phrase) -> bool:
    """Return True if nothing but noun and adjectives says which thing is meant."""
    placed = thing.which or thing.relation or thing.whole or thing.both or set(thing.adjectives) & {*ORDINALS}
    return not placed and thing.noun not in (*PRONOUNS, ANYTHING)


def _differ(one: Phrase, other: Phrase) -> bool:
    """Return True if each thing has a word that the other has not."""
    first, second = (_words((thing.noun, *thing.adjectives)) for thing in (one, other))
    return bool(first - second) and bool(second - first)


def _words(names: Iterable[str]) -> set[str]:
    return {word for name in names for word in name.split()} - {"and"}
