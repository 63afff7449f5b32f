"""Find the meaning of a text.

Every function of the search yields what it finds at word i, with the index of the next word, and tries everything that
the words allow; the first sentence that uses all words counts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from cogvla.policy.instructions.grammar import IMPERATIVES, PRONOUNS, Phrase, Sentence, Step, alike, several, words_of
from cogvla.policy.instructions.lexicon import (
    ADJECTIVES,
    DONE,
    MOTIONS,
    NOUNS,
    ORDINALS,
    PARTS,
    PICK,
    RELATIONS,
    THING,
    VERBS,
    WHICH,
    Words,
)
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

CACHED = 4096
"""Number of partial results of the parser to keep, for the many patterns of one sentence."""


def parse(text: str) -> Sentence | None:
    """Return the meaning of a sentence; None if it is not of this grammar."""
    words = words_of(text)
    if not words:
        return None
    for wrapper in (*WRAPPERS.all, *NEGATIONS.all):
        for found, end in _match(wrapper, words, 0):
            if end == len(words):
                steps, joint = found["step"]
                return Sentence(steps, (wrapper, joint), found.get("other"))
    for pattern in (*MOVES.all, *PLACES.all, *CHANGES.all):
        for found, end in _match(pattern, words, 0):
            step = _step(pattern, found) if end == len(words) else None
            if step is not None:
                return Sentence((step,))
    return None


def _match(pattern: str, words: tuple[str, ...], i: int) -> Iterator[tuple[dict[str, Any], int]]:
    yield from _sequence(_elements(pattern), words, i)


@functools.cache
def _elements(pattern: str) -> tuple[str, ...]:
    """Return the slots and the words of a pattern."""
    return tuple(part if part.startswith("{") else part.lower() for part in re.findall(r"{\w+}|[\w']+", pattern))


def _sequence(elements: tuple[str, ...], words: tuple[str, ...], i: int) -> Iterator[tuple[dict[str, Any], int]]:
    if not elements:
        yield {}, i
        return
    first, rest = elements[0], elements[1:]
    if not first.startswith("{"):
        if i < len(words) and words[i] == first:
            yield from _sequence(rest, words, i + 1)
        return
    name = first[1:-1]
    for value, end in _slots(name, words, i):
        for found, last in _sequence(rest, words, end):
            yield {**found, name: value}, last


@functools.lru_cache(maxsize=CACHED)
def _slots(name: str, words: tuple[str, ...], i: int) -> tuple[tuple[Any, int], ...]:
    return tuple(_slot(name, words, i))


def _slot(name: str, words: tuple[str, ...], i: int) -> Iterator[tuple[Any, int]]:
    match name:
        case "step":
            for joint in JOINTS.all:
                for found, end in _match(joint, words, i):
                    yield ((found["first"], found["second"]), joint), end
            for step, end in _slots("first", words, i):
                yield ((step,), ""), end
        case "first" | "second":
            for pattern in REQUESTS.canonical:
                for found, end in _match(pattern, words, i):
                    if (step := _step(pattern, found)) is not None:
                        yield step, end
            for act, verb in _VERBS.get(_at(words, i), ()):
                first, _, particle = verb.partition(" ")
                for pronoun in PRONOUNS if particle else ():
                    for end in _literal(f"{first} {pronoun} {particle}", words, i):
                        yield Step(act, (Phrase(pronoun),), said=(REQUESTS.canonical[2], verb, "", "")), end
        case "verb" | "done":
            for act, verb in (_VERBS if name == "verb" else _DONE).get(_at(words, i), ()):
                for end in _literal(verb if name == "verb" else DONE[verb], words, i):
                    yield (act, verb), end
        case "pick":
            for verb in PICK.all:
                for end in _literal(verb, words, i):
                    yield verb, end
        case "theme":
            yield from _theme(words, i)
        case "other":
            yield from _phrases(words, i, placed=False)
        case "to" | "at":
            yield from _goal(words, i)
        case _:
            for word in NUMBERS[name]:
                for end in _literal(word, words, i):
                    yield word, end


def _literal(text: str, words: tuple[str, ...], i: int) -> Iterator[int]:
    expected = _elements(text)
    if words[i : i + len(expected)] == expected:
        yield i + len(expected)


def _step(pattern: str, found: dict[str, Any]) -> Step | None:
    act, verb = found.get("verb") or found.get("done") or ("put", "")
    theme = found["theme"]
    relation, said, goal = found.get("to") or found.get("at") or (None, "", None)
    if (goal is None) != (act in IMPERATIVES):
        return None
    if act == "stack" or (act == "put" and relation == "on" and alike(theme, goal)):
        if relation not in ("on", "on top"):
            return None
        act, relation = "put", "on top"
    return Step(act, theme, relation, goal, (pattern, verb, found.get("pick", ""), said))


def _goal(words: tuple[str, ...], i: int) -> Iterator[tuple[tuple[str, str, Phrase], int]]:
    for relation, said, start in _relations(words, i):
        for phrase, end in _phrases(words, start, placed=False):
            yield (relation, said, phrase), end
    for end in _literal("inside", words, i):
        yield ("in", "inside", Phrase("it")), end


def _relations(words: tuple[str, ...], i: int) -> Iterator[tuple[str, str, int]]:
    for relation, said in _RELATIONS.get(_at(words, i), ()):
        for end in _literal(said, words, i):
            yield relation, said, end


def _theme(words: tuple[str, ...], i: int) -> Iterator[tuple[tuple[Phrase, ...], int]]:
    start = i + 1 if words[i : i + 1] == ("both",) else i
    for first, end in _phrases(words, start, placed=False):
        for after in _literal("and", words, end):
            for second, last in _phrases(words, after, placed=False):
                yield (first, second), last
    for phrase, end in _phrases(words, i, placed=True):
        yield (phrase,), end


@functools.lru_cache(maxsize=CACHED)
def _phrases(words: tuple[str, ...], i: int, placed: bool) -> tuple[tuple[Phrase, int], ...]:
    """Return the phrases, the longest first; `placed`: with a relation to other things."""
    return tuple(_phrase_at(words, i, placed))


def _phrase_at(words: tuple[str, ...], i: int, placed: bool) -> Iterator[tuple[Phrase, int]]:
    if words[i : i + 1] and words[i] in PRONOUNS:
        yield Phrase(words[i]), i + 1
        return
    if words[i : i + 1] not in (("the",), ("both",)):
        return
    both = words[i] == "both"
    found = [
        (phrase, end)
        for which, said, start, suffix in _before(words, i + 1)
        for phrase, end in _named(words, start, both, which, said, suffix)
    ]
    for phrase, end in sorted(found, key=lambda entry: -entry[1]):
        if placed and phrase.which is None:
            for link in LINKS.all:
                for start in _literal(link, words, end):
                    for relation, _, after in _relations(words, start):
                        for others, last in _others(relation, words, after):
                            yield _with(phrase, relation=relation, others=others), last
        yield phrase, end


def _with(phrase: Phrase, **changes: Any) -> Phrase:
    return Phrase(**{**phrase.__dict__, **changes})


def _others(relation: str, words: tuple[str, ...], i: int) -> Iterator[tuple[tuple[Phrase, ...], int]]:
    for first, end in _phrases(words, i, placed=False):
        if relation != "between":
            yield (first,), end
            continue
        for after in _literal("and", words, end):
            for second, last in _phrases(words, after, placed=False):
                yield (first, second), last


def _before(words: tuple[str, ...], i: int) -> Iterator[tuple[str | None, str, int, str]]:
    """Yield which one, as it is said, the next word, and what has to follow the noun."""
    yield None, THING, i, ""
    for which, entry in WHICH.items():
        for said in entry.all:
            prefix, _, suffix = (part.strip() for part in said.partition(THING))
            for end in _literal(prefix, words, i):
                yield which, said, end, suffix


def _named(
    words: tuple[str, ...], i: int, both: bool, which: str | None, said: str, suffix: str
) -> Iterator[tuple[Phrase, int]]:
    for adjectives, spoken, start in _adjectives(words, i):
        for noun, name in (_SEVERAL if both else _NOUNS).get(_at(words, start), ()):
            for end in _literal(several(name) if both else name, words, start):
                if (noun in PARTS and which is not None) or (
                    noun not in PARTS and any(a in ORDINALS for a in adjectives)
                ):
                    continue
                for last in _literal(suffix, words, end):
                    phrase = Phrase(noun, adjectives, which, both=both, said=(name, spoken, said))
                    if noun in PARTS:
                        for after in _literal("of", words, last):
                            for whole, stop in _phrases(words, after, placed=False):
                                yield _with(phrase, whole=whole), stop
                    yield phrase, last


def _adjectives(words: tuple[str, ...], i: int) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], int]]:
    for adjective, said in _ADJECTIVES.get(_at(words, i), ()):
        for end in _literal(said, words, i):
            for more, spoken, last in _adjectives(words, end):
                yield (adjective, *more), (said, *spoken), last
    yield (), (), i


def _at(words: tuple[str, ...], i: int) -> str:
    return words[i] if i < len(words) else ""


def _by_first_word(entries: Iterable[tuple[str, str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Return (meaning, what it is filed as) by the first word of how it is said."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, filed, said in entries:
        found.setdefault(said.split()[0], []).append((name, filed))
    return found


_NOUNS = _by_first_word((name, said, said) for name, entry in NOUNS.items() for said in entry.all)
_SEVERAL = _by_first_word((name, said, several(said)) for name, entry in NOUNS.items() for said in entry.all)
_ADJECTIVES = _by_first_word(
    (name, said, said)
    for name, entry in (*ADJECTIVES.items(), *((o, Words((o,))) for o in ORDINALS))
    for said in entry.all
)
_RELATIONS = _by_first_word(
    (name, said, said) for name, entry in RELATIONS.items() for said in (*entry.all, *MOTIONS.get(name, ()))
)
_VERBS = _by_first_word((act, verb, verb) for act, entry in VERBS.items() for verb in entry.all)
_DONE = _by_first_word((act, verb, DONE[verb]) for act, entry in VERBS.items() for verb in entry.all)
