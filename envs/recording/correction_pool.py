"""The policy's side of corrections: it answers the players of `corrections`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cogvla.envs.contract import Advisor, required
from cogvla.envs.recording.corrections import CorrectingPlayers
from cogvla.envs.recording.demonstrator import DemonstratorSettings
from cogvla.envs.rollout.rollout import RolloutSettings, check_fit, rollout, warn_of_unknown_words
from cogvla.envs.suite import FIRST_TRAINING_STATE, Suite
from cogvla.policy.interface import Embodiment, Policy

USUAL_PRECISION = "float32"
"""Precision of policies that recordings leave out."""


@dataclass(frozen=True)
class Corrected:
    """A policy to be corrected.

    Attributes:
        policy: the policy.
        identity: what identifies its weights, as `open_policy` returns it; recordings with other weights differ.
        patience: control steps without progress after which the expert takes over, until the next subgoal.
        execute_steps: number of actions to execute of each chunk; None: the whole chunk.
    """

    policy: Policy
    identity: Mapping[str, str] = field(default_factory=dict)
    patience: int = 30
    execute_steps: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.patience, self.execute_steps)

    def request(self) -> dict[str, Any]:
        """Return what decides the recording, as plain values."""
        told = self.policy.describe()
        precision = told.get("dtype", USUAL_PRECISION)
        return {
            "checkpoint": told.get("checkpoint"),
            "step": told.get("step"),
            **self.identity,
            **({} if precision == USUAL_PRECISION else {"dtype": precision}),
            "execute_steps": self.execute_steps or self.policy.embodiment.chunk,
            "patience": self.patience,
            "helps_until": "next subgoal",
        }


def check_steps(patience: Any, execute_steps: Any = None) -> None:
    """Raise a ValueError if these numbers of control steps are out of their range, see `Corrected`."""
    if type(patience) is not int or patience < 1:
        raise ValueError(f"patience must be a whole number of at least 1 control step, got {patience!r}")
    RolloutSettings(execute_steps=execute_steps)


def check_robot(robot: Embodiment, suite: Suite, image_size: int, execute_steps: int | None = None) -> None:
    """Raise a ValueError if a policy of this robot does not fit a recording, see `record` and `Corrected`."""
    sizes = {(camera.height, camera.width) for camera in robot.cameras}
    if sizes != {(image_size, image_size)}:
        seen = ", ".join(f"{camera.name} {camera.height} x {camera.width}" for camera in robot.cameras)
        raise ValueError(
            f"the policy sees {seen} pixels, and the recording has {image_size} x {image_size}: give the policy's "
            "image_size, which has to be square"
        )
    check_fit(robot, suite, same_rate=True)
    RolloutSettings(execute_steps=execute_steps).chunker(robot.chunk, robot.control_hz)


def check_advice(suite: Suite) -> None:
    """Check, before something slow, that the expert of a suite can correct a policy.

    Raises:
        ValueError: the suite has no expert.
        ContractError: its expert gives no advice.
    """
    if suite.expert is None:
        raise ValueError(f"{suite.name} has no scripted expert that could correct a policy")
    env = suite.make(render=False)
    try:
        env.reset(options={"task": 0, "initial_state": FIRST_TRAINING_STATE})
        expert = suite.expert(env, np.random.default_rng(0), noise=0.0)
        required(expert, Advisor, f"suite {suite.name}: recording corrections of a policy")
    finally:
        env.close()


class CorrectionPool:
    """Records the missing episodes in order, as `DemonstrationPool` does.

    The policy gets one observation at a time: in a batch, others would change the last digits of its answer, and with
    them the episode, which would depend on the number of workers and on chance.
    """

    def __init__(
        self,
        corrected: Corrected,
        suite: Suite,
        settings: DemonstratorSettings,
        paths: Sequence[Path],
        missing: list[int],
        workers: int,
    ) -> None:
        self.pending = set(missing)
        self.attempts = self.successes = 0
        players = CorrectingPlayers(settings, tuple(paths), corrected.patience)
        specs = {slot: players.spec(slot) for slot in missing}
        self._slots = {(spec.task, spec.initial_state): slot for slot, spec in specs.items()}
        warn_of_unknown_words(corrected.policy, suite, sorted({spec.task for spec in specs.values()}))
        corrected.policy.warm_up(1, settings.instructions)
        self._results = rollout(
            corrected.policy,
            suite,
            list(specs.values()),
            workers=workers,
            settings=RolloutSettings(execute_steps=corrected.execute_steps, same_rate=True, largest_batch=1),
            player=players,
        )

    def __enter__(self) -> CorrectionPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._results.close()  # type: ignore[attr-defined]

    def ready(self) -> bool:
        """Return False: `next` may wait."""
        return False

    def next(self) -> None:
        """Wait until one more episode is saved."""
        result = next(self._results)
        if result.error is not None:
            text = f"no episode of task {result.task} could be recorded: {result.error}"
            if "\n" in result.error.strip():  # a traceback: a fault of the environment, the expert or the policy's code
                raise RuntimeError(text)
            raise ValueError(f"{text}; what is recorded is kept, and the same command goes on")
        self.attempts += 1
        self.successes += result.success
        self.pending.remove(self._slots[result.task, result.initial_state])
