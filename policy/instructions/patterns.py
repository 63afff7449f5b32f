"""Patterns of sentences, split into those for training and those that only evaluation uses, as the words are.

Slots are in braces. Punctuation makes no difference when a sentence is parsed.
"""

from __future__ import annotations

from cogvla.policy.instructions.lexicon import Words

WRAPPERS = Words(
    ("{step}",),
    (
        "please {step}",
        "{step}, please",
        "can you {step}?",
        "could you please {step}?",
        "now {step}",
        "robot, {step}",
        "I want you to {step}",
        "the task is to {step}",
    ),
    (
        "kindly {step}",
        "would you {step}?",
        "I would like you to {step}",
        "your job is to {step}",
        "be so kind as to {step}",
        "it would be great if you could {step}",
    ),
)
"""Around a request: an imperative, or two."""
NEGATIONS = Words(
    (),
    ("{step}, not {other}", "{step} and leave {other} alone"),
    ("{step} instead of {other}", "{step} and ignore {other}", "never mind {other}: {step}"),
)
"""Around a request of one step, with a thing that is not meant."""
JOINTS = Words(
    ("{first}, then {second}", "{first} and {second}"),
    (
        "first {first}, then {second}",
        "{first} and then {second}",
        "{first}, and after that {second}",
        "after you {first}, {second}",
    ),
    ("{first}, and once that is done, {second}", "{first} before you {second}", "start here: {first}. next, {second}"),
)
REQUESTS = Words(("{verb} {theme} {to}", "{pick} {theme} and {verb} {it} {to}", "{verb} {theme}"))
"""Imperatives, which wrappers and joints are for."""
MOVES = Words(
    (),
    ("{to}, {verb} {theme}", "{theme} {has} to be {done} {to}", "{verb} {theme} so that {it} {is} {at}"),
    ("{theme} should be {done} {to}", "make sure {theme} {gets} {done} {to}"),
)
"""Patterns of a single step with a goal."""
PLACES = Words(
    (),
    ("{theme} {has} to be {at}",),
    ("{theme} {goes} {at}", "I need {theme} {at}", "make sure {theme} {ends} up {at}"),
)
"""Patterns without a verb for the act `put`."""
CHANGES = Words(
    (),
    ("{theme} {has} to be {done}", "see that {theme} {is} {done}"),
    ("{theme} should be {done}", "I need {theme} {done}", "make sure {theme} {gets} {done}"),
)
"""Patterns of a single step without a goal."""
LINKS = Words(("",), ("that is",), ("sitting", "which is"))
"""Between a thing and its place."""
NUMBERS = {
    "it": ("it", "them"),
    "is": ("is", "are"),
    "has": ("has", "have"),
    "goes": ("goes", "go"),
    "gets": ("gets", "get"),
    "ends": ("ends", "end"),
}
"""Words that follow the number of the theme: of one thing, and of several."""
