"""What an episode is asked to be, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Asked = int | Literal["swap"] | None


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to play.

    Attributes:
        task: the task whose scene is set up.
        initial_state: which of the task's fixed initial states.
        asked: the task whose instruction is given instead, which must be possible in that scene; "swap" draws one of
            the scene's alternatives, always the same one for the same task, initial state and seed.
        seed: of whatever is random in the episode; given to `env.reset`.
    """

    task: int
    initial_state: int
    asked: Asked = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task < 0 or self.initial_state < 0:
            raise ValueError(f"task and initial state are counted from 0, got {self.task} and {self.initial_state}")
        if not (self.asked is None or self.asked == "swap" or (isinstance(self.asked, int) and self.asked >= 0)):
            raise ValueError(f"asked must be None, a task's index or 'swap', got {self.asked!r}")


@dataclass(frozen=True)
class EpisodeResult:
    """One episode that was played, or that could not be (`error`).

    Attributes:
        task, initial_state, seed: as in the spec.
        asked: index of the task that was asked for instead of `task`, or None.
        instruction: what the policy was told.
        success: the task that was asked for (`task`, when `asked` is None) succeeded.
        scene_task_success: whether `task` itself succeeded although another one was asked for; None without `asked`.
        steps: control steps executed, without the waiting steps.
        reward: sum of the environment's rewards.
        error: traceback or reason why the episode could not be played to its end; such an episode is no failure.
        attempts: how often it was started (2 when it was repeated after an error).
        reset_s, environment_s, wall_s: seconds in `reset`, in `step` (with rendering), and from start to end.
        inference_ms: wall time of `policy.act` for each chunk of this episode.
        loop_ms: for each chunk, from the observation ready in the environment's process to the first action there:
            transfer, waiting for the batch, preprocessing, inference.
        batch: for each chunk, how many environments shared the forward pass.
        video: path of the mp4, or None.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpisodeResult:
        """The inverse of `to_dict`, also after a way through JSON."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in ("inference_ms", "loop_ms", "batch"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)
