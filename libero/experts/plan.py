"""From a BDDL goal to what an expert does, in order. Names and predicates only: no simulator is needed.

in(bowl, cabinet_top_region)        open(cabinet_top_region), put(bowl, cabinet_top_region)
turnon(stove), on(pot, stove_...)   turnon(stove), put(pot, stove_...)
in(bowl, ..._bottom_region), close(..._bottom_region)    open, put, close
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

VERBS = ("open", "turnon", "put", "push", "close")
"""In the order in which they are done."""
_PREDICATES = {"in": "put", "on": "put", "open": "open", "close": "close", "turnon": "turnon"}
_DRAWER = re.compile(r".*cabinet_\d+_(top|middle|bottom)_region$")


@dataclass(frozen=True)
class Subgoal:
    """One thing to do.

    Attributes:
        verb: one of `VERBS`.
        item: what is manipulated: an object, a fixture, or the region of a drawer.
        place: where it goes, for put and push.
        until: the predicates that make further work on it unnecessary.
        side: of a place that two things are put on, -1 or 1; 0 is its middle.
    """

    verb: str
    item: str
    place: str = ""
    until: tuple[tuple[str, ...], ...] = ()
    side: int = 0


def subgoals(goal: Iterable[tuple[str, ...]]) -> tuple[Subgoal, ...]:
    """What a goal asks for, with what has to be done before it.

    Raises:
        ValueError: a predicate that no skill brings about.
    """
    found: list[Subgoal] = []
    goal = list(goal)
    surfaces = [place[0] for name, _, *place in goal if name == "on"]
    for predicate in goal:
        name, item, *place = predicate
        if name not in _PREDICATES:
            raise ValueError(f"no expert brings about {predicate}; only {', '.join(sorted(_PREDICATES))}")
        verb = "push" if name == "on" and item.startswith("plate_") else _PREDICATES[name]
        if verb == "put" and (door := door_of(place[0])) is not None:
            found.append(Subgoal("open", door, until=(predicate,)))
        side = 0
        if name == "on" and surfaces.count(place[0]) > 1:
            side = -1 if all(subgoal.place != place[0] for subgoal in found) else 1
        found.append(Subgoal(verb, item, place[0] if place else "", (predicate,), side))
    return tuple(sorted(found, key=lambda subgoal: VERBS.index(subgoal.verb)))


def door_of(place: str) -> str | None:
    """The drawer or door that has to be open before something goes into a place."""
    if _DRAWER.match(place):
        return place
    return place.removesuffix("_heating_region") if place.endswith("_heating_region") else None
