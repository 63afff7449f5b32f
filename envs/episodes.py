"""Specification and result of one episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from cogvla.envs.perturbation.perturbation import Perturbation

Asked = int | Literal["swap"] | None


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to play.

    Attributes:
        task: index of the task whose scene is set up.
        initial_state: index of one of the task's fixed initial states.
        asked: index of another task, possible in that scene, whose instruction the policy gets instead; "swap" draws
            one of the scene's alternatives, always the same one for the same task, initial state and seed.
        seed: seed of everything random in the episode; given to `env.reset`.
        perturbation: how the episode differs from training; None: not at all.
    """

    task: int
    initial_state: int
    asked: Asked = None
    seed: int = 0
    perturbation: Perturbation | None = None

    def __post_init__(self) -> None:
        if self.task < 0 or self.initial_state < 0:
            raise ValueError(f"task and initial_state must be at least 0, got {self.task} and {self.initial_state}")
        if not (self.asked is None or self.asked == "swap" or (isinstance(self.asked, int) and self.asked >= 0)):
            raise ValueError(f"asked must be None, the index of a task, or 'swap', got {self.asked!r}")


@dataclass(frozen=True)
class EpisodeResult:
    """Result of one episode, or the error that stopped it.

    Attributes:
        task, initial_state, seed: as in `EpisodeSpec`.
        asked: index of the task whose instruction the policy got instead of that of `task`, or None.
        instruction: instruction that the policy got.
        success: True if the task of the instruction succeeded.
        scene_task_success: True if `task` succeeded although the instruction was that of `asked`; None without `asked`.
        steps: number of executed control steps, without the waiting steps.
        reward: sum of the environment's rewards.
        error: traceback or reason if the episode did not reach its end; such an episode does not count as a failure.
        attempts: number of starts; 2 if it was repeated after an error.
        reset_s: seconds in `reset`.
        environment_s: seconds in `step`, with rendering.
        wall_s: seconds from start to end.
        inference_ms: wall time of `policy.act` for each chunk.
        loop_ms: time for each chunk from the finished observation to the first action in the environment's process:
            transfer, waiting for the batch, preprocessing, inference.
        batch: number of environments that shared the forward pass, for each chunk.
        video: path of the mp4, or None.
        seam: mean change of the action, without grippers, where a new chunk begins to decide, as a multiple of its mean
            change elsewhere; None: there is no such place, or the actions do not change.
        perturbation: what was drawn for the perturbation of this episode, as plain values; None without one.
        noticed: what a policy that watches has noticed (`policy.interface.Watching`), as plain values; None: it does
            not watch.
    """

    task: int
    initial_state: int
    seed: int
    asked: int | None = None
    instruction: str = ""
    success: bool = False
    scene_task_success: bool | None = None
    steps: int = 0
    reward: float = 0.0
    error: str | None = None
    attempts: int = 1
    reset_s: float = 0.0
    environment_s: float = 0.0
    wall_s: float = 0.0
    inference_ms: tuple[float, ...] = ()
    loop_ms: tuple[float, ...] = ()
    batch: tuple[int, ...] = ()
    video: str | None = None
    seam: float | None = None
    perturbation: Mapping[str, Any] | None = None
    noticed: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpisodeResult:
        """Build a result from the values of `to_dict`, also after a round trip through JSON."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in ("inference_ms", "loop_ms", "batch"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)
