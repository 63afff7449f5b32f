"""Safety limiter, the last step before a command is sent: it keeps every command finite and within the limits.

    wanted action --scale--> displacement u of this tick, from the reference position r
        |u - u_before| <= acceleration * dt^2          start and stop smoothly
        |u|            <= step, velocity * dt
        low <= r + u <= high                           and u so small that braking still ends inside
    sent: u / scale (delta) or r + u (absolute)

The reference r of absolute targets is the last command. For deltas it is the commanded position as the robot's
controller keeps it: the running sum of the commands, at most `lead` away from the measured position.

Braking distance: the displacement is u now and shrinks by at most b = acceleration * dt^2 at each following tick, so
the arm needs u + (u - b) + (u - 2b) + ... to come to rest. The largest u whose sum fits into the distance d to the
limit is (d + b k (k+1) / 2) / (k + 1), where k is the largest integer with b k (k+1) / 2 <= d. With this bound on u,
the acceleration and position limits of absolute targets never contradict each other. For deltas the measured position
may move towards the limit by itself; then the position limit takes precedence over the acceleration limit.

Grippers are separate: each is clamped to the embodiment's range, changes by at most `gripper_step` per tick, from where
it is measured or, if it is not, from the first command, and is never braked.

Shape legend: A action dimension, D arm dimensions (the action without its grippers), G grippers, S state dimension,
N actions of a plan, M commands that follow from it.
"""

from __future__ import annotations

import numpy as np

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.control.settings import PerDimension, SafetyLimits

FAR = 1e9
"""Value that means "no limit"; finite, so that the arithmetic needs no special cases."""
SEED_TOLERANCE = 0.01
"""`SafetyLimits.outside` unless it is given; for arms whose limits are in m or rad."""
BRAKING = 100
"""Largest number of braking commands at the end of a plan; an arm that brakes for longer gets the rest later."""
_SLACK = 1e-9


class LimitError(Exception):
    """No safe command exists, so the loop must stop. The message becomes the loop's fault."""


