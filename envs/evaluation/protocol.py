"""An evaluation protocol: everything that decides what a success rate means, apart from the suite and the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

from omegaconf import OmegaConf

from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.rollout.rollout import RolloutSettings
from cogvla.envs.suite import Suite


@dataclass(frozen=True)
class EvaluationProtocol:
    """How a suite is evaluated. The named ones are `configs/protocol/*.yaml`.

    Attributes:
        name: for the report.
        episodes_per_task: initial states `first_initial_state` and the following ones.
        first_initial_state: index of the first initial state of each task.
        execute_steps: actions executed per chunk; None: the whole chunk.
        temporal_ensemble: decay m of the temporal ensemble; None: open loop.
        waiting_steps: steps without motion after each reset, not counted as control steps.
        max_steps: control steps before an episode is a failure: a number, or one for each suite by its name; None,
            and for suites without a number: the suite's own limit.
        seed: given to every reset, and to the draw of swapped instructions.
    """

    name: str
    episodes_per_task: int = 50
    first_initial_state: int = 0
    execute_steps: int | None = None
    temporal_ensemble: float | None = None
    waiting_steps: int = 0
    max_steps: int | Mapping[str, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.episodes_per_task < 1 or self.first_initial_state < 0:
            raise ValueError(
                f"protocol {self.name!r} needs at least one episode per task and initial states from 0, got "
                f"episodes_per_task={self.episodes_per_task}, first_initial_state={self.first_initial_state}"
            )
        for limit in self.max_steps.values() if isinstance(self.max_steps, Mapping) else [self.max_steps]:
            self._rollout_settings(limit)

    def for_suite(self, suite: Suite) -> EvaluationProtocol:
        """This protocol with the number of steps of that suite."""
        limit = self.max_steps.get(suite.name) if isinstance(self.max_steps, Mapping) else self.max_steps
        return replace(self, max_steps=limit or suite.max_steps)

    def rollout_settings(self) -> RolloutSettings:
        """The part of the protocol that the rollout loop carries out; use `for_suite` first."""
        assert not isinstance(self.max_steps, Mapping), "a protocol with limits by suite is resolved before it is used"
        return self._rollout_settings(self.max_steps)

    def _rollout_settings(self, max_steps: int | None) -> RolloutSettings:
        return RolloutSettings(
            execute_steps=self.execute_steps,
            temporal_ensemble=self.temporal_ensemble,
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
        """The episodes of some tasks (None: all), task after task last: every task is reached early.

        `shard` (i, n) is every n-th of them from the i-th on, i in 1..n: n machines play all of them, none twice.

        Raises:
            ValueError: a task, an initial state or a shard that does not exist.
        """
        chosen = range(len(suite.tasks)) if tasks is None else list(dict.fromkeys(tasks))
        unknown = [task for task in chosen if not 0 <= task < len(suite.tasks)]
        if unknown or not chosen:
            raise ValueError(f"suite {suite.name!r} has tasks 0 to {len(suite.tasks) - 1}, got tasks={list(chosen)}")
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
        return specs[part - 1 :: parts]


def protocol_names() -> list[str]:
    """All named protocols."""
    folder = resources.files("cogvla.configs") / "protocol"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_protocol(name: str, **changes: Any) -> EvaluationProtocol:
    """The protocol of `configs/protocol/NAME.yaml` with some values changed; ValueError lists what exists."""
    if name not in protocol_names():
        raise ValueError(f"unknown protocol {name!r}; one of {', '.join(protocol_names())}")
    text = (resources.files("cogvla.configs") / "protocol" / f"{name}.yaml").read_text()
    values = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict), f"configs/protocol/{name}.yaml holds a mapping"
    return EvaluationProtocol(**{str(key): value for key, value in values.items()} | changes)
