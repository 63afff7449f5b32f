"""Word the meaning of a sentence, with the words and patterns of a split."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cogvla.policy.instructions.grammar import PRONOUNS, Phrase, Sentence, Step, alike, several
from cogvla.policy.instructions.lexicon import (
    ADJECTIVES,
    CANONICAL,
    DONE,
    HELD_OUT,
    MOTIONS,
    NOUNS,
    PICK,
    RELATIONS,
    THING,
    TRAIN,
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

NEGATED = 0.2
"""Share of the wordings with a thing that is not meant, where there is one to name."""


@dataclass(frozen=True)
class Wording:
    """How a meaning is worded: the splits that each kind of word is drawn from.

    Attributes:
        rng: source of all draws.
        verbs: split of verbs.
        frames: split of patterns, relations and links.
        nouns: split of nouns, adjectives and the words for which one; of `held_out`, one word of a thing changes.
        keep: nouns and adjectives (first words) that stay as they were said.
        others: things that may be named as not meant.
    """

    rng: random.Random
    verbs: str = CANONICAL
    frames: str = CANONICAL
    nouns: str = CANONICAL
    keep: Collection[str] = ()
    others: Sequence[Phrase] = ()

    def draw(self, words: Words, split: str, said: str) -> str:
        """Draw from the words of a split; canonical: what was said."""
        return said if split == CANONICAL and said else self.rng.choice(words.of(split))


def render(sentence: Sentence, wording: Wording) -> str:
    """Word the meaning of a sentence."""
    rng, split = wording.rng, wording.frames
    wrapper, joint = sentence.said
    if len(sentence.steps) == 2:
        # At least one of the two patterns is of the split; both would make long sentences.
        other = rng.random() < 0.5 if split != CANONICAL else False
        joint = joint if other else wording.draw(JOINTS, split, joint)
        wrapper = wording.draw(WRAPPERS, split, wrapper) if other else wrapper
        first, second = (_request(step, wording) for step in sentence.steps)
        body = joint.format(first=first, second=second)
    else:
        (step,) = sentence.steps
        if split != CANONICAL and wording.others and rng.random() < NEGATED:
            negated = _phrase(rng.choice(wording.others), wording)
            return rng.choice(NEGATIONS.of(split)).format(step=_request(step, wording), other=negated)
        if split != CANONICAL and rng.random() < 0.5:
            return _worded(step, rng.choice(_patterns(step).of(split)), wording)
        wrapper = wording.draw(WRAPPERS, split, wrapper)
        body = _request(step, wording)
    return wrapper.format(step=body, other=None if sentence.other is None else _phrase(sentence.other, wording))


def _patterns(step: Step) -> Words:
    if step.goal is None:
        return CHANGES
    more = PLACES if step.act == "put" else Words(())
    return Words((), MOVES.train + more.train, MOVES.held_out + more.held_out)


def _request(step: Step, wording: Wording) -> str:
    said = step.said[0]
    if step.goal is None:
        return _worded(step, REQUESTS.canonical[2], wording)
    if said not in REQUESTS.canonical or (wording.frames == TRAIN and not _pronoun(step)):
        said = wording.rng.choice(REQUESTS.canonical[:2])
    return _worded(step, said, wording)


def _pronoun(step: Step) -> bool:
    return any(phrase is not None and phrase.noun in PRONOUNS for phrase in (*step.theme, step.goal))


def _worded(step: Step, pattern: str, wording: Wording) -> str:
    several = len(step.theme) > 1 or step.theme[0].both or step.theme[0].noun == "them"
    verb = wording.draw(_verbs(step), wording.verbs, step.said[1])
    values = {name: numbers[several] for name, numbers in NUMBERS.items()}
    values |= {"verb": verb, "done": DONE.get(verb, verb), "pick": wording.draw(PICK, wording.verbs, step.said[2])}
    linked = pattern.startswith("{to}, ")  # "on the plate, put the cube on the mat" would be unclear
    names = [_phrase(phrase, wording, linked) for phrase in step.theme]
    both = "both " if (several and wording.frames != TRAIN) or wording.rng.random() < 0.5 else ""
    values["theme"] = names[0] if len(names) == 1 else f"{both}{names[0]} and {names[1]}"
    first, _, particle = verb.partition(" ")
    if pattern == REQUESTS.canonical[2] and particle and values["theme"] in PRONOUNS:
        return f"{first} {values['theme']} {particle}"  # "pull it open"
    if step.goal is not None and step.relation is not None:
        values["to"] = _relation(step, wording, moving=True)
        values["at"] = _relation(step, wording, moving=False)
    return pattern.format(**values)


def _verbs(step: Step) -> Words:
    words = VERBS[step.act]
    if step.act == "put" and step.relation == "on top" and alike(step.theme, step.goal):
        more = VERBS["stack"]
        return Words(words.canonical + more.canonical, words.train + more.train, words.held_out + more.held_out)
    return words


def _relation(step: Step, wording: Wording, moving: bool) -> str:
    assert step.relation is not None
    assert step.goal is not None
    words, said = RELATIONS[step.relation], step.said[3]
    if not moving and said in ("into", "onto"):
        said = words.canonical[0]
    options = words.of(wording.frames)
    if wording.frames == TRAIN and moving:
        options = (*options, *MOTIONS.get(step.relation, ()))
    chosen = said if wording.frames == CANONICAL and said else wording.rng.choice(options)
    if step.goal.noun == "it" and step.relation == "in" and said == "inside" and chosen == said:
        return said
    return f"{chosen} {_phrase(step.goal, wording)}"


def _phrase(phrase: Phrase, wording: Wording, linked: bool = False) -> str:
    if phrase.noun in PRONOUNS:
        return phrase.noun
    noun, adjectives, which = phrase.said
    draw = wording.draw
    free = [name for name in (phrase.noun, *phrase.adjectives) if name not in wording.keep]
    if wording.nouns == HELD_OUT:  # one word, so that the others tell what is meant
        changeable = [name for name in free if _entry(name).held_out]
        free = [wording.rng.choice(changeable)] if changeable else []
    if phrase.noun in free:
        noun = draw(NOUNS[phrase.noun], wording.nouns, noun)
    adjectives = tuple(
        draw(ADJECTIVES[name], wording.nouns, said) if name in free and name in ADJECTIVES else said
        for name, said in zip(phrase.adjectives, adjectives, strict=True)
    )
    if phrase.which is not None:
        which = draw(WHICH[phrase.which], wording.nouns, which)
    text = which.replace(THING, " ".join([*adjectives, several(noun) if phrase.both else noun]))
    text = f"both {text}" if phrase.both else f"the {text}"
    if phrase.whole is not None:
        text = f"{text} of {_phrase(phrase.whole, wording)}"
    if phrase.relation is not None:
        link = "that is" if linked else wording.draw(LINKS, wording.frames, "")
        place = " and ".join(_phrase(other, wording) for other in phrase.others)
        text = " ".join(filter(None, (text, link, RELATIONS[phrase.relation].canonical[0], place)))
    return text


def _entry(name: str) -> Words:
    return NOUNS.get(name) or ADJECTIVES.get(name) or Words((name,))
