"""What a robot may be told to do (`SafetyLimits`) and how its control loop runs (`LoopSettings`): configs/robot/*.yaml.

Shape legend: A action dimension, D arm dimensions: the action without its gripper, in order; S state dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cogvla.policy.interface import Embodiment

KINDS = ("delta", "absolute")
LIMITS = ("position", "step", "velocity", "acceleration")
OVERLAPS = ("replace", "ensemble", "real_time")
ASK = ("ahead", "after")
PerDimension = tuple[float | None, ...] | None


@dataclass(frozen=True)
class SafetyLimits:
    """Every command stays inside of these, whatever the policy says. One number per arm dimension, in physical units.

    None, for one dimension or for all, is no limit. A wanted motion past a limit is clamped to it; where the limit is
    named in `reject`, it latches a fault instead. Braking into a hold is always clamped.

    Attributes:
        kind: "delta", actions are displacements per control tick; "absolute", actions are positions (joint targets).
        scale: [D] physical units of action 1.0; None: actions are in physical units. Only for deltas.
        state_index: [D] which entry of the state measures this dimension's position; None: none does.
        position_low, position_high: [D] workspace (deltas) or joint limits (absolute).
        step: [D] largest displacement per control tick.
        velocity: [D] per second, over one tick.
        acceleration: [D] per second squared, over two ticks.
        lead: [D] how far the commanded position may run ahead of the measured one. For deltas it is the "leash" of the
            robot's own controller (None: the controller starts from the measured position); for absolute targets a
            larger distance is a fault: the arm does not follow.
        gripper_step: largest change of the gripper's value per tick; its range is the embodiment's open to close.
        reject: which of "position", "step", "velocity", "acceleration" latch a fault.
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
    gripper_step: float | None = None
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
        if self.gripper_step is not None and not self.gripper_step > 0:
            raise ValueError(f"limits: gripper_step must be positive, got {self.gripper_step}")
        for low, high in zip(self.position_low or (), self.position_high or (), strict=False):
            if low is not None and high is not None and not low < high:
                raise ValueError(f"limits: position_low {low} must be below position_high {high}")
        if self.kind == "absolute" and self.scale is not None:
            raise ValueError("limits: absolute targets have no scale; remove it")

    def check(self, embodiment: Embodiment) -> None:
        """ValueError unless the limits have the sizes of this robot."""
        dims = embodiment.action_dim - (embodiment.gripper_index is not None)
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
                    "(the action without its gripper)"
                )
        index_D = self.state_index or (None,) * dims
        outside = [i for i in index_D if i is not None and not 0 <= i < embodiment.state_dim]
        if outside:
            raise ValueError(f"limits: state_index {outside} is outside the {embodiment.state_dim} state dimensions")
        bounded = [
            d
            for d in range(dims)
            if any(values is not None and values[d] is not None for values in (self.position_low, self.position_high))
        ]
        needed = range(dims) if self.kind == "absolute" else bounded
        unmeasured = [d for d in needed if index_D[d] is None]
        if unmeasured:
            raise ValueError(
                f"limits: arm dimensions {unmeasured} need a state_index, because their position must be known"
            )


@dataclass(frozen=True)
class LoopSettings:
    """When observations count, when chunks are asked for and blended, when the loop gives up. Times in seconds.

    Attributes:
        image_age_s, state_age_s: an older camera image or joint state is stale: the loop holds and does not ask.
        sync_tolerance_s: largest distance of the stamps of one observation.
        future_tolerance_s: how far a stamp may lie ahead of the loop's clock.
        frozen_after_s: a camera that shows exactly the same image for so long, while the state changed by more than
            `frozen_motion`, is frozen and counts as stale; None: not checked.
        frozen_motion: change of any state entry that the image must show.
        overlap: "replace", "ensemble" or "real_time"; see `cogvla.real_robot.control.chunk_queue`.
        ensemble_m: decay of the ensemble's weights exp(-m * i), i = 0 the oldest.
        ask: "ahead", while the last chunk is executed, so that the arm never pauses; "after", once `execute_steps` of
            it have been, with the arm at rest: for policies whose chunks are good at their beginning only.
        execute_steps: ahead: also ask when so many ticks have passed since the last chunk's observation (None: only
            when the queue runs low); after: so many actions of a chunk are executed (None: all).
        latency_s: assumed 95th percentile of request to answer until enough was measured.
        margin_ticks: actions left when the answer arrives at that percentile.
        deadline_s: a request without an answer for so long has failed.
        retry_s: pause after a failed request.
        hold_limit_s: a hold in motion that lasts longer stops the loop with a fault.
        clock_gap_s: a gap between two ticks, or a step back of the clock, from which on everything known is too old.
    """

    image_age_s: float = 0.2
    state_age_s: float = 0.1
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
        for name in ("image_age_s", "state_age_s", "latency_s", "deadline_s", "hold_limit_s", "clock_gap_s"):
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
        if not math.isfinite(self.ensemble_m):
            raise ValueError(f"loop: ensemble_m must be finite, got {self.ensemble_m}")


@dataclass(frozen=True)
class RobotConfig:
    """One file of configs/robot.

    Attributes:
        name: of the robot, for reports.
        limits: see `SafetyLimits`.
        loop: see `LoopSettings`.
    """

    name: str
    limits: SafetyLimits
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", _built(SafetyLimits, self.limits))
        object.__setattr__(self, "loop", _built(LoopSettings, self.loop))


def _built(kind: type, values: Any) -> Any:
    """The dataclass itself, or one of the mapping that a YAML file holds."""
    if not isinstance(values, Mapping):
        return values
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__} has no {unknown}; it has {', '.join(known)}")
    return kind(**values)
