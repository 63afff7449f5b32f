"""Record one demonstration with a scripted expert, and save and load it as a file.

Shape legend: T steps, A action dimension, S state dimension, N tasks of the suite, H and W image size.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogvla.envs.contract import ContractError, Expert, ImageSkipping, Labels, Perturbable, SuiteEnv, offered, required
from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, CrowdedSceneError, Perturbation
from cogvla.envs.suite import FIRST_TRAINING_STATE

IMAGE_PREFIX = "observation.images."
MAX_ATTEMPTS = 10
"""Number of initial states that an expert may fail on before recording gives up on an episode."""
SEED_STRIDE = 1_000_000
"""Distance between the initial states of two seeds."""
STEPS_AFTER_SUCCESS = 4
"""Control steps recorded after success. Without them, data would hardly show the release, the shortest phase."""
DEFAULT_FPS = 20
SCENE_TASK = "scene_task"
"""Label of counterfactual recordings: the task whose scene an episode shows; `task` is the one that is done there."""
OPEN_HAND = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
PNG_LEVEL = 1  # level 6, which lerobot uses, takes three times as long for files 10 % smaller
STATISTICS_FRAMES, STATISTICS_STRIDE = 16, 4
QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)


@dataclass(frozen=True)
class Demonstration:
    """A successful episode.

    Attributes:
        instruction: instruction of the task.
        fps: control rate in Hz.
        arrays: feature name -> array [T,D]; tables are flattened, row by row, because lerobot's tools edit only flat
            features.
        images: camera -> T PNG files.
        image_statistics: camera -> statistic -> array [3], of pixel values in [0,255].
    """

    instruction: str
    fps: int
    arrays: dict[str, np.ndarray]
    images: dict[str, list[bytes]] = field(repr=False)
    image_statistics: dict[str, dict[str, np.ndarray]] = field(repr=False)

    def __post_init__(self) -> None:
        flat = {name: array.reshape(len(array), -1) for name, array in self.arrays.items()}
        object.__setattr__(self, "arrays", flat)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        """Return the shape (H, W, 3) of a camera's images."""
        with Image.open(io.BytesIO(self.images[camera][0])) as image:
            return image.height, image.width, 3

    def save(self, path: Path) -> None:
        """Write the file atomically: it exists completely or not at all."""
        content: dict[str, Any] = {"instruction": np.array(self.instruction), "fps": np.array(self.fps)}
        content |= {f"array/{name}": array for name, array in self.arrays.items()}
        for camera, files in self.images.items():
            content[f"png/{camera}"] = np.frombuffer(b"".join(files), np.uint8)
            content[f"length/{camera}"] = np.array([len(file) for file in files])
            content |= {f"statistic/{camera}/{k}": v for k, v in self.image_statistics[camera].items()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Demonstration:
        """Read a file of `save`."""
        with np.load(path, allow_pickle=False) as content:
            keyed: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
            for key in content.files:
                kind, _, name = key.partition("/")
                keyed[kind][name] = content[key]
        statistics: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for key, value in keyed["statistic"].items():
            camera, _, name = key.rpartition("/")
            statistics[camera][name] = value
        images = {}
        for camera, blob in keyed["png"].items():
            ends = np.cumsum(keyed["length"][camera])
            starts = ends - keyed["length"][camera]
            images[camera] = [blob[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]
        instruction, fps = str(keyed["instruction"][""]), int(keyed["fps"][""])
        return cls(instruction, fps, keyed["array"], images, dict(statistics))

    @staticmethod
    def is_complete(path: Path) -> bool:
        """Return True if the file exists and its end is not cut off."""
        return path.is_file() and zipfile.is_zipfile(path)


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

    def task(self, slot: int) -> int:
        """Return the task whose scene episode `slot` of the data set shows. Tasks take turns."""
        return slot % len(self.instructions)

    def turn(self, slot: int) -> int | None:
        """Return which of the other tasks episode `slot` shows, as a place in their order; None: the scene's own task.

        Other tasks take turns, too. The share holds for each scene, and over all of them, to less than an episode.
        """
        episode_of_task, task = divmod(slot, len(self.instructions))
        owed = self.counterfactual * episode_of_task + task / len(self.instructions) + 1e-9  # 0.29 * 100 is below 29
        return int(owed) if int(owed + self.counterfactual) > int(owed) else None

    def initial_state(self, slot: int, attempt: int) -> int:
        """Return the initial state of an attempt. It depends only on the seed and the arguments, not on the workers."""
        episode_of_task = slot // len(self.instructions)
        return FIRST_TRAINING_STATE + self.seed * SEED_STRIDE + episode_of_task * MAX_ATTEMPTS + attempt

    def perturbations(self, task: int, initial_state: int) -> tuple[Perturbation, ...]:
        """Draw how an episode differs: in each dimension of `randomise` at one of the levels, or not at all."""
        rng = np.random.default_rng([self.seed, task, initial_state, len(LEVELS)])
        drawn = rng.integers(0, 1 + len(LEVELS), len(DIMENSIONS)).tolist()
        levels = dict(zip(DIMENSIONS, drawn, strict=True))
        return tuple(Perturbation(name, levels[name]) for name in self.randomise if levels[name])

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


class ExpertFailedError(RuntimeError):
    """The expert failed on `MAX_ATTEMPTS` initial states in a row."""


class Demonstrator:
    """Records episodes of a scripted expert in one environment."""

    def __init__(self, settings: DemonstratorSettings) -> None:
        self.settings = settings
        self.env = settings.make(image_size=settings.image_size)
        self.fps = round(self.env.metadata.get("render_fps", DEFAULT_FPS))

    def record(self, slot: int) -> tuple[Demonstration, int]:
        """Record episode `slot` of the data set; return it with the number of attempts.

        Raises:
            ExpertFailedError: the expert failed on `MAX_ATTEMPTS` initial states.
            ContractError: the environment cannot be asked for other tasks, and the episode is to show one.
        """
        turn = self.settings.turn(slot)
        for attempt in range(MAX_ATTEMPTS):
            # Another task may be beyond the expert where it stands here; then the scene shows its own.
            other = None if turn is None or attempt >= MAX_ATTEMPTS // 2 else turn + attempt
            try:
                episode = self._play(self.settings.task(slot), self.settings.initial_state(slot, attempt), other)
            except CrowdedSceneError:
                continue
            if episode is not None:
                return episode, attempt + 1
        task = self.settings.task(slot)
        first = self.settings.initial_state(slot, 0)
        raise ExpertFailedError(
            f"the expert failed on all of the initial states {first} to {first + MAX_ATTEMPTS - 1} of task {task} "
            f"({self.settings.instructions[task]!r}); lower `noise`, or run `expert_table` to see which tasks it solves"
        )

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _play(self, scene_task: int, initial_state: int, turn: int | None) -> Demonstration | None:
        env, scene = self.env, required(self.env, Labels, "recording")
        seed = [self.settings.seed, scene_task, initial_state]
        if self.settings.randomise:
            perturbable = required(env, Perturbable, f"randomise={list(self.settings.randomise)}")
            perturbable.perturbations = self.settings.perturbations(scene_task, initial_state)
        options = {"task": scene_task, "initial_state": initial_state}
        asked = None if turn is None else self._other_task(options, turn)
        task = scene_task if asked is None else asked
        if asked is not None:
            options["asked"] = asked
            seed.append(asked)
        observation, info = env.reset(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]), options=options)
        instruction = str(info["instruction"])
        if asked is not None and instruction != self.settings.instructions[asked]:
            raise self._cannot_be_asked(f"was given {asked=} and returns the instruction {instruction!r}")
        others = [int(other) for other in info.get("alternative_tasks", ())]  # only `reset` returns them
        for _ in range(self.settings.settling_steps):
            observation, _, _, _, info = env.step(OPEN_HAND)
        possible_N = np.zeros(len(self.settings.instructions), bool)
        possible_N[[task, *others]] = True
        built = self.settings.expert(env, np.random.default_rng(seed), noise=self.settings.noise)
        expert = required(built, Expert, "recording")
        steps: dict[str, list[np.ndarray]] = defaultdict(list)
        success, left = False, self.settings.max_steps
        while left > 0:
            action_A = np.asarray(expert.act(), np.float32)
            executed_A = np.asarray(expert.noisy(action_A), np.float32)
            labels = scene.labels()
            alternatives_N6 = np.zeros((len(possible_N), 6), np.float32)
            for other in (task, *others):
                alternatives_N6[other] = _positions(labels if other == task else scene.labels_for(other))
            row: dict[str, np.ndarray] = {
                "observation.state": np.asarray(observation["state"], np.float32),
                "action": action_A,
                "label.executed_action": executed_A,
                "label.target": alternatives_N6[task, :3].copy(),
                "label.goal": alternatives_N6[task, 3:].copy(),
                "label.phase": np.array([expert.phase], np.int64),
                "label.initial_state": np.array([initial_state], np.int64),
                "label.task": np.array([task], np.int64),
                "label.alternatives": alternatives_N6,
                "label.possible": possible_N,
            }
            if self.settings.counterfactual:
                row[f"label.{SCENE_TASK}"] = np.array([scene_task], np.int64)
            for name in _cameras(observation):
                row[IMAGE_PREFIX + name] = observation[name]
                row[f"label.projection.{name}"] = np.asarray(scene.camera_projection(name), np.float32)
            for name, value in row.items():
                steps[name].append(value)
            observation, _, terminated, _, info = env.step(executed_A)
            left -= 1
            if info["success"] and not success:
                success, left = True, min(left, STEPS_AFTER_SUCCESS)
            if terminated and not success:
                break
        return pack(instruction, self.fps, steps) if success else None

    def _other_task(self, options: dict[str, int], turn: int) -> int | None:
        """Return the task whose turn it is of those that are also possible in a scene, or None if there is none."""
        if (skipping := offered(self.env, ImageSkipping)) is not None:
            skipping.skip_images = True
        try:
            _, info = self.env.reset(seed=0, options=options)
        finally:
            if skipping is not None:
                skipping.skip_images = False
        if "alternative_tasks" not in info:
            raise self._cannot_be_asked("does not return `alternative_tasks`")
        number = len(self.settings.instructions)  # beginning after the scene's own task, so that all are shown equally
        others = sorted((int(task) for task in info["alternative_tasks"]), key=lambda t: (t - options["task"]) % number)
        return others[turn % len(others)] if others else None

    def _cannot_be_asked(self, reason: str) -> ContractError:
        return ContractError(
            f"counterfactual={self.settings.counterfactual} needs an environment that can be asked for other tasks "
            f"(envs/contract.py): `reset` of {type(self.env).__name__} {reason}"
        )


