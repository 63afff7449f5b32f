"""Scripted expert for LIBERO, on privileged state: it splits a goal into subgoals and solves each with a skill.

The controller OSC_POSE follows slowly (a fifth of the command in one control step). An action is therefore not a small
step of a planned path: it is the remaining way to the aim, clipped to full speed, and measured again at every step.

The expert remembers little: the grasp that it chose, and that it is closing its hand. It sees mistakes in the state: it
takes a lost object again, and tries another grasp after one that failed.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from cogvla.envs.recording.execution_noise import ExecutionNoise
from cogvla.libero.env import LiberoEnv
from cogvla.libero.experts.hand import Hand
from cogvla.libero.experts.motion import Move, turn_left
from cogvla.libero.experts.plan import Subgoal, subgoals
from cogvla.libero.experts.skills import PHASES, carry_out, is_done
from cogvla.libero.experts.view import SceneView

POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
"""Metres and radians of an action of 1.0."""
GAIN = 1.4
_STILL = 0.0015
"""Metres in one control step: a hand that moves less stands still."""
_FARTHEST, _LEAD, _HOLD = 0.66, 4.0, 2.0
"""Metres from shoulder to wrist, beyond which the elbow is straight and the controller loses the arm; control steps
that it takes to stop; and metres back for each metre beyond."""
_DOWNWARD = -0.8
_PRESS, _HARDEST = 0.25, 4.0
"""Factor on the action of a hand that stands still beside its aim: its growth in each step, and its limit. The
controller has no integral part, so the expert adds one."""

_EVERY = 7
"""Step between the fixed initial states that decide, together, at which side a thing is taken."""


class LiberoExpert:
    """Expert that solves the task that `env` was last reset to.

    Args:
        env: environment of a LIBERO suite, possibly wrapped.
        rng: generator of the execution noise.
        noise: scale of that noise: 0 is none, 1 is the noise of recorded demonstrations.
    """

    def __init__(self, env: gym.Env, rng: np.random.Generator, noise: float = 0.0) -> None:
        unwrapped = env.unwrapped
        if not isinstance(unwrapped, LiberoEnv):
            raise ValueError(f"this expert plays LIBERO only, got an environment {type(unwrapped).__name__}")
        self._view = SceneView(unwrapped.scene)
        self._subgoals = subgoals(unwrapped.goal)
        usual = [self._view.elsewhere(state) for state in unwrapped.fixed_states()[::_EVERY]]
        self._hand = Hand(self._view, usual)
        self.noisy = ExecutionNoise(rng, noise)
        self._before, self._press = self._view.gripper, 1.0
        self.phase = 0
        """Index into `PHASES` for the last action."""

    def act(self) -> np.ndarray:
        """Return the action without noise, float32 [7], for the current state."""
        move = carry_out(self._hand, self._current())
        self.phase = PHASES.index(move.phase)
        return self._action(move)

    def follow(self, executed: np.ndarray) -> None:
        """Take note that someone else chose the last action, float32 [7]: see `Advisor` in envs/contract.py."""
        self._hand.follow(closes=bool(executed[6] > 0))
        self._press = 1.0

    def _current(self) -> Subgoal:
        """Return the first subgoal that is not reached yet, or the last one if all are reached."""
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
        way = way - self._restraint(hand - self._before, hand + way)
        self._before = hand
        action = np.empty(7)
        action[:3] = _clip_norm(self._press * GAIN * way / POSITION_SCALE)
        action[3:6] = _clip_norm(self._press * GAIN * turn / ROTATION_SCALE)
        action[6] = move.gripper
        return action.astype(np.float32)

    def _restraint(self, moved: np.ndarray, aim: np.ndarray) -> np.ndarray:
        """Return the way [3] back from where the arm would be stretched out, if the hand went on as it `moved` [3].

        An aim [3] that is farther away may be reached, but not passed.
        """
        if self._view.rotation[2, 2] > _DOWNWARD:
            return np.zeros(3)  # where the wrist is then depends on more than the hand
        reach = self._view.reach + _LEAD * moved
        length = float(np.linalg.norm(reach))
        return _HOLD * max(length - max(_FARTHEST, self._view.stretch(aim)), 0.0) * reach / length


def _clip_norm(vector: np.ndarray) -> np.ndarray:
    """Scale a longer vector down to length 1. Unlike clipping each number, this keeps the direction."""
    return vector / max(float(np.linalg.norm(vector)), 1.0)
