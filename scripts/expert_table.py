"""`expert_table`: measure how often the scripted experts solve each task of a suite.

    expert_table suite=tabletop_object
    expert_table suite=all states=10 noise=1.0
    expert_table suite=libero_goal perturbation=robot level=2     (a cell of the robustness benchmark)

The exit status is 1 if a task is solved less often than `required`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from cogvla.envs.contract import Perturbable, required, resting_action
from cogvla.envs.perturbation.perturbation import OF_THE_SCENE, CrowdedSceneError, Perturbation
from cogvla.envs.suite import Suite, get_suite, suite_names
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain

ALL = "all"


@dataclass(frozen=True)
class ExpertResult:
    """Result of the expert on one task.

    Attributes:
        instruction: instruction of the task.
        states: number of initial states played.
        crowded: initial states whose perturbed scene has no room, which are not played.
        failed: initial states that it did not solve.
        steps: number of steps of each success.
    """

    instruction: str
    states: int
    failed: tuple[int, ...]
    steps: tuple[int, ...]
    crowded: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        return 1.0 - len(self.failed) / self.states if self.states else 0.0

    def __str__(self) -> str:
        mean, longest = (np.mean(self.steps), max(self.steps)) if self.steps else (float("nan"), 0)
        solved = f"{self.states - len(self.failed)}/{self.states}"
        failed = f"  failed: {list(self.failed)}" if self.failed else ""
        failed += f"  no room: {list(self.crowded)}" if self.crowded else ""
        return f"{self.instruction:78s} {solved:>7s} {100 * self.rate:6.1f} %  {mean:6.1f} {longest:5d}{failed}"


def play(
    suite: Suite, task: int, states: Sequence[int], noise: float, perturbations: tuple[Perturbation, ...] = ()
) -> ExpertResult:
    """Play one task with the expert from these initial states, without rendering.

    Raises:
        ValueError: the suite has no expert.
    """
    if suite.expert is None:
        raise ValueError(f"{suite.name} has no scripted expert")
    env = suite.make(render=False)
    if perturbations:
        required(env, Perturbable, "perturbation").perturbations = perturbations
    failed, steps, crowded = [], [], []
    for state in states:
        try:
            env.reset(options={"task": task, "initial_state": state})
        except CrowdedSceneError:
            crowded.append(state)
            continue
        for _ in range(suite.settling_steps):
            env.step(resting_action())
        expert = suite.expert(env, np.random.default_rng([task, state]), noise=noise)
        count, success = 0, False
        while not success and count < suite.max_steps:
            _, _, success, _, _ = env.step(expert.noisy(expert.act()))
            count += 1
        if success:
            steps.append(count)
        else:
            failed.append(state)
    env.close()
    played = len(states) - len(crowded)
    return ExpertResult(suite.tasks[task].instruction, played, tuple(failed), tuple(steps), tuple(crowded))


def run(config: DictConfig) -> list[ExpertResult]:
    """Print the table of each chosen suite; return all rows."""
    import_modules(config.imports)
    names = [n for n in suite_names() if n.startswith("tabletop_")] if config.suite == ALL else [config.suite]
    for name, least in (("states", 1), ("first_state", 0)):
        if type(config[name]) is not int or config[name] < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {config[name]!r}")
    for name, most in (("noise", math.inf), ("required", 1)):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or value == math.inf:
            raise ValueError(f"{name} must be a finite number from 0 to {most}, got {value!r}")
    states = range(config.first_state, config.first_state + config.states)
    table: list[ExpertResult] = []
    for name in names:
        suite = get_suite(name, plain(config))
        cells = _cells(config, suite)
        tasks = range(len(suite.tasks)) if config.tasks is None else suite.chosen_tasks(plain(config)["tasks"])
        print(f"\n{name} (at most {suite.max_steps} steps, noise {config.noise})")
        print(f"{'instruction':78s} {'solved':>7s} {'rate':>8s}  {'steps':>6s} {'max':>5s}")
        for task in tqdm(tasks, desc=name, leave=False):
            row = play(suite, task, states, config.noise, cells)
            tqdm.write(str(row))
            table.append(row)
    return table


def _cells(config: DictConfig, suite: Suite) -> tuple[Perturbation, ...]:
    """Return the cell of the robustness benchmark, or nothing."""
    if config.perturbation is None:
        if config.level is not None:
            raise ValueError("level= needs perturbation=NAME")
        return ()
    if config.perturbation not in OF_THE_SCENE or config.level is None:
        raise ValueError(
            f"perturbation= must be one of {', '.join(OF_THE_SCENE)}, with level=1, 2 or 3; "
            f"got {config.perturbation!r}, level={config.level}"
        )
    cell = Perturbation(config.perturbation, config.level)
    suite.magnitudes(cell)
    return (cell,)


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    table = run(config)
    poor = [row.instruction for row in table if row.rate < config.required]
    if poor:
        raise SystemExit(f"under {config.required:.0%}: {'; '.join(poor)}")


if __name__ == "__main__":
    console.expert_table()