def _positions(labels: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([labels["target"], labels["goal"]]).astype(np.float32)


def _cameras(observation: dict[str, np.ndarray]) -> list[str]:
    return [name for name, value in observation.items() if value.ndim == 3]


def pack(instruction: str, fps: int, steps: dict[str, list[np.ndarray]]) -> Demonstration:
    """Build a demonstration from `steps`: feature name -> one value for each step; images are uint8 [H,W,3]."""
    cameras = [name for name in steps if name.startswith(IMAGE_PREFIX)]
    return pack_encoded(
        instruction,
        fps,
        {name: np.stack(values) for name, values in steps.items() if name not in cameras},
        {name: [encode_png(image_HWC) for image_HWC in steps[name]] for name in cameras},
    )


def pack_encoded(
    instruction: str, fps: int, arrays: dict[str, np.ndarray], images: dict[str, list[bytes]]
) -> Demonstration:
    """Build a demonstration from arrays [T,...] and PNG files.

    For robots: minutes of camera images do not fit into memory as pixels.
    """
    return Demonstration(instruction, fps, arrays, images, {name: _statistics(files) for name, files in images.items()})


def encode_png(image_HWC: np.ndarray) -> bytes:
    """Encode an image uint8 [H,W,3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _statistics(files: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Compute statistics for each channel, over a few frames and every fourth pixel in each direction.

    Statistics of all pixels would take longer than the episode itself.
    """
    chosen = np.linspace(0, len(files) - 1, min(len(files), STATISTICS_FRAMES)).round().astype(int)
    pixels_P3 = np.concatenate(
        [np.asarray(Image.open(io.BytesIO(files[i])))[::STATISTICS_STRIDE, ::STATISTICS_STRIDE] for i in chosen]
    ).reshape(-1, 3)
    pixels_P3 = pixels_P3.astype(np.float64)
    statistics = {
        "min": pixels_P3.min(0),
        "max": pixels_P3.max(0),
        "mean": pixels_P3.mean(0),
        "std": pixels_P3.std(0),
        "count": np.array([len(chosen)]),
    }
    for quantile, values in zip(QUANTILES, np.quantile(pixels_P3, QUANTILES, axis=0), strict=True):
        statistics[f"q{round(100 * quantile):02d}"] = values
    return statistics
