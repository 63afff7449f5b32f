"""Record one demonstration with a scripted expert.

Shape legend: A action dimension, N tasks of the suite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cogvla.envs.contract import (
    Advisor,
    ContractError,
    Expert,
    ImageSkipping,
    Labels,
    Perturbable,
    SuiteEnv,
    offered,
    required,
    resting_action,
)
from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, CrowdedSceneError, Perturbation
from cogvla.envs.recording.demonstration import IMAGE_PREFIX, Demonstration, pack
from cogvla.envs.suite import FIRST_TRAINING_STATE

MAX_ATTEMPTS = 10
"""Number of initial states that an expert may fail on before recording gives up on an episode."""
SEED_STRIDE = 1_000_000
"""Distance between the initial states of two seeds; those of corrections begin in the middle of it."""
STEPS_AFTER_SUCCESS = 4
"""Control steps recorded after success. Without them, data would hardly show the release, the shortest phase."""
DEFAULT_FPS = 20
SCENE_TASK = "scene_task"
"""Label of counterfactual recordings: the task whose scene an episode shows; `task` is the one that is done there."""
INTERVENTION = "intervention"
"""Column of corrections: True where the expert executed its action, False where the policy acted."""


@dataclass(frozen=True)
class DemonstratorSettings:
    """Settings of all episodes of a recording.

    Attributes:
        make: function that builds the environment (`Suite.make`); must be picklable for other processes.
        expert: function `expert(env, rng, noise=...)` that builds the expert; must be picklable.
        instructions: instructions of the suite's tasks, in order.
        max_steps: control steps after which an attempt has failed.
        image_size: height and width of the images in pixels.
        noise: scale of the expert's execution noise.
        seed: seed of initial states and noise.
        randomise: dimensions of the robustness benchmark in which episodes differ; needs `Perturbable` environments.
        settling_steps: control steps with an open hand before the expert begins; they are not recorded.
        counterfactual: share of the episodes, in [0,1], that show another task that is possible in the scene.
        corrects: a policy acts, until the expert takes over from it (`corrections`).
        tasks: indices of the tasks whose scenes are shown; empty: all.
    """

    make: Callable[..., SuiteEnv]
    expert: Callable[..., Expert]
    instructions: tuple[str, ...]
    max_steps: int
    image_size: int
    noise: float
    seed: int
    randomise: tuple[str, ...] = ()
    settling_steps: int = 0
    counterfactual: float = 0.0
    corrects: bool = False
    tasks: tuple[int, ...] = ()

    def task(self, slot: int) -> int:
        """Return the task whose scene episode `slot` of the data set shows. Tasks take turns."""
        return self._tasks[slot % len(self._tasks)]

    def turn(self, slot: int) -> int | None:
        """Return which of the other tasks episode `slot` shows, as a place in their order; None: the scene's own task.

        Other tasks take turns, too. The share holds for each scene, and over all of them, to less than an episode.
        """
        episode_of_task, place = divmod(slot, len(self._tasks))
        owed = self.counterfactual * episode_of_task + place / len(self._tasks) + 1e-9  # 0.29 * 100 is below 29
        return int(owed) if int(owed + self.counterfactual) > int(owed) else None

    def initial_state(self, slot: int, attempt: int) -> int:
        """Return the initial state of an attempt. It depends only on the seed and the arguments, not on the workers."""
        episode_of_task = slot // len(self._tasks)
        first = FIRST_TRAINING_STATE + self.seed * SEED_STRIDE + (SEED_STRIDE // 2 if self.corrects else 0)
        return first + episode_of_task * MAX_ATTEMPTS + attempt

    def perturbations(self, task: int, initial_state: int) -> tuple[Perturbation, ...]:
        """Draw how an episode differs, see `randomised`."""
        return randomised(self.randomise, self.seed, task, initial_state)

    def recorded(self, episode: Demonstration, slot: int) -> bool:
        """Return True if this is episode `slot` of a recording with these settings."""
        states = [self.initial_state(slot, attempt) for attempt in range(MAX_ATTEMPTS)]
        names = ("task", SCENE_TASK if self.counterfactual else "task", "initial_state")
        labels = [episode.arrays.get(f"label.{name}") for name in names]
        if any(values is None for values in labels):
            return False
        task, scene_task, state = (int(values[0, 0]) for values in labels if values is not None)
        fits = scene_task == self.task(slot) and state in states and (task == scene_task or self.turn(slot) is not None)
        return fits and 0 <= task < len(self.instructions) and episode.instruction == self.instructions[task]

    @property
    def _tasks(self) -> Sequence[int]:
        return self.tasks or range(len(self.instructions))


def randomised(dimensions: Sequence[str], seed: int, task: int, initial_state: int) -> tuple[Perturbation, ...]:
    """Draw how an episode of a recording differs: in each dimension at one of the levels, or not at all."""
    rng = np.random.default_rng([seed, task, initial_state, len(LEVELS)])
    drawn = rng.integers(0, 1 + len(LEVELS), len(DIMENSIONS)).tolist()
    levels = dict(zip(DIMENSIONS, drawn, strict=True))
    return tuple(Perturbation(name, levels[name]) for name in dimensions if levels[name])


class ExpertFailedError(RuntimeError):
    """The expert failed on `MAX_ATTEMPTS` initial states in a row."""


def expert_failed(settings: DemonstratorSettings, slot: int) -> ExpertFailedError:
    """Return the error that the expert failed on all initial states of an episode."""
    task, first = settings.task(slot), settings.initial_state(slot, 0)
    return ExpertFailedError(
        f"the expert failed on all of the initial states {first} to {first + MAX_ATTEMPTS - 1} of task {task} "
        f"({settings.instructions[task]!r}); lower `noise`, or run `expert_table` to see which tasks it solves"
    )


class Demonstrator:
    """Records episodes of a scripted expert in one environment."""

    def __init__(self, settings: DemonstratorSettings) -> None:
        self.settings = settings
        self.env = settings.make(image_size=settings.image_size)
        self.fps = control_rate(self.env)

    def record(self, slot: int) -> tuple[Demonstration, int]:
        """Record episode `slot` of the data set; return it with the number of attempts.

        Raises:
            ExpertFailedError: the expert failed on `MAX_ATTEMPTS` initial states.
            ContractError: see `Attempt`.
        """
        for attempt in range(MAX_ATTEMPTS):
            try:
                episode = Attempt(self.env, self.settings, slot, attempt)
            except CrowdedSceneError:
                continue
            while not episode.over:
                episode.step()
            if episode.success:
                return episode.demonstration(), attempt + 1
        raise expert_failed(self.settings, slot)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


class Attempt:
    """One attempt at an episode: in every state the expert says what to do; it, or someone else, does something.

    Args:
        env: the environment, which this resets.
        settings: settings of the recording.
        slot: number of the episode in the data set.
        attempt: number of the attempt.

    Raises:
        CrowdedSceneError: the scene that was drawn has no room.
        ContractError: the environment or the expert lacks what recording needs, or the environment cannot be asked for
            other tasks, and the episode is to show one.
    """

    def __init__(self, env: SuiteEnv, settings: DemonstratorSettings, slot: int, attempt: int) -> None:
        self._env, self._settings, self._scene = env, settings, required(env, Labels, "recording")
        self._scene_task, self._initial_state = settings.task(slot), settings.initial_state(slot, attempt)
        seed = [settings.seed, self._scene_task, self._initial_state]
        if settings.randomise:
            perturbable = required(env, Perturbable, f"randomise={list(settings.randomise)}")
            perturbable.perturbations = settings.perturbations(self._scene_task, self._initial_state)
        options = {"task": self._scene_task, "initial_state": self._initial_state}
        turn = settings.turn(slot)
        # Another task may be beyond the expert where it stands here; then the scene shows its own.
        asked = None if turn is None or attempt >= MAX_ATTEMPTS // 2 else self._other_task(options, turn + attempt)
        self._task = self._scene_task if asked is None else asked
        if asked is not None:
            options["asked"] = asked
            seed.append(asked)
        self.observation, info = env.reset(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]), options=options)
        self.instruction = str(info["instruction"])
        if asked is not None and self.instruction != settings.instructions[asked]:
            raise self._cannot_be_asked(f"was given {asked=} and returns the instruction {self.instruction!r}")
        self._others = [int(other) for other in info.get("alternative_tasks", ())]  # only `reset` returns them
        for _ in range(settings.settling_steps):
            self.observation, _, _, _, info = env.step(resting_action())
        self._possible_N = np.zeros(len(settings.instructions), bool)
        self._possible_N[[self._task, *self._others]] = True
        built = settings.expert(env, np.random.default_rng(seed), noise=settings.noise)
        self._expert = required(built, Expert, "recording")
        self._advisor = required(built, Advisor, "recording corrections of a policy") if settings.corrects else None
        self._steps: dict[str, list[np.ndarray]] = defaultdict(list)
        self.labels = self._scene.labels()
        self.success = self._failed = False
        self.left = settings.max_steps
        """Control steps until the attempt is over; may be set anew."""

    def __len__(self) -> int:
        return len(self._steps["action"])

    @property
    def over(self) -> bool:
        return self._failed or self.left <= 0

    def step(self, action_A: np.ndarray | None = None) -> None:
        """Carry out and record one control step.

        Args:
            action_A: what someone else does, float32 [A]; None: the expert acts, with its noise.
        """
        advised_A = np.asarray(self._expert.act(), np.float32)
        executed_A = np.asarray(self._expert.noisy(advised_A) if action_A is None else action_A, np.float32)
        alternatives_N6 = np.zeros((len(self._possible_N), 6), np.float32)
        for other in (self._task, *self._others):
            alternatives_N6[other] = _positions(self.labels if other == self._task else self._scene.labels_for(other))
        row: dict[str, np.ndarray] = {
            "observation.state": np.asarray(self.observation["state"], np.float32),
            "action": advised_A,
            "label.executed_action": executed_A,
            "label.target": alternatives_N6[self._task, :3].copy(),
            "label.goal": alternatives_N6[self._task, 3:].copy(),
            "label.phase": np.array([self._expert.phase], np.int64),
            "label.initial_state": np.array([self._initial_state], np.int64),
            "label.task": np.array([self._task], np.int64),
            "label.alternatives": alternatives_N6,
            "label.possible": self._possible_N,
        }
        if self._settings.counterfactual:
            row[f"label.{SCENE_TASK}"] = np.array([self._scene_task], np.int64)
        if self._settings.corrects:
            row[INTERVENTION] = np.array([action_A is None])
        for name in _cameras(self.observation):
            row[IMAGE_PREFIX + name] = self.observation[name]
            row[f"label.projection.{name}"] = np.asarray(self._scene.camera_projection(name), np.float32)
        for name, value in row.items():
            self._steps[name].append(value)
        self.observation, _, terminated, _, info = self._env.step(executed_A)
        if action_A is not None:
            assert self._advisor is not None, "someone else acts in corrections only"
            self._advisor.follow(executed_A)
        self.labels = self._scene.labels()
        self.left -= 1
        if info["success"] and not self.success:
            self.success, self.left = True, min(self.left, STEPS_AFTER_SUCCESS)
        self._failed = bool(terminated) and not self.success

    def demonstration(self) -> Demonstration:
        """Return what was recorded; the attempt is then used up."""
        return pack(self.instruction, control_rate(self._env), self._steps)

    def _other_task(self, options: dict[str, int], turn: int) -> int | None:
        """Return the task whose turn it is of those that are also possible in a scene, or None if there is none."""
        if (skipping := offered(self._env, ImageSkipping)) is not None:
            skipping.skip_images = True
        try:
            _, info = self._env.reset(seed=0, options=options)
        finally:
            if skipping is not None:
                skipping.skip_images = False
        if "alternative_tasks" not in info:
            raise self._cannot_be_asked("does not return `alternative_tasks`")
        number = len(self._settings.instructions)  # beginning after the scene's own task, so that all are shown equally
        others = sorted((int(task) for task in info["alternative_tasks"]), key=lambda t: (t - options["task"]) % number)
        return others[turn % len(others)] if others else None

    def _cannot_be_asked(self, reason: str) -> ContractError:
        return ContractError(
            f"counterfactual={self._settings.counterfactual} needs an environment that can be asked for other tasks "
            f"(envs/contract.py): `reset` of {type(self._env).__name__} {reason}"
        )


def control_rate(env: SuiteEnv) -> int:
    """Return the control rate of an environment in Hz; ContractError if it is no whole number, as data sets need it."""
    rate = env.metadata.get("render_fps", DEFAULT_FPS)
    if rate != round(rate) or rate < 1:
        raise ContractError(f"recording needs a whole number of control steps per second, render_fps is {rate}")
    return round(rate)


def _positions(labels: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([labels["target"], labels["goal"]]).astype(np.float32)


def _cameras(observation: dict[str, np.ndarray]) -> list[str]:
    return [name for name, value in observation.items() if value.ndim == 3]
