"""Evaluation protocol: everything that changes a success rate, apart from the suite and the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.rollout.rollout import RolloutSettings
from cogvla.envs.suite import Suite, suite_names, unknown_suite

MEASURED = "measured"
"""Value of `latency`: measure it."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """Rules for the evaluation of a suite. `configs/protocol/*.yaml` holds the named protocols.

    Attributes:
        name: name of the protocol in reports.
        episodes_per_task: number of episodes per task, each with its own initial state.
        first_initial_state: index of the first initial state of each task; the following episodes use the next ones.
        execute_steps: number of actions of each chunk to execute; None: the whole chunk.
        temporal_ensemble: decay m of the temporal ensemble; None: open loop.
        latency: time in ms from an observation to its chunk, during which the robot moves on, rounded up to control
            steps; or "measured": that of this policy on this machine. 0: the simulation waits for the policy.
        overlap: with a latency, what happens in control steps that two chunks cover: "replace" or "real_time".
        committed: with a latency, tell a policy that reads them which actions will be executed before its chunk is
            there (real-time chunking in the policy).
        waiting_steps: control steps without motion after each reset; they are not counted.
        max_steps: maximum number of control steps per episode, or suite -> number; None: the suite's own limit.
            A longer episode is a failure. Suites without a number use their own limit.
        seed: random seed of every reset, and of the choice of swapped instructions.
    """

    name: str
    episodes_per_task: int = 50
    first_initial_state: int = 0
    execute_steps: int | None = None
    temporal_ensemble: float | None = None
    latency: float | str = 0
    overlap: str = "replace"
    committed: bool = True
    waiting_steps: int = 0
    max_steps: int | Mapping[str, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("episodes_per_task", 1), ("first_initial_state", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"protocol {self.name!r}: {name} must be a whole number of at least {least}, got {value!r}"
                )
        if isinstance(self.temporal_ensemble, bool) or not isinstance(self.committed, bool):
            raise ValueError(
                f"protocol {self.name!r}: temporal_ensemble must be a number or null, and committed true or false, got "
                f"{self.temporal_ensemble!r} and {self.committed!r}"
            )
        if isinstance(self.max_steps, Mapping):
            for suite in self.max_steps:
                if suite not in suite_names():
                    raise unknown_suite(suite)
        if isinstance(self.latency, bool) or (isinstance(self.latency, str) and self.latency != MEASURED):
            raise ValueError(f"latency must be a number of milliseconds or {MEASURED!r}, got {self.latency!r}")
        for limit in self.max_steps.values() if isinstance(self.max_steps, Mapping) else [self.max_steps]:
            self._rollout_settings(limit)
        if self.overlap != "replace" and not self.latency:
            raise ValueError(f"overlap={self.overlap} is for chunks that arrive late: give latency=MS, too")

    def for_suite(self, suite: Suite) -> EvaluationProtocol:
        """Return this protocol with the step limit for one suite."""
        limit = self.max_steps.get(suite.name) if isinstance(self.max_steps, Mapping) else self.max_steps
        return replace(self, max_steps=limit or suite.max_steps)

    def rollout_settings(self) -> RolloutSettings:
        """Return the settings for the rollout loop. Call `for_suite` first."""
        assert not isinstance(self.max_steps, Mapping), "call `for_suite` first: this protocol has limits by suite"
        return self._rollout_settings(self.max_steps)

    def _rollout_settings(self, max_steps: int | None) -> RolloutSettings:
        return RolloutSettings(
            execute_steps=self.execute_steps,
            temporal_ensemble=self.temporal_ensemble,
            latency_ms=0.0 if self.latency == MEASURED else float(self.latency),
            overlap=self.overlap,
            committed=self.committed,
            max_steps=max_steps,
            waiting_steps=self.waiting_steps,
        )

    def episodes(
        self,
        suite: Suite,
        tasks: Sequence[int] | None = None,
        asked: Literal["swap"] | None = None,
        shard: tuple[int, int] = (1, 1),
    ) -> list[EpisodeSpec]:
        """Return the episodes to play. Tasks take turns, so that every task is played early.

        Args:
            suite: the suite.
            tasks: indices of the tasks; None: all.
            asked: see `EpisodeSpec`.
            shard: (i, n) selects every n-th episode from the i-th on, i in 1..n, to share them among n machines.

        Raises:
            ValueError: a task, an initial state or the shard does not exist, or a shard would measure its own latency.
        """
        chosen = range(len(suite.tasks)) if tasks is None else suite.chosen_tasks(tasks)
        last = self.first_initial_state + self.episodes_per_task
        if last > suite.initial_states:
            raise ValueError(
                f"suite {suite.name!r} has {suite.initial_states} initial states per task for evaluation; "
                f"protocol {self.name!r} asks for {self.first_initial_state} to {last - 1}: lower episodes_per_task"
            )
        states = range(self.first_initial_state, last)
        specs = [EpisodeSpec(task, state, asked, self.seed) for state in states for task in chosen]
        part, parts = shard
        if not 1 <= part <= parts <= len(specs):
            raise ValueError(f"shard i/n needs i from 1 to n, and n up to {len(specs)} episodes, got {part}/{parts}")
        if parts > 1 and self.latency == MEASURED:
            raise ValueError(
                f"latency={MEASURED} with shard={part}/{parts}: each shard would measure another one, and they could "
                f"not be merged; give all of them latency=MS, as latency={MEASURED} without shard prints it first"
            )
        return specs[part - 1 :: parts]


def load_protocol(name: str, **changes: Any) -> EvaluationProtocol:
    """Return the protocol of `configs/protocol/NAME.yaml` with some values changed; ValueError lists what exists."""
    return build(EvaluationProtocol, load("protocol", name) | changes, "protocol")


def protocol_for(suite: Suite, name: str | None, changes: Mapping[str, Any]) -> EvaluationProtocol:
    """Return the protocol of that name, or the suite's own, with some values changed.

    Args:
        suite: what is evaluated.
        name: a file of `configs/protocol`; None: the suite's own.
        changes: values by key; with a `name` among them they are the whole protocol.

    Raises:
        ValueError: there is no such protocol or key; the message lists those that exist.
    """
    if "name" in changes:
        return build(EvaluationProtocol, changes, "protocol")
    return load_protocol(name or suite.protocol, **changes)
