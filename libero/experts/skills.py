"""Choose the skill for a subgoal, and decide when the subgoal is done."""

from __future__ import annotations

from cogvla.libero.experts.fixtures import close, insert, open_drawer, push, turn_on
from cogvla.libero.experts.hand import Hand
from cogvla.libero.experts.motion import Move
from cogvla.libero.experts.places import in_the_way, is_shut, place_beside
from cogvla.libero.experts.plan import Subgoal, has_door

PHASES = ("approach", "descend", "grasp", "transport", "lower", "release", "push", "pull", "turn")

_STILL_OPEN = 0.7
"""Fraction of a drawer's travel. The expert does not open a drawer again that something pushed in to this point."""


def carry_out(hand: Hand, subgoal: Subgoal) -> Move:
    """Return the next move for a subgoal."""
    if hand.fixture not in (None, subgoal.item):
        leaving = hand.leave()
        if leaving is not None:
            return leaving
    rising = hand.rise_from(subgoal.item)
    if rising is not None:
        return rising
    match subgoal.verb:
        case "put" if has_door(subgoal.place):
            return insert(hand, subgoal.item, subgoal.place)
        case "put":
            return hand.put(subgoal.item, subgoal.place, subgoal.side)
        case "clear":
            return hand.put_at(subgoal.item, lambda view: place_beside(view, subgoal.item, subgoal.place))
        case "push":
            return push(hand, subgoal.item, subgoal.place)
        case "open":
            return open_drawer(hand, subgoal.item)
        case "close":
            return close(hand, subgoal.item)
        case "turnon":
            return turn_on(hand, subgoal.item)
    raise AssertionError(f"no skill for {subgoal.verb}")


def is_done(hand: Hand, subgoal: Subgoal) -> bool:
    """Return True if a subgoal is done."""
    view = hand.view
    if subgoal.verb == "clear":
        if not is_shut(view, subgoal.place) or view.holds(*subgoal.until):
            return True
        return not in_the_way(view, subgoal.item, subgoal.place) and hand.is_away(subgoal.item)
    if subgoal.verb == "open":
        joint = view.joint(subgoal.item)
        bumped = joint is not None and joint.travel > _STILL_OPEN and hand.fixture != subgoal.item
        return view.holds(*subgoal.until) or view.holds(("open", subgoal.item)) or bumped
    if subgoal.verb in ("turnon", "close"):
        return view.holds(*subgoal.until)
    return view.holds(*subgoal.until) and not hand.has(subgoal.item)
