"""Play one episode at a time in one environment; defines the messages between a rollout and its environments.

Each request gets one reply:

    Build()            -> Ready | Failed
    Play(spec)         -> Observed | Failed              reset, waiting steps
    Advance(actions)   -> Observed | Finished | Failed   execute one chunk; render only its last observation
    Record(path, ...)  -> Recorded | Failed              replay and film the last episode's actions

Shape legend: T actions per message, A action dimension, H and W image size, S state dimension.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from cogvla.envs.contract import Cameras, ImageSkipping, Perturbable, SuiteEnv, offered, picture, required
from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.perturbation.perturbation import OF_THE_SCENE, SENSOR, WORDING
from cogvla.envs.perturbation.sensor import Sensor
from cogvla.envs.perturbation.wording import reworded
from cogvla.envs.rollout.video import VideoWriter, annotate


@dataclass(frozen=True)
class PlayerSettings:
    """Settings of all episodes of a rollout.

    Attributes:
        make: function that builds the environment (`Suite.make`); must be picklable for other processes.
        image_size: height and width of the observations' images in pixels.
        cameras: names of the images that the policy needs.
        max_steps: number of control steps after which the episode ends, without the waiting steps. Replaces the
            environment's own limit (`truncated`), because the limit belongs to the protocol.
        waiting_steps: number of steps with `waiting_action` after the reset, for objects to settle.
        waiting_action: action without motion, float32 [A].
        video_size: height and width of recorded frames in pixels, if the environment can render any size.
        fps: frames per second of a video: the control rate.
        suite: name of the suite, for the seeds of perturbations.
        instructions: instructions of the suite's tasks, so that another wording is not that of another task.
        player: function that builds another `Player`; must be picklable. None: a `Player`.
    """

    make: Callable[..., gym.Env]
    image_size: int
    cameras: tuple[str, ...]
    max_steps: int
    waiting_steps: int
    waiting_action: np.ndarray
    video_size: int = 256
    fps: float = 20.0
    suite: str = ""
    instructions: tuple[str, ...] = ()
    player: Callable[[PlayerSettings], Player] | None = None

    def build(self) -> Player:
        """Build the player."""
        return (self.player or Player)(self)


@dataclass(frozen=True)
class Build:
    """Request: build the environment."""


@dataclass(frozen=True)
class Play:
    """Request: start this episode."""

    spec: EpisodeSpec


@dataclass(frozen=True)
class Advance:
    """Request: execute actions_TA, float32 [T,A], one in each control step."""

    actions_TA: np.ndarray


@dataclass(frozen=True)
class Record:
    """Request: film the episode that just ended, with its outcome as a caption."""

    path: Path
    success: bool


@dataclass(frozen=True)
class Ready:
    """Reply: the environment is built.

    Attributes:
        observation: key -> shape of its observations.
        action: shape of its actions.
        fps: control rate in Hz; None: it does not say.
    """

    observation: dict[str, tuple[int, ...]]
    action: tuple[int, ...]
    fps: float | None

    @classmethod
    def of(cls, env: SuiteEnv) -> Ready:
        """Return what an environment says of itself."""
        shapes = {name: tuple(space.shape or ()) for name, space in env.observation_space.spaces.items()}
        return cls(shapes, tuple(env.action_space.shape), env.metadata.get("render_fps"))


@dataclass(frozen=True)
class Observed:
    """Reply: the episode waits for a chunk.

    Attributes:
        images: camera -> uint8 [H,W,3].
        state: float32 [S].
        instruction: instruction.
        anew: the policy forgets what was before, because the player has begun the episode again in another scene, or
            someone else has acted since.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str
    anew: bool = False


@dataclass(frozen=True)
class Finished:
    """Reply: the episode has ended. The fields are those of `EpisodeResult`."""

    asked: int | None
    instruction: str
    success: bool
    scene_task_success: bool | None
    steps: int
    reward: float
    reset_s: float
    environment_s: float
    loop_ms: tuple[float, ...]
    perturbation: Mapping[str, Any] | None


