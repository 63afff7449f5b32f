"""The interface of policies: the contract between a policy and environments, evaluation, robots and servers.

Shape legend: B batch, K action-chunk length, A action dimension, S state dimension, H image height, W image width.

This file imports only numpy, so that a robot process can use the contract without torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

NORMALISATIONS = ("q99", "min_max", "mean_std", "identity")


class InstructionError(ValueError):
    """A policy cannot read an instruction. The message says why, in one line that may be shown to whoever sent it."""


@dataclass(frozen=True)
class Camera:
    """One RGB camera: its key in an `Observation`, and the image size in pixels that the policy was trained on."""

    name: str
    height: int
    width: int

    def __post_init__(self) -> None:
        if not self.name or self.height < 1 or self.width < 1:
            raise ValueError(f"camera needs a name and a positive size in pixels, got {self!r}")


@dataclass(frozen=True)
class Embodiment:
    """The robot from the policy's point of view. These numbers are defined only here; all other code reads them.

    Attributes:
        name: name of the robot in reports.
        cameras: cameras in the policy's order, each with name, height and width (pixels).
        state_dim: size S of the proprioceptive state.
        action_dim: size A of one action.
        chunk: number K of actions that one forward pass predicts.
        control_hz: control rate in Hz, at which actions are executed.
        state_normalisation: normalisation of the state, one of `NORMALISATIONS`.
        action_normalisation: normalisation of the action, one of `NORMALISATIONS`.
        action_normalise_mask: one flag per action dimension; False: not normalised (the gripper).
        gripper_index: action dimension of the gripper, or a list of them for several; None: no gripper.
        gripper_open: value of these dimensions for an open gripper, in the environment's units.
        gripper_close: value of these dimensions for a closed gripper, in the environment's units.
    """

    name: str
    cameras: tuple[Camera, ...]
    state_dim: int
    action_dim: int
    chunk: int
    control_hz: float
    state_normalisation: str = "q99"
    action_normalisation: str = "q99"
    action_normalise_mask: tuple[bool, ...] = ()
    gripper_index: int | tuple[int, ...] | None = None
    gripper_open: float = -1.0
    gripper_close: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(c if isinstance(c, Camera) else Camera(**c) for c in self.cameras))
        object.__setattr__(
            self, "action_normalise_mask", tuple(self.action_normalise_mask) or (True,) * self.action_dim
        )
        names = [camera.name for camera in self.cameras]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"embodiment {self.name!r} needs at least one camera, each with its own name; got {names}")
        if min(self.state_dim, self.action_dim, self.chunk) < 1 or not 0 < self.control_hz < np.inf:
            raise ValueError(f"embodiment {self.name!r}: state_dim, action_dim, chunk and control_hz must be positive")
        if not np.isfinite([self.gripper_open, self.gripper_close]).all():
            raise ValueError(
                f"embodiment {self.name!r}: gripper_open and gripper_close must be finite numbers, "
                f"got {self.gripper_open} and {self.gripper_close}"
            )
        if len(self.action_normalise_mask) != self.action_dim:
            raise ValueError(
                f"embodiment {self.name!r}: action_normalise_mask has {len(self.action_normalise_mask)} entries, "
                f"action_dim is {self.action_dim}"
            )
        for kind in (self.state_normalisation, self.action_normalisation):
            if kind not in NORMALISATIONS:
                raise ValueError(f"unknown normalisation {kind!r}; one of {', '.join(NORMALISATIONS)}")
        for index in self.grippers:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < self.action_dim:
                raise ValueError(f"gripper_index {index!r} is outside the {self.action_dim} action dimensions")
        if len(set(self.grippers)) != len(self.grippers):
            raise ValueError(f"embodiment {self.name!r}: gripper_index names a dimension twice: {self.gripper_index}")
        if self.grippers and self.gripper_open == self.gripper_close:
            raise ValueError(f"embodiment {self.name!r}: gripper_open and gripper_close are both {self.gripper_open}")
        one = self.grippers[0] if len(self.grippers) == 1 else tuple(sorted(self.grippers)) or None
        object.__setattr__(self, "gripper_index", one)

    @property
    def grippers(self) -> tuple[int, ...]:
        """Action dimensions of all grippers, in order."""
        if self.gripper_index is None:
            return ()
        return tuple(self.gripper_index) if isinstance(self.gripper_index, list | tuple) else (self.gripper_index,)

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    def fake_observation(self, batch: int = 1, seed: int = 0) -> Observation:
        """Return a random observation of the right shapes, for tests, warm-up and benchmarks."""
        rng = np.random.default_rng(seed)
        return Observation(
            images={c.name: rng.integers(0, 256, (batch, c.height, c.width, 3), dtype=np.uint8) for c in self.cameras},
            state=rng.standard_normal((batch, self.state_dim)).astype(np.float32),
            instruction=["pick up the red cube"] * batch,
        )


@dataclass(frozen=True, eq=False)
class Committed:
    """Actions that the robot will execute from an observation on, until the new chunk is there.

    Attributes:
        actions: [N,A] in the environment's units, N may be 0; action 0 is that of the observation's tick.
        delay: number of the first of them that will certainly be executed. A policy may replace the others.
    """

    actions: np.ndarray
    delay: int

    def validate(self, embodiment: Embodiment) -> None:
        """Check that a policy of this embodiment can read them; ValueError says in one line why not."""
        if not isinstance(self.actions, np.ndarray) or self.actions.dtype.kind not in "fi":
            raise ValueError(f"committed must be an array of numbers, got {type(self.actions).__name__}")
        if not isinstance(self.delay, int | np.integer) or isinstance(self.delay, bool):
            raise ValueError(f"delay must be a whole number, got {self.delay!r}")
        shape, delay = self.actions.shape, self.delay
        if len(shape) != 2 or shape[1] != embodiment.action_dim:
            raise ValueError(
                f"committed must have shape [N,A={embodiment.action_dim}], one row for each action, got {list(shape)}"
            )
        if not (np.abs(self.actions) <= np.finfo(np.float32).max).all():
            raise ValueError("committed contains NaN or infinite values")
        if delay < 0 or delay > len(self.actions):
            raise ValueError(
                f"delay must be the number of committed actions that are certain, 0 to {len(self.actions)}, got {delay}"
            )
        if delay >= embodiment.chunk:
            raise ValueError(
                f"a delay of {delay} control steps is as long as a chunk of {embodiment.chunk} actions or longer: "
                "all of its actions would be late"
            )


@dataclass(frozen=True)
class Observation:
    """The input of a policy. Images are upright, as a person sees the scene.

    Attributes:
        images: for each camera name, uint8 [B,H,W,3] RGB.
        state: float32 [B,S] in physical units.
        instruction: B strings.
        slots: the robot of each sample, for policies that remember an episode (`Remembering`). None: sample i is
            robot i.
        committed: for each sample the actions that will be executed before the chunk is there (`Committed`), or None;
            None: none at all. For policies that read them (`reads_committed`); others ignore them.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: Sequence[str]
    slots: Sequence[Hashable] | None = None
    committed: Sequence[Committed | None] | None = None

    @property
    def batch_size(self) -> int:
        return len(self.instruction)

    def validate(self, embodiment: Embodiment) -> None:
        """Check that this observation fits the embodiment; images may have any size.

        Raises:
            ValueError: it does not fit; the message says what to do.
        """
        if isinstance(self.instruction, str):
            raise ValueError("instruction must be a list with one string per sample, not a single string")
        batch = self.batch_size
        missing = [name for name in embodiment.camera_names if name not in self.images]
        if missing:
            raise ValueError(
                f"observation has no camera {missing}; it has {sorted(self.images)}. "
                f"Map the robot's cameras to {list(embodiment.camera_names)}."
            )
        for name in embodiment.camera_names:
            image = self.images[name]
            if image.dtype != np.uint8 or image.ndim != 4 or image.shape[0] != batch or image.shape[-1] != 3:
                raise ValueError(
                    f"camera {name!r} must be uint8 [B={batch},H,W,3] RGB, got {image.dtype} {tuple(image.shape)}"
                )
        if self.state.shape != (batch, embodiment.state_dim):
            raise ValueError(
                f"state must have shape [B={batch},S={embodiment.state_dim}], got {tuple(self.state.shape)}"
            )
        if not np.isfinite(self.state).all():
            raise ValueError("state contains NaN or infinite values; check the robot's joint states")
        if self.committed is not None and len(self.committed) != batch:
            raise ValueError(f"committed must have one entry per sample, {batch}, got {len(self.committed)}")
        for committed in self.committed or ():
            if committed is not None:
                committed.validate(embodiment)

    @staticmethod
    def stack(observations: Sequence[Observation]) -> Observation:
        """Concatenate observations along the batch; all must have the same cameras and image sizes."""
        first = observations[0]
        return Observation(
            images={name: np.concatenate([o.images[name] for o in observations]) for name in first.images},
            state=np.concatenate([o.state for o in observations]),
            instruction=[text for o in observations for text in o.instruction],
            slots=None
            if any(o.slots is None for o in observations)
            else [slot for o in observations for slot in o.slots or ()],
            committed=None
            if all(o.committed is None for o in observations)
            else [each for o in observations for each in o.committed or [None] * o.batch_size],
        )

    def row(self, index: int) -> Observation:
        """Return one sample as a batch of size 1."""
        return Observation(
            images={name: image[index : index + 1] for name, image in self.images.items()},
            state=self.state[index : index + 1],
            instruction=[self.instruction[index]],
            slots=None if self.slots is None else [self.slots[index]],
            committed=None if self.committed is None else [self.committed[index]],
        )


