"""Settings of configs/robot/*.yaml: safety limits of a robot (`SafetyLimits`) and its control loop (`LoopSettings`).

Shape legend: A action dimension, D arm dimensions (the action without its grippers, in order), G grippers, S state
dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from cogvla.policy.chunk_queue import OVERLAPS
from cogvla.policy.interface import Embodiment

KINDS = ("delta", "absolute")
LIMITS = ("position", "step", "velocity", "acceleration")
ASK = ("ahead", "after")
PerDimension = tuple[float | None, ...] | None


@dataclass(frozen=True)
class SafetyLimits:
    """Safety limits of every command. Each [D] entry has one number per arm dimension, in the robot's units (m, rad).

    None, for one dimension or for all, means no limit. An action past a limit is clamped to it. If `reject` names the
    limit, such an action stops the loop with a fault instead. The braking of a hold is always clamped.

    Attributes:
        kind: "delta": actions are displacements per control tick; "absolute": actions are positions (joint targets).
        scale: [D] physical displacement of action value 1.0; None: actions are in physical units. For deltas only.
        state_index: [D] index of the state entry with the dimension's measured position; None: not measured.
        position_low: [D] lower workspace limit (deltas) or joint limit (absolute).
        position_high: [D] upper workspace limit (deltas) or joint limit (absolute).
        step: [D] maximum displacement per control tick.
        velocity: [D] maximum speed per second, measured over one tick.
        acceleration: [D] maximum acceleration per second squared, measured over two ticks.
        lead: [D] maximum distance between commanded and measured position.
            For deltas it describes the robot's own controller, which limits its target in this way (None: its target
            starts from the measured position). For absolute targets a larger distance is a fault: the arm does
            not follow.
        outside: distance by which an arm at its mechanical stop may measure outside its joint limits at the start;
            None: 0.01, for m and rad.
        gripper_step: maximum change of each gripper's value per tick; its range is the embodiment's open to close.
        gripper_state: [G] index of the state entry that measures each gripper, in the units of its command, from which
            `gripper_step` starts; None: not measured, and the first command is not limited.
        reject: limits that cause a fault instead of clamping: "position", "step", "velocity", "acceleration".
    """

    kind: str
    scale: tuple[float, ...] | None = None
    state_index: tuple[int | None, ...] | None = None
    position_low: PerDimension = None
    position_high: PerDimension = None
    step: PerDimension = None
    velocity: PerDimension = None
    acceleration: PerDimension = None
    lead: PerDimension = None
    outside: float | None = None
    gripper_step: float | None = None
    gripper_state: tuple[int | None, ...] | None = None
    reject: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
        if self.kind not in KINDS:
            raise ValueError(f"limits: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        unknown = set(self.reject) - set(LIMITS)
        if unknown:
            raise ValueError(f"limits: reject names {sorted(unknown)}; it may name {', '.join(LIMITS)}")
        for name in ("scale", "step", "velocity", "acceleration", "lead"):
            for value in getattr(self, name) or ():
                if not (value is None or (math.isfinite(value) and value > 0)):
                    raise ValueError(f"limits: {name} must be positive numbers (null: no limit), got {value}")
        for name in ("position_low", "position_high"):
            for value in getattr(self, name) or ():
                if not (value is None or math.isfinite(value)):
                    raise ValueError(f"limits: {name} must be finite numbers (null: no limit), got {value}")
        for name in self.reject:
            values = (self.position_low, self.position_high) if name == "position" else (getattr(self, name),)
            if all(value is None for of_all in values for value in of_all or ()):
                raise ValueError(f"limits: reject names {name}, which has no limit: give one, or no motion is past it")
        if self.outside is not None and not self.outside >= 0:
            raise ValueError(f"limits: outside must not be negative, got {self.outside}")
        if self.gripper_step is not None and not self.gripper_step > 0:
            raise ValueError(f"limits: gripper_step must be positive, got {self.gripper_step}")
        for low, high in zip(self.position_low or (), self.position_high or (), strict=False):
            if low is not None and high is not None and not low < high:
                raise ValueError(f"limits: position_low {low} must be below position_high {high}")
        if self.kind == "absolute" and self.scale is not None:
            raise ValueError("limits: absolute targets have no scale; remove it")

    def check(self, embodiment: Embodiment) -> None:
        """Raise ValueError if the limits do not fit the embodiment's sizes, or lack a `state_index` that they need."""
        dims = embodiment.action_dim - len(embodiment.grippers)
        for name in (
            "scale",
            "state_index",
            "position_low",
            "position_high",
            "step",
            "velocity",
            "acceleration",
            "lead",
        ):
            values = getattr(self, name)
            if values is not None and len(values) != dims:
                raise ValueError(
                    f"limits: {name} has {len(values)} entries; {embodiment.name!r} has {dims} arm dimensions "
                    "(the action without its grippers)"
                )
        if self.gripper_state is not None and len(self.gripper_state) != len(embodiment.grippers):
            raise ValueError(
                f"limits: gripper_state has {len(self.gripper_state)} entries; {embodiment.name!r} has "
                f"{len(embodiment.grippers)} grippers"
            )
        index_D = self.state_index or (None,) * dims
        for name, indices in (("state_index", index_D), ("gripper_state", self.gripper_state or ())):
            if outside := [i for i in indices if i is not None and not 0 <= i < embodiment.state_dim]:
                raise ValueError(f"limits: {name} {outside} is outside the {embodiment.state_dim} state dimensions")
        bounded = [
            d
            for d in range(dims)
            if any(
                values is not None and values[d] is not None
                for values in (self.position_low, self.position_high, self.lead)
            )
        ]
        needed = range(dims) if self.kind == "absolute" else bounded
        unmeasured = [d for d in needed if index_D[d] is None]
        if unmeasured:
            raise ValueError(
                f"limits: arm dimensions {unmeasured} need a state_index, because their position must be known"
            )

    def check_names(self, embodiment: Embodiment, state: Sequence[str], action: Sequence[str]) -> None:
        """Raise ValueError if `state_index` or `gripper_state` measures a joint by another joint.

        The first command starts from the measured position, so it would jump. For deltas only grippers do so.

        Args:
            embodiment: robot, for the grippers.
            state: [S] names of the state's entries.
            action: [A] names of the action's entries, or none if they are unknown.
        """
        arm = [name for i, name in enumerate(action) if i not in embodiment.grippers]
        grippers = [name for i, name in enumerate(action) if i in embodiment.grippers]
        by_joint = self.state_index if self.kind == "absolute" else None
        for key, names, indices in (("state_index", arm, by_joint), ("gripper_state", grippers, self.gripper_state)):
            for name, index in zip(names, indices or (), strict=False):
                if index is not None and name in state and 0 <= index < len(state) and state[index] != name:
                    raise ValueError(
                        f"limits: {key} of {name} is {index}, the position of {state[index]}: "
                        f"give {list(state).index(name)}"
                    )


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the control loop: age of observations, requests to the policy, blending, time limits.

    Times are in seconds.

    Attributes:
        image_age_s: maximum age of a camera image; with an older image the loop holds and does not call the policy.
        state_age_s: maximum age of the joint state; with an older state the loop holds and does not call the policy.
        teleop_age_s: maximum age of the teleoperator's action; with an older one the loop holds while it drives.
        sync_tolerance_s: maximum difference between the stamps of one observation.
        future_tolerance_s: maximum time by which a stamp may lie ahead of the loop's clock.
        frozen_after_s: time with identical images after which a camera counts as frozen (stale); None: no check.
            Only identical images during a change of the state by more than `frozen_motion` count.
        frozen_motion: maximum change of any state entry during which a camera may send the same image.
        overlap: handling of overlapping chunks: "replace", "ensemble" or "real_time".
            See `cogvla.policy.chunk_queue`.
        ensemble_m: decay m of the ensemble's weights exp(-m * i), i = 0 for the oldest chunk.
        ask: when to request the next chunk: "ahead" (during the last chunk) or "after" (with the arm at rest).
            With "ahead" the arm never pauses. "after" waits until `execute_steps` actions were executed; it suits
            policies that predict only the first actions of a chunk well.
        execute_steps: "ahead": ticks between observation and next request at the latest; "after": actions to execute.
            None means: with "ahead", request only when the queue runs low; with "after", execute all actions.
        latency_s: assumed 95th percentile of the time from request to answer, until enough requests were measured.
        margin_ticks: number of actions that should be left when an answer arrives at that percentile.
        deadline_s: time after which a request without an answer has failed.
        retry_s: pause after a failed request.
        hold_limit_s: maximum hold during motion; a longer one stops the loop with a fault.
        clock_gap_s: gap between two ticks, or step back of the clock, after which the loop discards all samples;
            longer than a control period.
    """

    image_age_s: float = 0.2
    state_age_s: float = 0.1
    teleop_age_s: float = 0.15
    sync_tolerance_s: float = 0.03
    future_tolerance_s: float = 0.01
    frozen_after_s: float | None = None
    frozen_motion: float = 0.02
    overlap: str = "replace"
    ensemble_m: float = 0.01
    ask: str = "ahead"
    execute_steps: int | None = None
    latency_s: float = 0.1
    margin_ticks: int = 1
    deadline_s: float = 1.0
    retry_s: float = 0.1
    hold_limit_s: float = 2.0
    clock_gap_s: float = 0.5

    def __post_init__(self) -> None:
        positive = (
            "image_age_s",
            "state_age_s",
            "teleop_age_s",
            "latency_s",
            "deadline_s",
            "hold_limit_s",
            "clock_gap_s",
        )
        for name in positive:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"loop: {name} must be a positive number of seconds, got {value}")
        for name in ("sync_tolerance_s", "future_tolerance_s", "retry_s", "margin_ticks", "frozen_motion"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loop: {name} must not be negative, got {getattr(self, name)}")
        for name in ("frozen_after_s", "execute_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"loop: {name} must be positive or null, got {value}")
        if self.overlap not in OVERLAPS:
            raise ValueError(f"loop: overlap must be one of {', '.join(OVERLAPS)}, got {self.overlap!r}")
        if self.ask not in ASK:
            raise ValueError(f"loop: ask must be one of {', '.join(ASK)}, got {self.ask!r}")
        if self.ask == "after" and self.overlap != "replace":
            raise ValueError(f"loop: overlap={self.overlap} needs ask=ahead; with ask=after no chunks overlap")
        if not math.isfinite(self.ensemble_m):
            raise ValueError(f"loop: ensemble_m must be finite, got {self.ensemble_m}")


@dataclass(frozen=True)
class RobotConfig:
    """Settings of one robot, from a file of configs/robot.

    Attributes:
        name: name of the robot in reports.
        limits: safety limits of every command.
        loop: settings of the control loop.
    """

    name: str
    limits: SafetyLimits
    loop: LoopSettings = field(default_factory=LoopSettings)
