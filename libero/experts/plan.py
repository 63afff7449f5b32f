"""Translate a BDDL goal into an ordered list of subgoals. Works on names and predicates; needs no simulator.

in(bowl, cabinet_top_region)        clear(bowl, cabinet_top_region), open(...), put(bowl, cabinet_top_region)
turnon(stove), on(pot, stove_...)   turnon(stove), put(pot, stove_...)
in(bowl, ..._bottom_region), close(..._bottom_region)    clear, open, put, close
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

VERBS = ("clear", "open", "turnon", "put", "push", "close")
"""Verbs of subgoals, in the order in which the expert carries them out."""
_PREDICATES = {"in": "put", "on": "put", "open": "open", "close": "close", "turnon": "turnon"}
_BEHIND_DOOR = "_heating_region"
_DRAWER = re.compile(r".*cabinet_\d+_(top|middle|bottom)_region$")


@dataclass(frozen=True)
class Subgoal:
    """One step of a plan.

    Attributes:
        verb: one of `VERBS`.
        item: name of the manipulated object, fixture, or drawer region.
        place: where the item goes, for put and push; what opens over it, for clear; otherwise empty.
        until: predicates; the subgoal is done when all hold.
        side: -1 or 1: side of a place that gets two objects; 0: its middle.
    """

    verb: str
    item: str
    place: str = ""
    until: tuple[tuple[str, ...], ...] = ()
    side: int = 0


def subgoals(goal: Iterable[tuple[str, ...]]) -> tuple[Subgoal, ...]:
    """Return the subgoals of a goal in order, including those that must come first, such as opening a drawer.

    Raises:
        ValueError: no skill can reach a predicate of the goal.
    """
    found: list[Subgoal] = []
    goal = list(goal)
    surfaces = [place[0] for name, _, *place in goal if name == "on"]
    for predicate in goal:
        name, item, *place = predicate
        if name not in _PREDICATES:
            raise ValueError(f"the expert cannot reach {predicate}; it knows {', '.join(sorted(_PREDICATES))}")
        verb = "push" if name == "on" and item.startswith("plate_") else _PREDICATES[name]
        if verb == "put" and (door := door_of(place[0])) is not None:
            if _DRAWER.match(door):
                found.append(Subgoal("clear", item, door, until=(predicate,)))
            found.append(Subgoal("open", door, until=(predicate,)))
        side = 0
        if name == "on" and surfaces.count(place[0]) > 1:
            side = -1 if all(subgoal.place != place[0] for subgoal in found) else 1
        found.append(Subgoal(verb, item, place[0] if place else "", (predicate,), side))
    return tuple(sorted(found, key=lambda subgoal: VERBS.index(subgoal.verb)))


def has_door(place: str) -> bool:
    """Return True for the inside of something with a door at its front."""
    return place.endswith(_BEHIND_DOOR)


def door_of(place: str) -> str | None:
    """Return the drawer or door that must be open before something can go into a place; None if there is none."""
    if _DRAWER.match(place):
        return place
    return place.removesuffix(_BEHIND_DOOR) if has_door(place) else None
