"""The last thing before the wire: every command is finite and inside the limits, whatever was wanted.

    wanted action --scale--> displacement u of this tick, from the reference position r
        |u - u_before| <= acceleration * dt^2          no jerk to full speed, and none to a halt
        |u|            <= step, velocity * dt
        low <= r + u <= high                           and u so small that braking still ends inside
    sent: u / scale (delta) or r + u (absolute)

The reference is the last command (absolute targets), or for deltas the commanded position as the robot's controller
keeps it: the running sum of what was sent, at most `lead` away from the measured position.

Braking distance. With displacement u now and at most b = acceleration * dt^2 less at each following tick, the arm comes
to rest after u + (u - b) + (u - 2b) + ...; the largest u whose sum fits into the distance d to the limit is
(d + b k (k+1) / 2) / (k + 1), where k is the largest integer with b k (k+1) / 2 <= d. Keeping u below it means that
acceleration and position limits never contradict each other. For absolute targets both hold always. For deltas the
measured position may move against the limit by itself; then the position wins over the acceleration.

The gripper is apart: it is clamped to the embodiment's range, changes by at most `gripper_step`, and is never braked.

Shape legend: A action dimension, D arm dimensions (the action without its gripper), S state dimension.
"""

from __future__ import annotations

import numpy as np

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.control.settings import PerDimension, SafetyLimits

FAR = 1e9
"""Stands for "no limit": finite, so that the arithmetic needs no special cases."""
SEED_TOLERANCE = 0.01
"""An arm at its mechanical stop may measure so much (m or rad) outside of its limits."""
_SLACK = 1e-9


class LimitError(Exception):
    """The command must not be sent, and the loop must stop; the text is the fault."""


