"""Scripted expert for the tabletop suites: a waypoint controller on privileged state, with one skill for each verb.

`act` depends on the current state only (no timers, no memory), so it recovers from any mistake: it picks up a lost
object again, and repeats a missed grasp. Motion is proportional to the error and clipped to full speed. Heights follow
a funnel: the closer the gripper is to the line above its aim, the lower it may go. While it is too low, it rises before
it moves sideways.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from cogvla.envs.recording.execution_noise import ExecutionNoise
from cogvla.envs.tabletop.control import POSITION_SCALE, ROTATION_SCALE, clip_norm
from cogvla.envs.tabletop.env import TabletopEnv
from cogvla.envs.tabletop.goals import PUSH_HEIGHT, Goal, destination_point, in_place, push_offset, push_start

PHASES = ("approach", "descend", "grasp", "transport", "lower", "release", "push", "pull", "press")
GAIN = 0.4
HOVER = 0.12
"""Height of the gripper centre in metres on the way to an item or with an item."""
OPEN, CLOSE = -1.0, 1.0
_SLOPE = 8.0
_GRASP_ZONE = 0.010
_WIDE_ZONE = 0.018
_CLOSING = 0.036
"""Metres of finger position: a finger below this is closing, or has not opened yet."""
_FIST = 0.004
"""Metres of finger position: fingers below this hold nothing."""
_STALLED = 0.01
"""Metres per second: a closing finger slower than this has met something."""
_LOWEST = 0.018
_DROP, _STACK_DROP = 0.015, 0.007
"""Height in metres from which the expert lets an item go: above something wide, and above a cube."""
_RETREAT = 0.04
_HANDLE_GRIPPED = 0.018
"""Metres of finger position: fingers below this hold the handle, which is 12 mm wide to each side."""
_RELEASE = {"tray": (0.030, 3.0), "plate": (0.025, 3.0), "cube": (0.007, 8.0)}
"""Kind of destination -> largest distance in metres off its centre to let go, and slope of the funnel."""


class Expert:
    """Expert that solves the task that `env` was last reset to.

    Args:
        env: tabletop environment, possibly wrapped.
        rng: generator of the execution noise.
        noise: scale of that noise: 0 is none, 1 is the noise of recorded demonstrations.
    """

    def __init__(self, env: gym.Env, rng: np.random.Generator, noise: float = 0.0) -> None:
        unwrapped = env.unwrapped
        if not isinstance(unwrapped, TabletopEnv):
            raise ValueError(f"the scripted expert plays tabletop suites, got {type(unwrapped).__name__}")
        self._env = unwrapped
        self._scene = unwrapped.scene
        self.noisy = ExecutionNoise(rng, noise)
        self.phase = 0
        """Index into `PHASES` for the last action."""

    def act(self) -> np.ndarray:
        """Return the action without noise, float32 [7], for the current state."""
        goal = self._env.current_goal()
        skills = {"put": self._put, "push": self._push, "open": self._open, "press": self._press}
        aim, gripper = skills[goal.verb](goal)
        action = np.empty(7)
        action[:3] = clip_norm(GAIN * (aim - self._env.gripper_position) / POSITION_SCALE)
        action[3:6] = clip_norm(-GAIN * self._env.gripper_rotation / ROTATION_SCALE)
        action[6] = gripper
        return action.astype(np.float32)

    def follow(self, executed: np.ndarray) -> None:
        """Do nothing, since there is no memory: see `Advisor` in envs/contract.py."""

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _set_phase(self, name: str) -> None:
        self.phase = PHASES.index(name)

    def _funnel(
        self,
        point: np.ndarray,
        tolerance: float,
        hover: float,
        reference: np.ndarray | None = None,
        slope: float = _SLOPE,
    ) -> np.ndarray:
        """Return the next gripper position [3], so that `reference` (None: the gripper) comes down onto `point` [3]."""
        gripper = self._env.gripper_position
        error = point - (gripper if reference is None else reference)
        distance = float(np.hypot(error[0], error[1]))
        lowest = max(gripper[2] + error[2], PUSH_HEIGHT)
        height = lowest + np.clip(slope * (distance - tolerance), 0.0, max(hover - lowest, 0.0))
        sideways = float(np.clip(1.0 - (height - gripper[2]) / 0.035, 0.0, 1.0))
        across = sideways * clip_norm(error[:2], POSITION_SCALE / GAIN)
        return np.array([*(gripper[:2] + across), height])

    def _gripped(self, item: str) -> bool:
        """Return True if both pads touch the item, and have stopped or lifted the item off the table."""
        thing = self._scene.items[item]
        lifted = thing.free and self._scene.position(item)[2] > thing.rest_height + 0.005
        if self._env.finger_speed > _STALLED and not lifted:
            return False
        data, model = self._scene.data, self._scene.model
        pairs = data.contact.geom
        touched = pairs[(pairs == model.geom(item).id).any(axis=1)]
        touching = {int(geom) for pair in touched for geom in pair}
        return all(model.geom(f"{side}_pad").id in touching for side in ("finger_left", "finger_right"))

    def _take(self, item: str) -> tuple[np.ndarray, float]:
        """Go to an item and close on it; return the next position [3] and the gripper command."""
        point = self._scene.contact_point(item)
        gripper, finger = self._env.gripper_position, float(self._env.fingers.min())
        offset = point - gripper
        distance = float(np.hypot(offset[0], offset[1]))
        zone = _WIDE_ZONE if finger < _CLOSING else _GRASP_ZONE
        depth = max(point[2], _LOWEST) - gripper[2]
        if distance < zone and abs(depth) < zone:
            self._set_phase("grasp")
            return gripper + np.array([offset[0], offset[1], depth]), CLOSE
        aim = self._funnel(point, 0.006, HOVER)
        if finger < _CLOSING:  # open the fingers before going down
            wait = float(np.clip((_CLOSING - finger) / 0.02, 0.0, 1.0))
            aim[2] = max(aim[2], point[2] + 0.06 * wait)
        self._set_phase("approach" if distance > 0.03 else "descend")
        pushed = finger < _FIST and distance > 0.06 and gripper[2] < HOVER / 2  # opening here would push once more
        return aim, CLOSE if pushed else OPEN

    # --- skills ------------------------------------------------------------------------------------------------------

    def _put(self, goal: Goal) -> tuple[np.ndarray, float]:
        gripper = self._env.gripper_position
        gripped = self._gripped(goal.item)
        if not gripped and in_place(self._scene, goal):
            self._set_phase("release")
            return gripper + np.array([0.0, 0.0, _RETREAT]), OPEN
        if not gripped:
            return self._take(goal.item)
        item, goes_to = self._scene.position(goal.item), destination_point(self._scene, goal)
        offset = goes_to - item
        distance = float(np.hypot(offset[0], offset[1]))
        tolerance, slope = _RELEASE[self._scene.items[goal.destination].kind]
        drop = _STACK_DROP if tolerance < 0.01 else _DROP
        if distance < tolerance and abs(offset[2]) < drop:
            self._set_phase("release")
            return gripper + np.array([offset[0], offset[1], 0.0]), OPEN
        self._set_phase("transport" if distance > 0.04 else "lower")
        above = 0.0 if tolerance < 0.01 else 0.003
        return self._funnel(goes_to + np.array([0.0, 0.0, above]), 0.6 * tolerance, HOVER, item, slope), CLOSE

    def _push(self, goal: Goal) -> tuple[np.ndarray, float]:
        """Push an item from behind with closed fingers; steer so that the contact normal points to the destination."""
        gripper = self._env.gripper_position
        start, _, ahead = push_start(self._scene, goal)
        left = float(np.hypot(*(self._scene.position(goal.destination) - self._scene.position(goal.item))[:2]))
        off = push_offset(self._scene, goal, gripper)
        if off is not None:
            self._set_phase("push")
            step = min(left + 0.02, 0.035) * ahead - 1.5 * off * np.array([-ahead[1], ahead[0]])
            return np.array([*(gripper[:2] + step), PUSH_HEIGHT]), CLOSE
        distance = float(np.hypot(*(start - gripper)[:2]))
        self._set_phase("approach" if distance > 0.03 else "descend")
        return self._funnel(np.array([*start[:2], PUSH_HEIGHT]), 0.008, HOVER), self._make_fist(distance)

    def _open(self, goal: Goal) -> tuple[np.ndarray, float]:
        offset = self._scene.contact_point(goal.item) - self._env.gripper_position
        around = float(np.abs(offset[:2]).max()) < _GRASP_ZONE and abs(offset[2]) < _WIDE_ZONE
        if not around or self._env.fingers.max() > _HANDLE_GRIPPED:
            return self._take(goal.item)
        self._set_phase("pull")
        return destination_point(self._scene, goal) + np.array([0.02, 0.0, 0.0]), CLOSE

    def _press(self, goal: Goal) -> tuple[np.ndarray, float]:
        gripper, point = self._env.gripper_position, self._scene.contact_point(goal.item)
        distance = float(np.hypot(*(point - gripper)[:2]))
        self._set_phase("press" if distance < 0.02 else "approach")
        return self._funnel(point - (0.0, 0.0, 0.012), 0.008, HOVER), self._make_fist(distance)

    def _make_fist(self, distance: float) -> float:
        """Return the command that closes the hand to push or press, or opens it while low over an item just let go."""
        return CLOSE if distance < 0.06 or self._env.gripper_position[2] > HOVER - 0.02 else OPEN
