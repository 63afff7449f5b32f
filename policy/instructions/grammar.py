"""The meaning of instructions for manipulation.

A sentence has one step ("put the red cube in the tray") or two ("open the drawer, then ..."). A step is an act with its
theme, and a goal where the act moves something. `parser` finds the meaning of a text, `rendering` words a meaning. Two
texts mean the same if their sentences are equal; the words in which something was said are kept beside the meaning, but
are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from cogvla.policy.instructions.lexicon import THING

PRONOUNS = ("it", "them")
IMPERATIVES = ("open", "close", "press", "turn on", "turn off")
"""Acts without a goal."""


@dataclass(frozen=True)
class Phrase:
    """A thing, or a pronoun.

    Attributes:
        noun: the first word of the noun in `NOUNS`, or a pronoun.
        adjectives: first words of `ADJECTIVES`, or of `ORDINALS` for parts.
        which: which one of several, of `WHICH`.
        relation: relation of the thing to others, of `RELATIONS`.
        others: the things that it is related to.
        whole: what the part belongs to.
        both: two things of this kind.
        said: the words in which the sentence said noun, adjectives and which; not compared.
    """

    noun: str
    adjectives: tuple[str, ...] = ()
    which: str | None = None
    relation: str | None = None
    others: tuple[Phrase, ...] = ()
    whole: Phrase | None = None
    both: bool = False
    said: tuple[str, tuple[str, ...], str] = field(default=("", (), THING), compare=False)


@dataclass(frozen=True)
class Step:
    """An act on things.

    Attributes:
        act: of `VERBS`; `stack` counts as `put`.
        theme: the things; two in "both the butter and the milk".
        relation: relation to the goal, of `RELATIONS`; None without a goal.
        goal: where the theme goes; None without.
        said: pattern, verb, verb of picking up, and words of the relation, as the sentence has them; not compared.
    """

    act: str
    theme: tuple[Phrase, ...]
    relation: str | None = None
    goal: Phrase | None = None
    said: tuple[str, str, str, str] = field(default=("", "", "", ""), compare=False)


@dataclass(frozen=True)
class Sentence:
    """One or two steps.

    Attributes:
        steps: the steps in their order.
        said: the patterns around the steps and between them; not compared.
        other: the thing that was said not to be meant; not compared, because it changes nothing.
    """

    steps: tuple[Step, ...]
    said: tuple[str, str] = field(default=("{step}", ""), compare=False)
    other: Phrase | None = field(default=None, compare=False)


def words_of(text: str) -> tuple[str, ...] | None:
    """Return the words of a text in lower case; None if it has other characters than letters, digits and points."""
    return None if re.search(r"[^a-z0-9' ,.:;?!-]", text.lower()) else tuple(re.findall(r"[a-z0-9']+", text.lower()))


def things(sentence: Sentence) -> Iterator[Phrase]:
    """Yield all things of a sentence, with those inside of others; no pronouns."""
    stack = [p for step in sentence.steps for p in (*step.theme, step.goal) if p is not None]
    while stack:
        phrase = stack.pop()
        if phrase.noun not in PRONOUNS:
            yield phrase
            stack += [*phrase.others, *([] if phrase.whole is None else [phrase.whole])]


def several(noun: str) -> str:
    """Return the plural of a noun."""
    first, of, rest = noun.partition(" of ")
    return f"{first}{'es' if first.endswith(('x', 's', 'ch')) else 's'}{of}{rest}"


def alike(theme: tuple[Phrase, ...], goal: Phrase | None) -> bool:
    """Return whether the theme is one thing of the same kind as the goal."""
    return goal is not None and len(theme) == 1 and theme[0].noun == goal.noun and goal.noun not in PRONOUNS
