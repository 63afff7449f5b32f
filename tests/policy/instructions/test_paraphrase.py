"""Wordings of instructions: they keep the meaning, and evaluation uses words and patterns that training never sees."""

from __future__ import annotations

import random
from difflib import get_close_matches

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.envs.suite import get_suite
from cogvla.libero.tasks import LIBERO_SUITES, tasks
from cogvla.policy.instructions import grammar, patterns
from cogvla.policy.instructions.grammar import words_of
from cogvla.policy.instructions.lexicon import (
    ADJECTIVES,
    ANYTHING,
    DONE,
    HELD_OUT,
    NOUNS,
    ORDINALS,
    PICK,
    RELATIONS,
    TRAIN,
    VERBS,
    WHICH,
)
from cogvla.policy.instructions.paraphrase import KNOWN, LEVELS, paraphrase, reword, wordings
from cogvla.policy.instructions.parser import parse
from cogvla.policy.instructions.references import by_attribute, contrasts, not_meant
from cogvla.policy.instructions.rendering import Wording, render
from cogvla.tests.support.libero_assets import installed, needs_libero

TABLETOP = ("tabletop_object", "tabletop_spatial", "tabletop_goal", "tabletop_long")


def instructions_of(suite: str) -> list[str]:
    listed = tasks(suite) if suite in LIBERO_SUITES else get_suite(suite, {}).tasks
    return list(dict.fromkeys(task.instruction for task in listed))


SUITES = {suite: instructions_of(suite) for suite in (*TABLETOP, *(LIBERO_SUITES if installed else ()))}
ALL = sorted({text for texts in SUITES.values() for text in texts})
SPLITS = (TRAIN, HELD_OUT)
PATTERNS = [
    patterns.WRAPPERS,
    patterns.NEGATIONS,
    patterns.JOINTS,
    patterns.MOVES,
    patterns.PLACES,
    patterns.CHANGES,
    patterns.LINKS,
]
LEXICON = [*VERBS.values(), PICK, *NOUNS.values(), *ADJECTIVES.values(), *WHICH.values(), *RELATIONS.values()]


def things(text: str) -> list[grammar.Phrase]:
    sentence = parse(text)
    assert sentence is not None
    return list(grammar.things(sentence))


def words(texts: tuple[str, ...]) -> set[str]:
    return {word for text in texts for word in words_of(text.replace("~", "").replace("{", "").replace("}", "")) or ()}


@pytest.mark.parametrize("suite", [*TABLETOP, *(pytest.param(suite, marks=needs_libero) for suite in LIBERO_SUITES)])
def test_all_tasks_are_of_the_grammar_and_differ(suite: str) -> None:
    parses = [parse(text) for text in SUITES[suite]]
    assert None not in parses
    assert len(set(parses)) == len(SUITES[suite]) == len(wordings(SUITES[suite], 1))
    assert not contrasts(tuple(SUITES[suite]))


@pytest.mark.parametrize("text", ALL)
def test_the_usual_words_give_the_instruction_back(text: str) -> None:
    sentence = parse(text)
    assert sentence is not None
    assert render(sentence, Wording(random.Random(0))) == text


@given(st.sampled_from(ALL), st.integers(0, 2**32), st.tuples(*[st.sampled_from(SPLITS)] * 3))
@settings(max_examples=150, deadline=None)
def test_a_rendering_means_its_own_task(text: str, seed: int, splits: tuple[str, str, str]) -> None:
    sentence = parse(text)
    assert sentence is not None
    assert parse(render(sentence, Wording(random.Random(seed), *splits))) == sentence