@dataclass(frozen=True)
class ActionChunk:
    """The output of a policy.

    Attributes:
        actions: float32 [B,K,A] in the environment's units.
        timing: time of each stage in milliseconds (`preprocess_ms`, `inference_ms`, `postprocess_ms`).
    """

    actions: np.ndarray
    timing: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Policy(Protocol):
    """Interface of all policies: observations in, action chunks out.

    No state between calls, except for caches, and what `Remembering` policies know of an episode.
    """

    @property
    def embodiment(self) -> Embodiment: ...

    def describe(self) -> dict[str, Any]:
        """Return the facts that identify this policy in a report (preset, parameters, checkpoint, step, data set)."""
        ...

    def reset(self) -> None:
        """Clear the caches of an episode, and what is remembered of all robots."""
        ...

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Prepare for batches of this size, so that `act` answers without delay; may take seconds.

        Args:
            batch: number of observations per call.
            instructions: expected instructions, if they are known.
        """
        ...

    def act(self, observation: Observation) -> ActionChunk:
        """Predict actions [B,K,A] for B observations in one batched forward pass."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """A policy that may remember the episode of each robot ("slot"); `Observation.slots` says whose a sample is."""

    def begin(self, slots: Sequence[Hashable]) -> None:
        """Begin an episode of these robots: forget their earlier ones."""
        ...

    def end(self, slots: Sequence[Hashable]) -> None:
        """Forget these robots, which give no more observations."""
        ...


@runtime_checkable
class Watching(Protocol):
    """A policy that watches the episode of each robot while it acts."""

    def noticed(self, slot: Hashable) -> Mapping[str, Any]:
        """Return what was noticed in this robot's episode, as plain values; `alarm` says why it holds, or is None."""
        ...


def reads_committed(policy: Policy) -> bool:
    """Return whether a policy uses `Observation.committed`; policies without `reads_committed` do not."""
    return bool(getattr(policy, "reads_committed", False))


def begin_episode(policy: Policy, slots: Sequence[Hashable]) -> None:
    """Tell a policy that these robots begin an episode; policies that never remember need not know."""
    if isinstance(policy, Remembering):
        policy.begin(slots)


def end_episode(policy: Policy, slots: Sequence[Hashable]) -> None:
    """Tell a policy that these robots are gone; see `begin_episode`."""
    if isinstance(policy, Remembering):
        policy.end(slots)
