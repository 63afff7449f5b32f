"""The hand of the LIBERO expert: it takes and puts objects, grips fixtures, and remembers grasps that failed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cogvla.libero.experts.grasps import Grasp, Where, candidates
from cogvla.libero.experts.motion import CLOSE, DOWN, OPEN, Move, over, pointing, turn_left
from cogvla.libero.experts.places import Place, place_for
from cogvla.libero.experts.view import FINGER_OPEN, SceneView

NEAR = 0.008
"""Largest distance in metres from the grasp at which the hand closes."""
_LOST = 0.035
WIDE = 2 * FINGER_OPEN - 0.008
"""Metres between the fingers: the hand is open if they are further apart."""
_SHUT = 0.004
"""Metres between the fingers: the hand is empty if they are closer."""
_STALLED = 0.01
_PATIENCE = 12
"""Most control steps that the hand takes to close on something."""
_GRIPPED = 9
"""Control steps until the fingers hold a handle tightly."""
_BACK_OFF = 0.14
_STUCK = 35
"""Control steps that the hand may stay close to a grasp without reaching it."""
_UPRIGHT = 0.9
"""Cosine of the tilt of an item below which its grasp is another one."""
_SLIPS = 0.03
"""Metres per second of a finger at which a thing slips out of the hand."""
_TREMBLES = 4
"""Most control steps in which one finger may lose touch of a thing that the hand has held for as long."""
_RETREAT = 0.06
_AWAY = 0.02


class Hand:
    """The expert's hand, with its memory: the item, the chosen grasp, and the grasps that failed.

    Args:
        view: state of the simulation.
        usual: other states of the same task, in which a good grasp should be good, too.
    """

    def __init__(self, view: SceneView, usual: Sequence[SceneView] = ()) -> None:
        self.view, self._usual = view, usual
        self.closing = 0
        """Control steps since the hand began to close; 0: it is open."""
        self.fixture: str | None = None
        """Name of the fixture that the hand gripped and has not left yet."""
        self._left: np.ndarray | None = None
        self._told = False  # the last action was the first one to say that the hand grips the fixture
        self._firm = 0  # control steps in which both fingers held the item, minus those since, 0 to `_TREMBLES`
        self._let_go = False  # the hand has let go of the item, and is not away from it yet
        self._item = ""
        self._grasp: Grasp | None = None
        self._up = np.zeros(3)  # which way was up, in the item's frame, when the grasp was chosen
        self._failures: list[Grasp] = []
        self._stuck = 0
        self._pose = view.gripper, view.rotation

    # --- what has been reached ---------------------------------------------------------------------------------------

    def still_holds(self, item: str) -> bool:
        """Take note of one more control step; return True if the hand holds an item.

        It is closing, and both fingers touch the item and have stopped, or one trembles after both held it.
        """
        if not self.closing or item != self._item:
            self._firm = 0
            return False
        touched = self.view.touching(item)
        firmly = all(touched) and (self.view.finger_speed < _STALLED or self.closing > _PATIENCE)
        trembles = any(touched) and self.view.finger_speed < _SLIPS and self._firm > 0
        self._firm = min(self._firm + 1, _TREMBLES) if firmly else max(self._firm - 1, 0)
        return firmly or trembles

    def has(self, item: str) -> bool:
        """Return True if the hand is closing on an item or still touches it."""
        return (self.closing > 0 and item == self._item) or any(self.view.touching(item))

    def is_away(self, item: str) -> bool:
        """Return True if the hand has left an item that it took, so that it may turn."""
        if item != self._item:
            return True
        return not self.has(item) and self.view.gripper[2] > self.view.box(item)[1][2] + _AWAY

    def rise_from(self, next_item: str) -> Move | None:
        """Let go of the item that the hand took last and rise above it, without a turn; None when that is done.

        Args:
            next_item: what the hand goes to next; it does not rise from that.
        """
        item = self._item
        if item in ("", next_item) or not self.view.is_thing(item) or self.is_away(item):
            return None
        self.closing = 0
        up = _RETREAT if self.is_open or not any(self.view.touching(item)) else 0.0
        return Move("release", self.view.gripper + np.array([0.0, 0.0, up]), self.view.rotation, OPEN)

    def grips(self, name: str, point: np.ndarray, body: str) -> bool:
        """Return True if the hand has closed on a part (`body`) of a fixture at a point [3]."""
        near = float(np.linalg.norm(point - self.view.gripper)) < _LOST
        if not self.closing or name != self._item or not near or not any(self.view.touching(body)):
            return False
        self.closing += 1
        return self.closing > _GRIPPED

    def follow(self, closes: bool) -> None:
        """Take over what someone else does, who closes or opens the hand; their attempts are no failures of a grasp."""
        item = self._item
        if not closes:
            far = self._left is not None and float(np.linalg.norm(self.view.gripper - self._left)) > _BACK_OFF
            if far or self._told:  # it has left in its own way, or never gripped
                self.fixture = self._left = None
            self._let_go = self._let_go or (self.closing > 0 and self.view.is_thing(item))
            self.closing = 0
        elif not self.closing and self.view.is_thing(item) and self._closes_on(item):
            self.closing, self._pose = 1, (self.view.gripper, self.view.rotation)
        self._failures, self._stuck, self._told = [], 0, False
        if self._grasp is not None and not self.closing and self.view.frame(item)[2] @ self._up < _UPRIGHT:
            self._grasp = None

    def _closes_on(self, item: str) -> bool:
        touched = self.view.touching(item)
        return all(touched) or (any(touched) and self.view.finger_speed > _STALLED)

    # --- fixtures ----------------------------------------------------------------------------------------------------

    def grip(self, name: str, point: np.ndarray, rotation: np.ndarray, aim: np.ndarray) -> Move:
        """Close on a part of a fixture at `point` [3]. `aim` [3] is the next position on the way there."""
        view = self.view
        if name != self._item:
            self._forget(name)
        offset = float(np.linalg.norm(point - view.gripper))
        turn = float(np.linalg.norm(turn_left(view, rotation)))
        close = offset < (_LOST if self.closing else 1.5 * NEAR) and (self.closing or (turn < 0.2 and self.is_open))
        if close and self.closing <= 2 * _PATIENCE:
            self.closing += 1
            self._told, self.fixture, self._left = self.fixture != name, name, None
            return Move("grasp", point, rotation, CLOSE)
        self.closing = 0
        return Move("approach" if offset > 0.03 else "descend", aim, rotation, OPEN)

    def leave(self) -> Move | None:
        """Let go of a fixture and move back, against the direction that the hand points; None when that is done."""
        view = self.view
        if self.fixture is None:
            return None
        self.closing = 0
        if self._left is None:
            self._left = view.gripper
        back = float((self._left - view.gripper) @ view.rotation[:, 2])
        if back > _BACK_OFF:
            self.fixture = self._left = None
            return None
        away = 0.0 if not self.is_open else _BACK_OFF
        return Move("release", view.gripper - away * view.rotation[:, 2], view.rotation, OPEN)

    @property
    def is_open(self) -> bool:
        return self.view.opening > WIDE

    def fist(self) -> float:
        """Forget the item and return the gripper command that closes the hand for a push."""
        self._forget("")
        return CLOSE

    def _forget(self, item: str) -> None:
        """Forget grasps and failures, and start with a new item."""
        self._item, self._grasp, self._failures, self.closing, self._stuck = item, None, [], 0, 0
        self._let_go = False

    # --- taking ------------------------------------------------------------------------------------------------------

    def take(self, item: str, where: Where) -> Move:
        """Go to an item and close on it. Where it goes next decides which grasp is good."""
        view = self.view
        if item != self._item:
            self._forget(item)
        grasp = self._chosen(item, where)
        frame = view.frame(item)
        point = view.position(item) + frame @ grasp.offset
        closing = frame @ grasp.closing
        closing[2] = 0.0
        rotation = pointing(DOWN, closing / np.linalg.norm(closing), view.rotation)
        offset = point - view.gripper
        distance = float(np.hypot(offset[0], offset[1]))
        turn = float(np.linalg.norm(turn_left(view, rotation)))
        if self.closing:
            missed = self.closing > _PATIENCE and (view.opening < _SHUT or not any(view.touching(item)))
            missed = missed or self.closing > 2 * _PATIENCE
            if not missed and float(np.linalg.norm(offset)) < _LOST:
                self.closing += 1
                return Move("grasp", self._pose[0], self._pose[1], CLOSE)
            self._give_up(grasp)
        elif distance < NEAR and abs(offset[2]) < NEAR and turn < 0.15 and self.is_open:
            self.closing = 1
            self._pose = point, rotation
            return Move("grasp", point, rotation, CLOSE)
        elif distance < _LOST:
            self._stuck += 1
            if self._stuck > _STUCK:
                self._give_up(grasp)
        aim = over(view, point, rotation, without=(item,))
        if not self.is_open:  # open the hand before it goes down
            aim[2] = max(aim[2], min(point[2] + 0.06, view.gripper[2] + 0.02))
        return Move("approach" if distance > 0.03 else "descend", aim, rotation, OPEN)

    def _give_up(self, grasp: Grasp) -> None:
        self._failures.append(grasp)
        self._grasp, self.closing, self._stuck = None, 0, 0

    def _chosen(self, item: str, where: Where) -> Grasp:
        if self._grasp is None:
            self._up = self.view.frame(item)[2]
            found = candidates(self.view, item, where, () if self._failures else self._usual)
            self._grasp = min(found, key=lambda pair: pair[0] + sum(_alike(pair[1], f) for f in self._failures))[1]
        return self._grasp

    # --- putting -----------------------------------------------------------------------------------------------------

    def put(self, item: str, where: str, side: int = 0) -> Move:
        """Take an item, carry it to a place (`side`: -1 or 1 for one side of it), and let go of it there."""
        return self.put_at(item, lambda view: place_for(view, where, side))

    def put_at(self, item: str, where: Where) -> Move:
        """Take an item, carry it to a place, and let go of it there."""
        view, place = self.view, where(self.view)
        low, _ = view.box(item)
        bottom = np.array([*view.position(item)[:2], low[2]])
        aim = place.point.copy()
        if place.walls is not None:  # the fingers stay above the walls
            aim[2] = max(aim[2], place.walls - (view.gripper[2] - low[2]))
        offset = aim - bottom
        distance = float(np.hypot(offset[0], offset[1]))
        level = self.level()
        if self.still_holds(item):
            self.closing += 1
            arrived = distance < place.tolerance and -offset[2] < place.drop
            if not arrived:
                phase = "transport" if distance > 0.04 else "lower"
                target = over(
                    view, view.gripper + offset, level, carried=item, without=(), tolerance=0.7 * place.tolerance
                )
                return Move(phase, target, level, CLOSE)
            self.closing, self._let_go = 0, True
            return Move("release", view.gripper, level, OPEN)
        self._let_go = self._let_go and not self.closing and item == self._item and not self.is_away(item)
        if self._let_go and self._in_place(place, bottom):  # farther away, it is taken again
            up = _RETREAT if self.is_open or not any(view.touching(item)) else 0.0
            return Move("release", view.gripper + np.array([0.0, 0.0, up]), level, OPEN)
        return self.take(item, where)

    def level(self) -> np.ndarray:
        """Return the hand's rotation [3,3], straightened so that the hand points down."""
        now = self.view.rotation
        closing = now[:, 0] * (1.0, 1.0, 0.0)
        return pointing(DOWN, closing / np.linalg.norm(closing), now)

    def _in_place(self, place: Place, bottom: np.ndarray) -> bool:
        off = bottom - place.point
        high = place.drop + 0.02 if place.walls is None else place.walls - place.point[2]
        return float(np.hypot(off[0], off[1])) < place.tolerance + 0.02 and off[2] < high


def _alike(one: Grasp, other: Grasp) -> float:
    """Return the likeness of two grasps: 1 for the same direction of closing, 0 for 60 degrees apart or more."""
    cosine = float(one.closing @ other.closing)
    angle = float(np.arccos(np.clip(cosine if one.rim else abs(cosine), -1.0, 1.0)))
    return max(0.0, 1.0 - angle / 1.05)
