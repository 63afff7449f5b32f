"""Scripted experts for LIBERO, on privileged state: every goal that `plan` can read is a sequence of skills.

OSC_POSE follows slowly (a fifth of the command in a control step), so an action is no small step to be added up: it is
the way that is left to the aim, clipped at full speed, and measured again at every step.

An expert remembers little: which grasp it has chosen, and whether it is closing its hand. Whatever goes wrong is seen
in the state: what was lost is taken again, a grasp that failed is given up for another one.
"""

from __future__ import annotations

import numpy as np

from cogvla.envs.recording.execution_noise import ExecutionNoise
from cogvla.libero.env import LiberoEnv
from cogvla.libero.experts.hand import Hand
from cogvla.libero.experts.motion import Move, turn_left
from cogvla.libero.experts.plan import Subgoal, subgoals
from cogvla.libero.experts.skills import PHASES, carry_out, is_done
from cogvla.libero.experts.view import View

POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
"""Metres and radians at action 1.0."""
GAIN = 1.4
_STILL = 0.0015
"""Metres in a control step, below which a hand that should move stands still."""
_PRESS, _HARDEST = 0.25, 4.0
"""A hand that stands still beside its aim is told to move ever further: the controller itself has no integral part."""


class LiberoExpert:
    """Solves the task that `env` has been reset to.

    Args:
        env: an environment of a LIBERO suite, possibly wrapped.
        rng: draws the execution noise.
        noise: scale of that noise; 0 is none, 1 is what demonstrations are recorded with.
    """

    def __init__(self, env: object, rng: np.random.Generator, noise: float = 0.0) -> None:
        unwrapped = getattr(env, "unwrapped", env)
        if not isinstance(unwrapped, LiberoEnv):
            raise ValueError(f"this expert plays LIBERO, got {type(unwrapped).__name__}")
        self._view = View(unwrapped.scene)
        self._subgoals = subgoals(unwrapped.goal)
        self._hand = Hand(self._view)
        self.noisy = ExecutionNoise(rng, noise)
        self._before, self._press = self._view.gripper, 1.0
        self.phase = 0
        """Index into `PHASES` of the last action."""

    def act(self) -> np.ndarray:
        """The clean action float32 [7] for the current state."""
        move = carry_out(self._hand, self._current())
        self.phase = PHASES.index(move.phase)
        return self._action(move)

    def _current(self) -> Subgoal:
        """The first subgoal that is not reached yet; the last one once all are."""
        for subgoal in self._subgoals[:-1]:
            if not is_done(self._hand, subgoal):
                return subgoal
        return self._subgoals[-1]

    def _action(self, move: Move) -> np.ndarray:
        view, hand = self._view, self._view.gripper
        way, turn = move.position - hand, turn_left(view, move.rotation)
        still = float(np.linalg.norm(hand - self._before)) < _STILL
        wanted = float(np.linalg.norm(way)) > 2 * _STILL or float(np.linalg.norm(turn)) > 0.03
        self._press = min(self._press + _PRESS, _HARDEST) if still and wanted else max(self._press - _PRESS, 1.0)
        self._before = hand
        action = np.empty(7)
        action[:3] = _clip_norm(self._press * GAIN * way / POSITION_SCALE)
        action[3:6] = _clip_norm(self._press * GAIN * turn / ROTATION_SCALE)
        action[6] = move.gripper
        return action.astype(np.float32)


def _clip_norm(vector: np.ndarray) -> np.ndarray:
    """Shorten to length 1 where longer, so that straight lines stay straight."""
    return vector / max(float(np.linalg.norm(vector)), 1.0)
