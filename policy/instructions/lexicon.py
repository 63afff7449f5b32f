"""Words of instructions for manipulation: acts, things, properties and places, each with synonyms.

Synonyms are split: training uses those of `train`, evaluation those of `held_out`, which training never sees. A synonym
must not fit another thing of a scene ("dish" fits a plate and a bowl). Words that say which one (left, front, top) have
no synonyms without that word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CANONICAL, TRAIN, HELD_OUT = "canonical", "train", "held_out"


@dataclass(frozen=True)
class Words:
    """The ways to say one meaning.

    Attributes:
        canonical: the usual words of data sets.
        train: synonyms for training.
        held_out: synonyms for evaluation.
    """

    canonical: tuple[str, ...]
    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.canonical, *self.train, *self.held_out)

    def of(self, split: str) -> tuple[str, ...]:
        """Return the words of a split; training may also use the canonical ones."""
        if split == HELD_OUT:
            return self.held_out or self.canonical
        return self.canonical if split == CANONICAL else (*self.canonical, *self.train)


def _words(canonical: str, train: str = "", held_out: str = "") -> Words:
    return Words(*(tuple(filter(None, part.split(", "))) for part in (canonical, train, held_out)))


VERBS: Mapping[str, Words] = {
    "put": _words("put, place", "set, move", "position, lay, deposit"),
    "stack": _words("stack", "pile", "balance"),
    "push": _words("push", "slide", "nudge, shove"),
    "open": _words("open", "pull open", "ease open"),
    "close": _words("close", "shut", "ease closed"),
    "press": _words("press", "push down", "tap, depress"),
    "turn on": _words("turn on", "switch on", "power up"),
    "turn off": _words("turn off", "switch off", "power down"),
}
"""Acts. `stack` is another word for putting a thing on one of its kind."""
PICK = _words("pick up", "take, lift", "grab, grasp")
DONE: Mapping[str, str] = {
    "put": "put", "place": "placed", "set": "set", "move": "moved", "position": "positioned", "lay": "laid",
    "deposit": "deposited", "stack": "stacked", "pile": "piled", "balance": "balanced", "push": "pushed",
    "slide": "slid", "nudge": "nudged", "shove": "shoved", "open": "opened", "pull open": "pulled open",
    "ease open": "eased open", "close": "closed", "shut": "shut", "ease closed": "eased closed", "press": "pressed",
    "push down": "pushed down", "tap": "tapped", "depress": "depressed", "turn on": "turned on",
    "switch on": "switched on", "power up": "powered up", "turn off": "turned off", "switch off": "switched off",
    "power down": "powered down",
}  # fmt: skip
"""The participle of each verb."""

NOUNS: Mapping[str, Words] = {
    words.canonical[0]: words
    for words in (
        _words("cube", "block", "brick"),
        _words("cylinder", "canister", "drum"),
        _words("ball", "sphere", "orb"),
        _words("puck", "disc", "chip"),
        _words("mat", "pad", "coaster"),
        _words("zone", "area", "patch"),
        _words("tray", "shallow bin", "flat crate"),
        _words("plate", "dinner plate", "saucer"),
        _words("drawer", "sliding drawer", "pullout drawer"),
        _words("button", "push button", "buzzer"),
        _words("bowl"),
        _words("ramekin"),
        _words("cookie box", "biscuit box", "cookie package"),
        _words("stove", "cooktop", "burner"),
        _words("cabinet", "cupboard", "dresser"),
        _words("cabinet shelf"),
        _words("shelf"),
        _words("microwave", "microwave oven"),
        _words("basket", "hamper", "pannier"),
        _words("caddy", "organizer", "desk tidy"),
        _words("compartment", "section", "slot"),
        _words("rack", "stand", "holder"),
        _words("wine rack", "wine stand", "wine holder"),
        _words("wine bottle", "bottle of wine", "wine flask"),
        _words("moka pot", "coffee maker", "espresso pot"),
        _words("frying pan", "skillet", "frypan"),
        _words("mug", "cup", "teacup"),
        _words("book", "volume", "tome"),
        _words("alphabet soup", "letter soup", "alphabet broth"),
        _words("cream cheese"),
        _words("cream cheese box", "cream cheese pack", "cream cheese carton"),
        _words("salad dressing", "dressing", "vinaigrette"),
        _words("bbq sauce", "barbecue sauce", "grill sauce"),
        _words("tomato sauce"),
        _words("ketchup"),
        _words("butter"),
        _words("milk"),
        _words("chocolate pudding", "pudding", "chocolate dessert"),
        _words("orange juice", "", "oj"),
        _words("one", "thing", "object, item"),
    )
}
"""Things, by their first word; `one` is a thing that its adjectives tell from the others."""
ANYTHING = "one"
PARTS = ("drawer", "compartment")
"""Things that are part of another: `the top drawer of the cabinet`."""
ADJECTIVES: Mapping[str, Words] = {
    words.canonical[0]: words
    for words in (
        *map(_words, ("red", "green", "blue", "yellow", "orange", "white", "black", "grey", "yellow and white")),
        _words("purple", "violet", "lilac"),
        _words("cyan", "turquoise", "aqua"),
        _words("pink", "rose", "salmon"),
        _words("wooden"),
    )
}
ORDINALS = ("top", "bottom", "middle", "left", "right", "front", "back")
"""Words that tell the parts of a thing apart."""
THING = "~"
WHICH: Mapping[str, Words] = {
    "left": _words("left ~, ~ on the left"),
    "right": _words("right ~, ~ on the right"),
    "middle": _words("middle ~, ~ in the middle"),
    "front": _words("front ~, ~ at the front"),
    "back": _words("back ~, ~ at the back"),
    "leftmost": _words("leftmost ~", "~ furthest to the left", "~ on the far left"),
    "rightmost": _words("rightmost ~", "~ furthest to the right", "~ on the far right"),
    "nearest": _words("~ nearest to the robot", "~ closest to the robot, ~ closest to the arm",
                      "~ least distant from the robot"),
    "farthest": _words("~ farthest from the robot", "~ furthest from the robot, ~ furthest from the arm",
                       "~ most distant from the robot"),
    "table center": _words("~ from table center", "~ from the center of the table", "~ amid the table"),
}  # fmt: skip
"""Words that pick one of several equal things, around the thing (~)."""
RELATIONS: Mapping[str, Words] = {
    "in": _words("in", "inside", "within"),
    "on": _words("on", "", "upon"),
    "on top": _words("on top of", "", "atop"),
    "under": _words("under", "below", "beneath"),
    "left of": _words("to the left of", "left of", "on the left side of"),
    "right of": _words("to the right of", "right of", "on the right side of"),
    "front of": _words("to the front of, in front of"),
    "next to": _words("next to", "beside", "adjacent to"),
    "between": _words("between"),
}
MOTIONS: Mapping[str, tuple[str, ...]] = {"in": ("into",), "on": ("onto",)}
"""Further words for a relation that a motion ends in, in training, too."""