class SafetyLimiter:
    """Turns wanted actions into commands; see the module docstring. It is stateful: one object per robot.

    Attributes:
        limited: names of the limits that changed the last command.
    """

    def __init__(self, embodiment: Embodiment, limits: SafetyLimits) -> None:
        limits.check(embodiment)
        gripper = embodiment.gripper_index
        arm = [i for i in range(embodiment.action_dim) if i != gripper]
        dims, period = len(arm), 1.0 / embodiment.control_hz
        self._limits = limits
        self._arm = np.array(arm)
        self._gripper = gripper
        self._gripper_range = sorted((embodiment.gripper_open, embodiment.gripper_close))
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
        self._largest_D = np.minimum(self._step_D, self._speed_D)
        self._lead_D = _numbers(limits.lead, dims, FAR if self._absolute else 0.0)
        self.limited: tuple[str, ...] = ()
        self.forget()

    def forget(self) -> None:
        """The arm may be anywhere, at rest: what was sent before says nothing about it any more."""
        self._reference_D: np.ndarray | None = None
        self._grip: float | None = None
        self.halt()

    def halt(self) -> None:
        """The arm came to rest where it was told to be."""
        self._moved_D = np.zeros(len(self._arm))

    def move(self, action_A: np.ndarray, state_S: np.ndarray) -> np.ndarray:
        """The command [A] for this tick, nearest to the wanted action.

        Args:
            action_A: what the policy wants.
            state_S: the newest joint state.

        Raises:
            LimitError: not finite, past a limit that rejects, or an arm that is not where it should be.
        """
        if not np.isfinite(action_A).all():
            raise LimitError(f"an action is not finite: {action_A}")
        reference_D = self._locate(state_S)
        wanted_D = action_A[self._arm]
        wanted_D = wanted_D - reference_D if self._absolute else wanted_D * self._scale_D
        moved_D = self._clamp(wanted_D, reference_D)
        if (np.abs(moved_D - wanted_D) > _SLACK).any():
            self.limited = self._exceeded(wanted_D, reference_D) or ("braking",)
            rejected = [name for name in self.limited if name in self._limits.reject]
            if rejected:
                raise LimitError(f"an action is past the {' and '.join(rejected)} limit: {np.round(action_A, 4)}")
        else:
            self.limited = ()
        if self._gripper is not None:
            self._grip = self._gripped(float(action_A[self._gripper]))
        return self._commanded(moved_D, reference_D)

    def hold(self, state_S: np.ndarray | None) -> np.ndarray | None:
        """The command [A] that brings the arm to rest and keeps it there; None: nothing was commanded yet.

        Args:
            state_S: the newest joint state, if any is known.
        """
        if self._reference_D is None:
            return None
        reference_D = self._reference_D if state_S is None or self._absolute else self._locate(state_S)
        self.limited = ()
        return self._commanded(self._clamp(np.zeros_like(reference_D), reference_D), reference_D)

    def _locate(self, state_S: np.ndarray) -> np.ndarray:
        """Where displacements start from [D]."""
        measured_D = np.where(self._measured_D, state_S[self._index_D], 0.0)
        if self._reference_D is None:
            outside_D = np.maximum(measured_D - self._high_D, self._low_D - measured_D)
            if self._absolute and (outside_D > SEED_TOLERANCE).any():
                names = [f"{d}: {measured_D[d]:.4f}" for d in np.flatnonzero(outside_D > SEED_TOLERANCE)]
                raise LimitError(f"the arm is outside of its joint limits ({', '.join(names)}); move it back by hand")
            return np.clip(measured_D, self._low_D, self._high_D) if self._absolute else measured_D
        ahead_D = np.where(self._measured_D, self._reference_D - measured_D, 0.0)
        if not self._absolute:
            return np.where(self._measured_D, measured_D + np.clip(ahead_D, -self._lead_D, self._lead_D), 0.0)
        if (np.abs(ahead_D) > self._lead_D).any():
            raise LimitError(f"the arm does not follow: measured {np.round(-ahead_D, 4)} away from the command")
        return self._reference_D

    def _clamp(self, wanted_D: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        moved_D = np.minimum(np.maximum(wanted_D, self._moved_D - self._change_D), self._moved_D + self._change_D)
        up_D = np.minimum(self._largest_D, self._brakeable(self._high_D - reference_D))
        down_D = np.minimum(self._largest_D, self._brakeable(reference_D - self._low_D))
        return np.minimum(np.maximum(moved_D, -down_D), up_D)

    def _brakeable(self, distance_D: np.ndarray) -> np.ndarray:
        """The largest displacement from which the arm comes to rest within a distance; 0 past the limit."""
        distance_D = np.maximum(distance_D, 0.0)
        k_D = np.floor((np.sqrt(1.0 + 8.0 * distance_D / self._change_D) - 1.0) / 2.0)
        return (distance_D + self._change_D * k_D * (k_D + 1.0) / 2.0) / (k_D + 1.0)

    def _exceeded(self, wanted_D: np.ndarray, reference_D: np.ndarray) -> tuple[str, ...]:
        """Names of the limits that the wanted motion is past."""
        target_D = reference_D + wanted_D
        past = {
            "position": np.maximum(target_D - self._high_D, self._low_D - target_D),
            "step": np.abs(wanted_D) - self._step_D,
            "velocity": np.abs(wanted_D) - self._speed_D,
            "acceleration": np.abs(wanted_D - self._moved_D) - self._change_D,
        }
        return tuple(name for name, by_D in past.items() if (by_D > _SLACK).any())

    def _gripped(self, wanted: float) -> float:
        low, high = self._gripper_range
        step = self._limits.gripper_step
        if step is not None and self._grip is not None:
            wanted = min(max(wanted, self._grip - step), self._grip + step)
        return min(max(wanted, low), high)

    def _commanded(self, moved_D: np.ndarray, reference_D: np.ndarray) -> np.ndarray:
        position_D = reference_D + moved_D
        if self._absolute:  # rounding must not carry a target past its limit
            position_D = np.minimum(np.maximum(position_D, self._low_D), self._high_D)
        self._moved_D, self._reference_D = moved_D, position_D
        command_A = np.empty(len(self._arm) + (self._gripper is not None))
        command_A[self._arm] = position_D if self._absolute else moved_D / self._scale_D
        if self._gripper is not None:
            assert self._grip is not None, "the gripper is commanded with the first action"
            command_A[self._gripper] = self._grip
        return command_A


def _numbers(values: PerDimension, dims: int, missing: float) -> np.ndarray:
    return np.array([missing if value is None else float(value) for value in values or (None,) * dims])
