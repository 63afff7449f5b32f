"""Scene of a real robot: the operator sets it up and judges each trial, with a key, a service or a topic.

    waiting      g go (after a countdown)                       q end the session
    running      y success   n failure   x discard the trial    q end the session

A trial without a judgement within the time limit is a failure.
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
"""Words of the topic `~/trial` with their keys; the services are `~/trial/WORD`."""
CHECK_S = 0.2


class SessionEndedError(Exception):
    """The operator ended the session; it can be continued later."""


class OperatorScene:
    """`TrialScene` judged by an operator. Any thread may call `press`; one thread makes the other calls.

    Args:
        instructions: instruction of each task.
        limit_s: longest duration of a trial in seconds.
        countdown_s: seconds between `g` and the first motion.
        say: function that shows the operator a line.
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
        """Handle a key of the operator; other keys are ignored."""
        if key in WORDS.values():
            with self._condition:
                self._pressed = key
                self._condition.notify_all()

    def set_up(self, spec: EpisodeSpec) -> SceneStatus:
        """Wait without a time limit until the operator starts the trial; SessionEndedError after `q`."""
        instruction = self._instructions[spec.task]
        self._status, self._started = SceneStatus(self._status.number + 1, instruction), None
        self._say(f"\n{instruction!r}, trial {spec.initial_state + 1}: set up the scene, then g (q: end the session)")
        while True:
            if self._take(None) == GO and self._count_down():
                self._say("running: y success, n failure, x discard, space emergency stop")
                return self._status

    def status(self) -> SceneStatus:
        """Return the operator's judgement so far; EpisodeAbortedError after `x`, SessionEndedError after `q`."""
        now = time.monotonic()
        self._started = now if self._started is None else self._started
        key = self._take(0.0)
        if key == ABORT:
            raise EpisodeAbortedError("discarded by the operator")
        over = key in (SUCCESS, FAILURE) or now - self._started > self._limit_s
        if over:
            number, instruction = self._status.number, self._status.instruction
            self._status = SceneStatus(number, instruction, success=key == SUCCESS, over=True)
        return self._status

    def _count_down(self) -> bool:
        """Count down; return False if the operator discards the trial."""
        for left in range(self._countdown_s, 0, -1):
            self._say(f"{left} ...")
            until = time.monotonic() + 1.0
            while (remaining := until - time.monotonic()) > 0:
                if self._take(remaining) == ABORT:
                    self._say("stopped; press g when the scene is ready")
                    return False
        return True

    def _take(self, timeout_s: float | None) -> str:
        """Wait for a key and return it, or "" after `timeout_s` (None waits without limit); SessionEndedError for q."""
        last = None if timeout_s is None else time.monotonic() + timeout_s
        with self._condition:
            while not self._pressed and (last is None or time.monotonic() < last):
                self._condition.wait(CHECK_S if last is None else max(last - time.monotonic(), 0))  # lets Ctrl-C in
            key, self._pressed = self._pressed, ""
        if key == QUIT:
            raise SessionEndedError
        return key


def listen(node: Any, scene: OperatorScene) -> None:
    """Serve `~/trial/WORD` and subscribe to the topic `~/trial` (String), as other ways to press the keys."""

    def service(word: str) -> Callable[[bool], Answer]:
        def press(_: bool) -> Answer:
            scene.press(WORDS[word])
            return True, word

        return press

    for word in WORDS:
        node.serve(f"~/trial/{word}", TRIGGER, service(word))
    node.subscribe("~/trial", STRING, Delivery.EVENTS, lambda message: scene.press(WORDS.get(message.data, "")))