@dataclass(frozen=True)
class Recorded:
    """Reply: the video is complete."""

    path: Path


@dataclass(frozen=True)
class Failed:
    """Reply: an exception was raised, or the process died (`died`).

    A `mistake` is an exception that another attempt would not mend: it is raised where the rollout runs.
    """

    text: str
    died: bool = False
    mistake: Exception | None = None


PlayerRequest = Build | Play | Advance | Record
PlayerReply = Ready | Observed | Finished | Recorded | Failed


class Player:
    """Player of one episode at a time in one environment."""

    def __init__(self, settings: PlayerSettings) -> None:
        self._settings = settings
        self._env: gym.Env | None = None
        self._sensor: Sensor | None = None
        self._drawn: Mapping[str, Any] | None = None

    def handle(self, request: PlayerRequest) -> PlayerReply:
        """Carry out a request. Any exception becomes a `Failed` with its traceback, and the environment is rebuilt."""
        try:
            match request:
                case Build():
                    return self._build()
                case Play(spec):
                    return self._play(spec)
                case Advance(actions_TA):
                    return self._advance(actions_TA)
                case Record(path, success):
                    return self._record(path, success)
        except Exception:  # any exception of an environment becomes an error in the report, with its traceback
            text = traceback.format_exc()
        try:
            self.close()
        except Exception:
            text += "\nand closing the environment failed:\n" + traceback.format_exc()
        return Failed(text)

    def close(self) -> None:
        """Close the environment and its rendering context."""
        if self._env is not None:
            env, self._env = self._env, None
            env.close()

    def _environment(self) -> SuiteEnv:
        if self._env is None:
            self._env = self._settings.make(image_size=self._settings.image_size)
        return self._env

    def _build(self) -> Ready:
        return Ready.of(self._environment())

    def _reset(self, spec: EpisodeSpec) -> tuple[dict[str, Any], dict[str, Any]]:
        options: dict[str, Any] = {"task": spec.task, "initial_state": spec.initial_state}
        if spec.asked is not None:
            options["asked"] = spec.asked
        env = self._environment()
        self._perturb(spec)
        self._skip_images(False)
        observation, info = env.reset(seed=spec.seed, options=options)
        self._instruction, self._drawn = str(info["instruction"]), info.get("perturbation")
        self._change_observations(spec, info.get("alternative_tasks"))
        for _ in range(self._settings.waiting_steps):
            observation, _, _, _, info = env.step(self._settings.waiting_action)
        return observation, info

    def _perturb(self, spec: EpisodeSpec) -> None:
        """Tell the environment how the next reset differs from training; ContractError if it cannot differ so."""
        change = spec.perturbation
        of_the_scene = (change,) if change is not None and change.dimension in OF_THE_SCENE else ()
        env = offered(self._environment(), Perturbable)
        if of_the_scene:
            env = required(self._environment(), Perturbable, f"perturbation={change}")
        if env is not None:
            env.perturbations = of_the_scene

    def _play(self, spec: EpisodeSpec) -> PlayerReply:
        started = time.perf_counter()
        if spec.asked == "swap":
            spec = replace(spec, asked=self._draw_alternative(spec))
        observation, _ = self._reset(spec)
        self._spec = spec
        self._actions: list[np.ndarray] = []
        self._reward = self._environment_s = 0.0
        self._loop_ms: list[float] = []
        self._scene_task_success = None if spec.asked is None else False
        self._reset_s = time.perf_counter() - started
        return self._observed(observation)

    def _change_observations(self, spec: EpisodeSpec, possible: Iterable[int] | None) -> None:
        """Change the words that the policy gets, and prepare to change its images."""
        change, self._sensor = spec.perturbation, None
        if change is None:
            return
        seed = change.seed(self._settings.suite, spec.task, spec.initial_state)
        if change.dimension == SENSOR:
            self._sensor = Sensor(change.level, seed, spec.task + spec.initial_state)
            self._drawn = self._sensor.drawn
        elif change.dimension == WORDING:
            suite = self._settings.instructions
            present = [suite[task] for task in possible] if suite and possible is not None else None
            self._instruction = reworded(self._instruction, change.level, seed, suite, present)
            self._drawn = {"instruction": self._instruction}

    def _draw_alternative(self, spec: EpisodeSpec) -> int:
        self._perturb(spec)
        self._skip_images(True)
        _, info = self._environment().reset(
            seed=spec.seed, options={"task": spec.task, "initial_state": spec.initial_state}
        )
        alternatives = list(info.get("alternative_tasks", ()))
        if not alternatives:
            raise ValueError(f"no other task is possible in the scene of task {spec.task}: it cannot be swapped")
        return int(np.random.default_rng([spec.seed, spec.task, spec.initial_state]).choice(sorted(alternatives)))

    def _advance(self, actions_TA: np.ndarray) -> PlayerReply:
        started = time.perf_counter()
        self._loop_ms.append((started - self._observed_at) * 1e3)
        env, limit = self._environment(), self._settings.max_steps
        observation: dict[str, Any] = {}
        for index, action_A in enumerate(actions_TA):
            self._actions.append(action_A)
            over = len(self._actions) >= limit
            self._skip_images(over or index < len(actions_TA) - 1)
            observation, reward, terminated, _, info = env.step(action_A)
            self._reward += float(reward)
            if self._spec.asked is not None:
                self._scene_task_success = bool(self._scene_task_success or info["scene_task_success"])
            if terminated or over:
                self._environment_s += time.perf_counter() - started
                return self._finished(bool(info["success"]))
        self._environment_s += time.perf_counter() - started
        return self._observed(observation)

    def _observed(self, observation: Mapping[str, Any]) -> Observed:
        images = {name: picture(observation, name) for name in self._settings.cameras}
        reply = Observed(
            images if self._sensor is None else self._sensor(images, len(self._actions)),
            np.asarray(observation["state"], np.float32),
            self._instruction,
        )
        self._observed_at = time.perf_counter()
        return reply

    def _finished(self, success: bool) -> Finished:
        assert self._spec.asked != "swap", "the alternative is drawn when the episode starts"
        return Finished(
            asked=self._spec.asked,
            instruction=self._instruction,
            success=success,
            scene_task_success=self._scene_task_success,
            steps=len(self._actions),
            reward=self._reward,
            reset_s=self._reset_s,
            environment_s=self._environment_s,
            loop_ms=tuple(self._loop_ms),
            perturbation=self._drawn,
        )

    def _record(self, path: Path, success: bool) -> Recorded:
        """Replay and film the last episode. Environments are deterministic, so only filmed episodes cost this time."""
        observation, info = self._reset(self._spec)
        self._skip_images(offered(self._environment(), Cameras) is not None)
        total = len(self._actions)
        with VideoWriter(path, self._settings.fps) as video:
            for step in range(total + 1):
                frame_HWC = self._frame(observation, step)
                progress = f"step {step} / {self._settings.max_steps}"
                if step < total:
                    video.add(annotate(frame_HWC, self._instruction, progress))
                    observation, _, _, _, info = self._environment().step(self._actions[step])
            status = "success" if success else "failure"
            if bool(info["success"]) != success:
                status += " (replay differs)"
            video.add(annotate(frame_HWC, self._instruction, progress, status), repeat=round(self._settings.fps))
        return Recorded(path)

    def _frame(self, observation: Mapping[str, Any], step: int) -> np.ndarray:
        camera, size = self._settings.cameras[0], self._settings.video_size
        cameras = offered(self._environment(), Cameras)
        frame = np.asarray(observation[camera] if cameras is None else cameras.render_camera(camera, size, size))
        return frame if self._sensor is None else self._sensor({camera: frame}, step)[camera]

    def _skip_images(self, skip: bool) -> None:
        if (env := offered(self._environment(), ImageSkipping)) is not None:
            env.skip_images = skip