class SafetyLimiter:
    """Limiter of one robot's commands. It remembers the last command, so every robot needs its own.

    Args:
        embodiment: robot, for the sizes, the control rate and the gripper.
        limits: limits of every command; ValueError if they do not fit the embodiment.

    Attributes:
        limited: names of the limits that changed the last command.
    """

    def __init__(self, embodiment: Embodiment, limits: SafetyLimits) -> None:
        limits.check(embodiment)
        arm = [i for i in range(embodiment.action_dim) if i not in embodiment.grippers]
        dims, period = len(arm), 1.0 / embodiment.control_hz
        self._limits = limits
        self._arm = np.array(arm)
        self._grippers = list(embodiment.grippers)
        self._gripper_range = sorted((embodiment.gripper_open, embodiment.gripper_close))
        self._gripper_state = limits.gripper_state or (None,) * len(self._grippers)
        self._absolute = limits.kind == "absolute"
        self._scale_D = np.array(limits.scale or (1.0,) * dims)
        index = limits.state_index or (None,) * dims
        self._measured_D = np.array([i is not None for i in index])
        self._index_D = np.array([i or 0 for i in index])
        self._low_D = _numbers(limits.position_low, dims, -FAR)
        self._high_D = _numbers(limits.position_high, dims, FAR)
        self._step_D = _numbers(limits.step, dims, FAR)
        self._speed_D = _numbers(limits.velocity, dims, FAR) * period
        self._change_D = _numbers(limits.acceleration, dims, FAR / period**2) * period**2
        self._outside = SEED_TOLERANCE if limits.outside is None else limits.outside
        self._largest_D = np.minimum(self._step_D, self._speed_D)
        self._lead_D = _numbers(limits.lead, dims, FAR if self._absolute else 0.0)
        self.limited: tuple[str, ...] = ()
        self.forget()

    def forget(self) -> None:
        """Forget the last command. Call it when the arm, at rest, may have been moved by others."""
        self._reference_D: np.ndarray | None = None
        self._grip_G: np.ndarray | None = None
        self.halt()

    def halt(self) -> None:
        """Set the arm's displacement per tick to zero: it has come to rest at the commanded position."""
        self._moved_D = np.zeros(len(self._arm))

    @property
    def at_rest(self) -> bool:
        """True if the last command did not move the arm."""
        return not self._moved_D.any()

    @property
    def stops(self) -> bool:
        """True if a hold moves the arm no further; False if it has to brake first."""
        return bool((np.abs(self._moved_D) <= self._change_D).all())

    def move(self, action_A: np.ndarray, state_S: np.ndarray) -> np.ndarray:
        """Return the allowed command [A] of this tick that is nearest to the wanted action.

        Args:
            action_A: action [A] of the policy.
            state_S: newest joint state [S].

        Raises:
            LimitError: the action is not finite or exceeds a limit named in `SafetyLimits.reject`; or the arm starts
                outside its limits or does not follow its commands.
        """
        if not np.isfinite(action_A).all():
            raise LimitError(f"an action is not finite: {action_A}")
        reference_D = self._locate(state_S)
        wanted_D = self._wanted(action_A, reference_D)
        moved_D = self._clamp(wanted_D, reference_D)
        if (np.abs(moved_D - wanted_D) > _SLACK).any():
            self.limited = self._exceeded(wanted_D, reference_D) or ("braking",)
            if rejected := self._rejected(self.limited):
                raise LimitError(f"an action is past the {' and '.join(rejected)} limit: {np.round(action_A, 4)}")
        else:
            self.limited = ()
        if self._grip_G is None:
            self._grip_G = np.array([np.nan if i is None else state_S[i] for i in self._gripper_state])
        self._grip_G = self._gripped(action_A[self._grippers].astype(float))
        return self._commanded(moved_D, reference_D)

    def rejects(self, action_A: np.ndarray, state_S: np.ndarray) -> list[str]:
        """Return the limits named in `SafetyLimits.reject` for which `move` would refuse a finite action [A].

        Raises:
            LimitError: as for `move`, for other reasons.
        """
        reference_D = self._locate(state_S)
        return self._rejected(self._exceeded(self._wanted(action_A, reference_D), reference_D))

    def hold(self, state_S: np.ndarray | None) -> np.ndarray | None:
        """Return the command [A] that brings the arm to rest and keeps it there; None before the first command.

        Args:
            state_S: newest joint state [S], or None.
        """
        if self._reference_D is None:
            return None
        reference_D = self._reference_D if state_S is None or self._absolute else self._locate(state_S)
        self.limited = ()
        return self._commanded(self._clamp(np.zeros_like(reference_D), reference_D), reference_D)

    def ahead(self, actions_NA: np.ndarray) -> np.ndarray:
        """Return the commands [M,A] that follow the last one if nothing else happens; they change nothing here.

        These are the allowed commands nearest to the actions [N,A], absolute targets, and then those that brake the arm
        to rest, up to `BRAKING` of them. An action that `move` would refuse ends the actions.
        """
        assert self._absolute, "where the arm will be is known for absolute targets only"
        before = self._reference_D, self._moved_D, self._grip_G, self.limited
        commands: list[np.ndarray] = []
        for action_A in actions_NA:
            assert self._reference_D is not None, "a command has been sent"
            wanted_D = self._wanted(action_A, self._reference_D)
            if self._rejected(self._exceeded(wanted_D, self._reference_D)):
                break
            self._grip_G = self._gripped(action_A[self._grippers].astype(float))
            commands.append(self._commanded(self._clamp(wanted_D, self._reference_D), self._reference_D))
        for _ in range(BRAKING):
            if self.at_rest:
                break
            stop_A = self.hold(None)
            assert stop_A is not None, "a command has been sent"
            commands.append(stop_A)
        self._reference_D, self._moved_D, self._grip_G, self.limited = before
        return np.array(commands).reshape(len(commands), len(self._arm) + len(self._grippers))

    def passed(self, commands_NA: np.ndarray) -> None:
        """Take note that the controller has executed commands [N,A] of `ahead` by itself."""
        for command_A in commands_NA:
            assert self._reference_D is not None, "a command has been sent"
            self._moved_D = command_A[self._arm] - self._reference_D
            self._reference_D = command_A[self._arm]
            self._grip_G = command_A[self._grippers]

    def _wanted(self, action_A: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        """Return the displacement [D] that an action [A] asks for."""
        wanted_D = action_A[self._arm]
        return wanted_D - reference_D if self._absolute else wanted_D * self._scale_D

    def _rejected(self, exceeded: tuple[str, ...]) -> list[str]:
        return [name for name in exceeded if name in self._limits.reject]

    def _locate(self, state_S: np.ndarray) -> np.ndarray:
        """Return the reference position [D], from which displacements start."""
        measured_D = np.where(self._measured_D, state_S[self._index_D], 0.0)
        if self._reference_D is None:
            outside_D = np.maximum(measured_D - self._high_D, self._low_D - measured_D)
            if self._absolute and (outside_D > self._outside).any():
                names = [f"{d}: {measured_D[d]:.4f}" for d in np.flatnonzero(outside_D > self._outside)]
                raise LimitError(f"the arm is outside its joint limits ({', '.join(names)}); move it back by hand")
            return np.clip(measured_D, self._low_D, self._high_D) if self._absolute else measured_D
        ahead_D = np.where(self._measured_D, self._reference_D - measured_D, 0.0)
        if not self._absolute:
            return np.where(self._measured_D, measured_D + np.clip(ahead_D, -self._lead_D, self._lead_D), 0.0)
        if (np.abs(ahead_D) > self._lead_D).any():
            raise LimitError(f"the arm does not follow: measured minus commanded is {np.round(-ahead_D, 4)}")
        return self._reference_D

    def _clamp(self, wanted_D: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        moved_D = np.minimum(np.maximum(wanted_D, self._moved_D - self._change_D), self._moved_D + self._change_D)
        up_D = np.minimum(self._largest_D, self._brakeable(self._high_D - reference_D))
        down_D = np.minimum(self._largest_D, self._brakeable(reference_D - self._low_D))
        return np.minimum(np.maximum(moved_D, -down_D), up_D)

    def _brakeable(self, distance_D: np.ndarray) -> np.ndarray:
        """Return the largest displacement [D] from which the arm can brake within a distance [D]; 0 past the limit."""
        distance_D = np.maximum(distance_D, 0.0)
        k_D = np.floor((np.sqrt(1.0 + 8.0 * distance_D / self._change_D) - 1.0) / 2.0)
        return (distance_D + self._change_D * k_D * (k_D + 1.0) / 2.0) / (k_D + 1.0)

    def _exceeded(self, wanted_D: np.ndarray, reference_D: np.ndarray) -> tuple[str, ...]:
        """Return the names of the limits that the wanted motion exceeds."""
        target_D = reference_D + wanted_D
        past = {
            "position": np.maximum(target_D - self._high_D, self._low_D - target_D),
            "step": np.abs(wanted_D) - self._step_D,
            "velocity": np.abs(wanted_D) - self._speed_D,
            "acceleration": np.abs(wanted_D - self._moved_D) - self._change_D,
        }
        return tuple(name for name, by_D in past.items() if (by_D > _SLACK).any())

    def _gripped(self, wanted_G: np.ndarray) -> np.ndarray:
        low, high = self._gripper_range
        step = self._limits.gripper_step
        if step is not None and self._grip_G is not None:
            from_G = np.clip(self._grip_G, low, high)  # NaN where nothing measures a gripper before its first command
            wanted_G = np.fmin(np.fmax(wanted_G, from_G - step), from_G + step)
        return np.clip(wanted_G, low, high)

    def _commanded(self, moved_D: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        position_D = reference_D + moved_D
        if self._absolute:  # rounding errors must not move a target past its limit
            position_D = np.minimum(np.maximum(position_D, self._low_D), self._high_D)
        self._moved_D, self._reference_D = moved_D, position_D
        assert self._grip_G is not None, "the first action sets the grippers"
        command_A = np.empty(len(self._arm) + len(self._grippers))
        command_A[self._arm] = position_D if self._absolute else moved_D / self._scale_D
        command_A[self._grippers] = self._grip_G
        return command_A


def _numbers(values: PerDimension, dims: int, missing: float) -> np.ndarray:
    return np.array([missing if value is None else float(value) for value in values or (None,) * dims])
