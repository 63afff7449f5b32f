"""A scene in a room: the operator sets it up, and judges with a key, or with a service or topic of the robot's node.

    waiting      g go (after a countdown)                       q end the session
    running      y success   n failure   x take the trial back  q end the session

Nothing said until the time is up is a failure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cogvla.envs.episodes import EpisodeSpec
from cogvla.real_robot.ros.node import STRING, TRIGGER, Answer, Delivery
from cogvla.real_robot.simulated.simulated_arm import SceneStatus
from cogvla.real_robot.trials.trials import EpisodeAbortedError

GO, SUCCESS, FAILURE, ABORT, QUIT = "g", "y", "n", "x", "q"
WORDS = {"go": GO, "success": SUCCESS, "failure": FAILURE, "abort": ABORT, "quit": QUIT}
"""What the topic `~/trial` takes; the services are `~/trial/WORD`."""
CHECK_S = 0.2


class SessionEndedError(Exception):
    """The operator wants to go on another time."""


class OperatorScene:
    """See the module docstring. `press` is called by any thread, the rest by the one that plays.

    Args:
        instructions: by task.
        limit_s: a trial lasts no longer.
        countdown_s: seconds between `g` and the first motion.
        say: shows the operator a line.
    """

    def __init__(
        self, instructions: Sequence[str], limit_s: float, countdown_s: int = 3, say: Callable[[str], None] = print
    ) -> None:
        if limit_s <= 0 or countdown_s < 0:
            raise ValueError(f"need limit_s > 0 and countdown_s >= 0, got {limit_s:g} and {countdown_s}")
        self._instructions, self._limit_s, self._countdown_s, self._say = instructions, limit_s, countdown_s, say
        self._condition = threading.Condition()
        self._pressed = ""
        self._status = SceneStatus(0, "")
        self._started: float | None = None

    def press(self, key: str) -> None:
        """One of the keys; others are ignored."""
        if key in WORDS.values():
            with self._condition:
                self._pressed = key
                self._condition.notify_all()

    def set_up(self, spec: EpisodeSpec) -> SceneStatus:
        """See `Scene.set_up`: waits for the operator, for as long as it takes; SessionEndedError after `q`."""
        instruction = self._instructions[spec.task]
        self._status, self._started = SceneStatus(self._status.number + 1, instruction), None
        self._say(f"\n{instruction!r}, trial {spec.initial_state + 1}: set up the scene, then g (q: end the session)")
        while True:
            if self._take(None) == GO and self._count_down():
                self._say("running: y success, n failure, x take it back, space emergency stop")
                return self._status

    def status(self) -> SceneStatus:
        """See `Scene.status`; SessionEndedError after `q`."""
        now = time.monotonic()
        self._started = now if self._started is None else self._started
        key = self._take(0.0)
        if key == ABORT:
            raise EpisodeAbortedError("taken back by the operator")
        over = key in (SUCCESS, FAILURE) or now - self._started > self._limit_s
        if over:
            number, instruction = self._status.number, self._status.instruction
            self._status = SceneStatus(number, instruction, success=key == SUCCESS, over=True)
        return self._status

    def _count_down(self) -> bool:
        """Whether nobody has taken it back meanwhile."""
        for left in range(self._countdown_s, 0, -1):
            self._say(f"{left} ...")
            until = time.monotonic() + 1.0
            while (remaining := until - time.monotonic()) > 0:
                if self._take(remaining) == ABORT:
                    self._say("put off; g when it is ready")
                    return False
        return True

    def _take(self, timeout_s: float | None) -> str:
        """The key that was pressed last, at once or within the time (None: however long); "" if none was."""
        last = None if timeout_s is None else time.monotonic() + timeout_s
        with self._condition:
            while not self._pressed and (last is None or time.monotonic() < last):
                self._condition.wait(CHECK_S if last is None else max(last - time.monotonic(), 0))  # Ctrl-C must get in
            key, self._pressed = self._pressed, ""
        if key == QUIT:
            raise SessionEndedError
        return key


def listen(node: Any, scene: OperatorScene) -> None:
    """Let a node's services `~/trial/success` and so on, and its topic `~/trial` (String), do what the keys do."""

    def service(word: str) -> Callable[[bool], Answer]:
        def press(_: bool) -> Answer:
            scene.press(WORDS[word])
            return True, word

        return press

    for word in WORDS:
        node.serve(f"~/trial/{word}", TRIGGER, service(word))
    node.subscribe("~/trial", STRING, Delivery.EVENTS, lambda message: scene.press(WORDS.get(message.data, "")))