@given(st.sampled_from(ALL), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_which_one_is_never_reworded_away(text: str, seed: int) -> None:
    for other in (paraphrase(text, random.Random(seed)), *(reword(text, n, random.Random(seed)) for n in LEVELS)):
        for word in words_of(text) or ():
            if word in (*ORDINALS, "leftmost", "rightmost"):
                assert word.removesuffix("most") in other


@given(st.sampled_from(ALL), st.integers(0, 2**32), st.sampled_from(LEVELS))
@settings(max_examples=150, deadline=None)
def test_evaluation_rewords_every_instruction_and_typing_errors_can_be_read(text: str, seed: int, level: int) -> None:
    other = reword(text, level, random.Random(seed))
    assert other == reword(text, level, random.Random(seed))
    assert words_of(other) != words_of(text)
    wrong = [word for word in words_of(other) or () if word not in KNOWN]
    assert len(wrong) <= (level == 3)
    guesses = [get_close_matches(word, KNOWN, 3, 0.6) for word in wrong]
    read = [other.lower().replace(wrong[0], guess) for guess in guesses[0]] if wrong else [other]
    assert parse(text) in [parse(guess) for guess in read]


@pytest.mark.parametrize(
    "text", ["put the red cube in the tray", "open the drawer", "turn on the stove and put the moka pot on it"]
)
def test_levels_change_more_and_more(text: str) -> None:
    drawn = {level: {reword(text, level, random.Random(seed)) for seed in range(60)} for level in LEVELS}
    held_out = {word for entry in (*VERBS.values(), PICK) for said in entry.held_out for word in said.split()}
    usual = set(words_of(text) or ())
    assert all(set(words_of(other) or ()) <= usual | held_out | {"up"} for other in drawn[1]), "verbs only"
    nouns = {thing.noun for thing in things(text)}
    new = {said for noun in nouns for said in NOUNS[noun].held_out}
    assert all(noun in other for other in drawn[2] for noun in nouns), "no nouns yet"
    assert any(said in other for other in drawn[3] for said in new)
    assert not drawn[1] & drawn[2]
    assert not drawn[2] & drawn[3]


@pytest.mark.parametrize(
    "text",
    [
        "put the yellow and white mug in the microwave and close it",
        "put the milk in the drawer and open it",
        "put the ball on the stove and turn on it",
    ],
)
def test_a_pronoun_stands_before_the_particle(text: str) -> None:
    drawn = [paraphrase(text, random.Random(seed), split) for seed in range(40) for split in SPLITS]
    drawn += [reword(text, 1, random.Random(seed)) for seed in range(10)]
    verbs = [verb.split() for entry in VERBS.values() for verb in entry.all if " " in verb]
    spoken = [f" {' '.join(words_of(other) or ())} " for other in drawn]
    assert not [other for other in spoken for verb, particle in verbs if f" {verb} {particle} it " in other]
    assert [other for other in spoken for verb, particle in verbs if f" {verb} it {particle} " in other]


def test_training_never_sees_words_and_patterns_of_evaluation() -> None:
    known = words(tuple(said for entry in (*LEXICON, *PATTERNS) for said in (*entry.canonical, *entry.train)))
    known |= words(tuple(DONE[verb] for entry in VERBS.values() for verb in (*entry.canonical, *entry.train)))
    for entry in (*VERBS.values(), PICK, *NOUNS.values(), *ADJECTIVES.values()):
        for said in entry.held_out:
            assert words((said,)) - known, f"{said!r} has words of training only"
    for entry in PATTERNS:
        assert not set(entry.held_out) & {*entry.canonical, *entry.train}
    seen = {word for texts in SUITES.values() for some in wordings(texts, 8).values() for word in words(some)}
    leaked = seen & {word for entry in LEXICON for said in entry.held_out for word in words((said,)) - known}
    assert not leaked


def test_no_synonym_fits_two_things() -> None:
    for entries in (VERBS, NOUNS, ADJECTIVES, WHICH, RELATIONS):
        said = [word for entry in entries.values() for word in entry.all]
        assert len(said) == len(set(said))
    for suite, texts in SUITES.items():
        names = {thing.noun for text in texts for thing in things(text)}
        last = {name: {said.split()[-1] for said in NOUNS[name].all} for name in names}
        for name in names:
            others = set().union(*(last[other] for other in names - {name}))
            new = {said.split()[-1] for said in (*NOUNS[name].train, *NOUNS[name].held_out)} - set(name.split())
            assert not new & others, f"{suite}: {name}"


@pytest.mark.parametrize(
    "text",
    ["wipe the table", "put the spoon in the tray", "红 in the tray", "put it", "Grasp it!", "lege den Würfel ab"],
)
def test_what_the_grammar_does_not_know_stays(text: str) -> None:
    assert parse(text) is None
    assert paraphrase(text, random.Random(0)) == text
    assert wordings([text], 4) == {text: ()}
    for level in LEVELS:
        assert text in reword(text, level, random.Random(0)) != text


def test_things_that_a_data_set_tells_apart_keep_their_words() -> None:
    texts = ["put the red block in the tray", "put the blue cube in the tray", "put the violet ball in the tray"]
    assert contrasts(tuple(texts)) == {"cube"}
    found = wordings(texts, 40)
    for text, said in zip(texts, ("block", "cube"), strict=False):
        themes = [sentence.steps[0].theme[0] for other in found[text] if (sentence := parse(other)) is not None]
        assert {thing.said[0] for thing in themes if thing.noun != ANYTHING} == {said}
    assert any("sphere" in other for other in found[texts[2]])
    assert wordings(["slide the puck onto the zone", "push the puck onto the zone"], 4) == {
        "slide the puck onto the zone": (),
        "push the puck onto the zone": (),
    }


def test_wordings_depend_on_the_instructions_only() -> None:
    texts = SUITES["tabletop_object"]
    found = wordings(texts, 16)
    assert found == wordings(list(texts), 16)
    assert all(len(set(others)) == 16 and text not in others for text, others in found.items())


def test_unknown_splits_and_levels() -> None:
    with pytest.raises(ValueError, match="unknown level 4 of wordings; one of 1, 2, 3"):
        reword("open the drawer", 4, random.Random(0))
    with pytest.raises(ValueError, match="unknown split 'test' of wordings; one of train, held_out"):
        paraphrase("open the drawer", random.Random(0), "test")


def test_a_thing_that_is_not_meant_changes_nothing() -> None:
    texts = tuple(SUITES["tabletop_object"])
    for text in texts:
        parses = [parse(other) for other in wordings(texts, 64)[text]]
        others = {sentence.other for sentence in parses if sentence is not None} - {None}
        assert len(others) > 2
        assert not others & {*things(text)}
        assert others <= {thing for some in texts for thing in things(some)}
    present = ("put the pink ball in the tray",)
    drawn = [reword(texts[0], 2, random.Random(seed), texts, present) for seed in range(200)]
    others = {None if (found := parse(other)) is None else found.other for other in drawn} - {None}
    assert others == {things(present[0])[1]}, "a thing of the scene"
    drawn = [reword(texts[0], 2, random.Random(seed), texts, ()) for seed in range(200)]
    parses = [parse(other) for other in drawn]
    assert {found.other for found in parses if found is not None} == {None}, "nothing else is there"


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("put the red cube in the tray", {"blue cube"}),
        ("press the white button", {"black button"}),
        ("put the red cube on the mat", set()),
        ("put the leftmost cube in the tray", set()),
        ("open the drawer", set()),
        ("put the cube in the tray", {"ball"}),
        ("put the red cube in the tray, then put the ball on the mat", set()),
        ("put the blue cube in the tray", {"red cube"}),
    ],
)
def test_things_that_are_not_meant(text: str, others: set[str]) -> None:
    among = (
        "put the red cube in the tray",
        "put the blue cube in the tray",
        "put the cube that is on the mat in the tray",
        "put the leftmost cube in the tray",
        "put the blue puck on the plate",
        "press the white button",
        "press the black button",
        "open the drawer",
        *(["put the ball in the tray"] if text == "put the cube in the tray" else []),
    )
    sentence = parse(text)
    assert sentence is not None
    assert {" ".join([*thing.adjectives, thing.noun]) for thing in not_meant(sentence, among)} == others


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("put the red cube in the tray", ["red"]),
        ("put the blue cube in the tray", []),  # the ball is blue, too
        ("press the blue button", ["blue"]),  # nothing else is pressed
        ("put the white mug in the tray", []),  # the other mug is partly white
        ("put the cube in the tray", []),
        ("put the leftmost black cube in the tray", []),
        ("put the green cube in the tray", []),  # it is not known what else there is
        ("open the top drawer of the cabinet", []),
        ("put the red cube in the tray, then press the blue button", ["red", "blue"]),
    ],
)
def test_a_colour_alone_names_a_thing_only_if_no_other_has_it(text: str, alone: list[str]) -> None:
    among = (
        "put the red cube in the tray",
        "put the blue cube in the tray",
        "put the blue ball in the tray",
        "press the blue button",
        "put the red cube in the tray, then press the blue button",
        "put the leftmost black cube in the tray",
        "put the white mug in the tray",
        "put the yellow and white mug in the tray",
        "open the top drawer of the cabinet",
        "open the bottom drawer of the cabinet",
    )
    sentence = parse(text)
    assert sentence is not None
    found = by_attribute(sentence, among)
    named = [] if found is None else [thing for step in found.steps for thing in step.theme if thing.noun == ANYTHING]
    assert [thing.adjectives[0] for thing in named] == alone
    drawn = [paraphrase(text, random.Random(seed), split, among) for seed in range(40) for split in SPLITS]
    meant = {parse(other) for other in drawn}
    assert meant <= {sentence, found}
    assert (found in meant) == bool(alone)
