"""Play episodes: the rollout loop for many environments and one policy, with batched inference and no lock-step.

        worker 1: | reset | chunk of steps | wait | chunk of steps | ...
        worker 2:   | reset | chunk of steps | wait | chunk ...             each plays its episodes one after the other
        policy:              [1]          [2]      [1,2] ...                a batch is half of the workers, or more

While the policy answers one half of the workers, the other half plays; no worker waits longer than an inference takes.
Evaluation, rollouts during training and benchmarks all use `rollout`. Timing decides which environments share a batch.
It changes the numbers of an episode only by the rounding of batched arithmetic.

Shape legend: N slots that are answered together, T actions of each until the next chunk.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from cogvla.envs.contract import check_gripper
from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.rollout.failures import FirstFailures, last_line
from cogvla.envs.rollout.player import (
    Advance,
    Failed,
    Finished,
    Observed,
    Play,
    Player,
    PlayerReply,
    PlayerRequest,
    PlayerSettings,
    Ready,
    Record,
    Recorded,
)
from cogvla.envs.rollout.workers import LocalWorker, ProcessWorker, Worker
from cogvla.envs.suite import Suite
from cogvla.policy.chunking import Chunker, Late, OpenLoop, TemporalEnsemble
from cogvla.policy.interface import (
    Committed,
    Embodiment,
    Observation,
    Policy,
    Watching,
    begin_episode,
    reads_committed,
)

__all__ = ["EpisodeResult", "EpisodeSpec", "RolloutSettings", "patience", "rollout"]

_log = logging.getLogger(__name__)
ATTEMPTS = 2
"""Number of attempts at an episode that ends in an error. After the last one it counts as an error."""


@dataclass(frozen=True)
class RolloutSettings:
    """Settings of a rollout; the defaults are those of the suite and of the policy.

    Attributes:
        execute_steps: number of actions to execute of each chunk; None: the whole chunk, or 1 with `temporal_ensemble`.
        temporal_ensemble: decay m of `TemporalEnsemble`; None: open loop.
        latency_ms: time from an observation to its chunk, during which the robot moves on, see `Late`; it is rounded up
            to control steps. 0: the simulation waits for the policy.
        overlap: with a latency, what happens in steps that two chunks cover: "replace" or "real_time"
            (`policy.chunk_queue`).
        committed: with a latency, tell a policy that reads them which actions will be executed before its chunk is
            there.
        max_steps: number of control steps after which an episode is a failure; None: the suite's limit.
        waiting_steps: steps without motion and with an open gripper after each reset; not counted in `max_steps`.
        video_size: height and width of recorded frames in pixels.
        timeout_s: seconds after which a worker that does not answer is killed; its episode is an error.
        same_rate: refuse a policy whose control rate is not that of the suite; False: warn of it.
        largest_batch: largest number of observations in one call of the policy; None: all that wait. With 1, an episode
            does not depend on the other environments, not even in its last digits.
    """

    execute_steps: int | None = None
    temporal_ensemble: float | None = None
    latency_ms: float = 0.0
    overlap: str = "replace"
    committed: bool = True
    max_steps: int | None = None
    waiting_steps: int = 0
    video_size: int = 256
    timeout_s: float = 300.0
    same_rate: bool = False
    largest_batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("execute_steps", "max_steps", "video_size", "timeout_s", "largest_batch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("execute_steps", "max_steps", "waiting_steps"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ValueError(f"{name} must be a whole number of control steps, got {value!r}")
        if not 0 <= self.latency_ms < math.inf:
            raise ValueError(f"latency must be a finite number of milliseconds, 0 or more; got {self.latency_ms}")
        if self.overlap not in ("replace", "real_time"):
            raise ValueError(f"overlap must be replace or real_time, got {self.overlap!r}")
        if self.temporal_ensemble is not None and not math.isfinite(self.temporal_ensemble):
            raise ValueError(f"temporal_ensemble must be a finite number, got {self.temporal_ensemble}")
        if self.temporal_ensemble is not None and self.overlap != "replace":
            raise ValueError("give either temporal_ensemble or overlap=real_time")
        if self.waiting_steps < 0:
            raise ValueError(f"waiting_steps must not be negative, got {self.waiting_steps}")

    def chunker(self, chunk: int, control_hz: float) -> Chunker:
        """Build the chunker for chunks of `chunk` actions at this control rate.

        Raises:
            ValueError: `execute_steps`, together with the latency, is larger than the chunk.
        """
        if self.execute_steps is not None and self.execute_steps > chunk:
            raise ValueError(f"execute_steps is {self.execute_steps}, but the policy predicts {chunk} actions at once")
        if self.latency_ms:
            delay = math.ceil(self.latency_ms * control_hz / 1000 - 1e-6)
            steps = self.execute_steps or max(1, chunk - delay)
            if steps + delay > chunk:
                raise ValueError(
                    f"a latency of {self.latency_ms:g} ms is {delay} control steps; with execute_steps={steps} the "
                    f"policy must predict {steps + delay} actions at once, and it predicts {chunk}: lower one of them"
                )
            if self.temporal_ensemble is not None:
                return Late(steps, delay, "ensemble", self.temporal_ensemble)
            return Late(steps, delay, self.overlap)
        if self.temporal_ensemble is not None:
            return TemporalEnsemble(self.temporal_ensemble, self.execute_steps or 1)
        return OpenLoop(self.execute_steps or chunk)


def check_workers(workers: int) -> None:
    """Raise a ValueError if this is no number of environment processes."""
    if type(workers) is not int or workers < 0:
        raise ValueError(f"workers must be a whole number, 0 (play in this process) or more, got {workers!r}")


def check_fit(robot: Embodiment, suite: Suite, same_rate: bool = False) -> None:
    """Check that a policy of this robot can act in a suite, before there is a policy or anything is played.

    Args:
        robot: robot of the policy.
        suite: the suite; its environment is built without images.
        same_rate: see `RolloutSettings`.

    Raises:
        ValueError: it lacks a camera, or has another state, action, gripper or, with `same_rate`, control rate.
    """
    env = suite.make(render=False)
    try:
        _misfit(robot, suite.name, Ready.of(env), same_rate)
    finally:
        env.close()


def warn_of_unknown_words(policy: Policy, suite: Suite, tasks: Iterable[int]) -> dict[str, list[str]]:
    """Log a warning of words in the instructions of these tasks that a policy does not know.

    Returns:
        Index of a task -> its unknown words, of all tasks of the suite; empty if the policy cannot say so.
    """
    ask: Callable[[str], list[str]] = getattr(policy, "unknown_words", lambda _: [])
    unknown = {str(i): found for i, task in enumerate(suite.tasks) if (found := ask(task.instruction))}
    told = [task for task in tasks if str(task) in unknown]
    if told:
        words = dict.fromkeys(word for task in told for word in unknown[str(task)])
        _log.warning(
            "%s: the policy does not know words of %d tasks (%s): %s",
            *(suite.name, len(told), ", ".join(map(str, told)), ", ".join(words)),
        )
    return unknown


def _misfit(robot: Embodiment, suite: str, ready: Ready, same_rate: bool) -> str | None:
    """Return a warning that the control rates differ; ValueError if a policy of this robot cannot act in a suite."""
    missing = [name for name in robot.camera_names if name not in ready.observation]
    if missing:
        raise ValueError(
            f"the policy needs the cameras {missing}, suite {suite!r} has {sorted(ready.observation)}: "
            "evaluate on another suite, train with its cameras, or, with checkpoint=lerobot:PATH, map their names "
            "(cameras={SUITE_CAMERA: POLICY_CAMERA})"
        )
    if ready.observation.get("state") != (robot.state_dim,) or ready.action != (robot.action_dim,):
        raise ValueError(
            f"the policy has state [{robot.state_dim}] and action [{robot.action_dim}], "
            f"suite {suite!r} has {ready.observation.get('state')} and {ready.action}"
        )
    check_gripper(robot, suite)
    if ready.fps in (None, robot.control_hz):
        return None
    said = (
        f"the policy acts {robot.control_hz:g} times per second, suite {suite!r} takes "
        f"{ready.fps:g} actions per second: take a policy that was trained at this rate"
    )
    if same_rate:
        raise ValueError(said)
    return said


def rollout(
    policy: Policy,
    suite: Suite,
    episodes: Sequence[EpisodeSpec],
    *,
    workers: int = 0,
    settings: RolloutSettings | None = None,
    start_worker: Callable[[PlayerSettings], Worker] = ProcessWorker,
    choose_video: Callable[[EpisodeResult], Path | None] | None = None,
    stop_if_all_fail: bool = False,
    player: Callable[[PlayerSettings], Player] | None = None,
) -> Iterator[EpisodeResult]:
    """Play the episodes and yield each result at once, in no fixed order.

    Args:
        policy: policy that computes chunks in batches of 1 to `workers`.
        suite: suite that builds the environments.
        episodes: the episodes to play.
        workers: number of environment processes; 0 plays in this process, one episode at a time.
        start_worker: function that starts a worker; see `envs.rollout.ray_worker` for workers in a cluster.
        settings: see `RolloutSettings`.
        choose_video: function that gets each result without an error, and returns the path for its video, or None. To
            film, the episode's actions are played again: only filmed episodes cost time, and no measurement changes.
        stop_if_all_fail: raise EveryEpisodeFailsError, instead of trying every episode, if the first episodes of all
            workers, and at least two, end in the same error.
        player: function that builds what plays the episodes; None: `Player`.

    Raises:
        ValueError: policy, suite and settings do not fit together.
        EveryEpisodeFailsError: see `stop_if_all_fail`; raised while playing.
        RuntimeError: the environment cannot be built.

    Closing the iterator, or an exception in it (Ctrl-C), ends the workers.
    """
    settings = settings or RolloutSettings()
    check_workers(workers)
    for spec in episodes:
        if max(spec.task, spec.asked if isinstance(spec.asked, int) else 0) >= len(suite.tasks):
            raise ValueError(f"suite {suite.name!r} has tasks 0 to {len(suite.tasks) - 1}; {spec} asks for another one")
        if spec.perturbation is not None:
            suite.magnitudes(spec.perturbation)
    start = LocalWorker if workers == 0 else start_worker
    loop = _Loop(policy, suite, episodes, max(workers, 1), start, settings, stop_if_all_fail, player)
    return _run(loop, choose_video)


def _run(loop: _Loop, choose_video: Callable[[EpisodeResult], Path | None] | None) -> Iterator[EpisodeResult]:
    try:
        loop.start()
        yield from loop.run(choose_video)
    finally:
        loop.close()


@dataclass
class _Slot:
    """One worker, with its present episode and the measurements of that episode."""

    worker: Worker
    spec: EpisodeSpec | None = None
    attempt: int = 1
    started: float = 0.0
    asked_at: float = field(default_factory=time.perf_counter)
    inference_ms: list[float] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    planned: list[np.ndarray] = field(default_factory=list)  # actions of the episode, [T,A] each
    observed: Observed | None = None  # the worker waits for a chunk
    result: EpisodeResult | None = None  # the episode is over and is being filmed
    idle: bool = False
    failed: bool = False  # its first episode ended in an error

    def send(self, request: PlayerRequest) -> None:
        self.asked_at = time.perf_counter()
        self.worker.send(request)


class _Loop:
    """The state of one rollout."""

    def __init__(
        self,
        policy: Policy,
        suite: Suite,
        episodes: Sequence[EpisodeSpec],
        workers: int,
        start_worker: Callable[[PlayerSettings], Worker],
        settings: RolloutSettings,
        stop_if_all_fail: bool,
        player: Callable[[PlayerSettings], Player] | None,
    ) -> None:
        embodiment = policy.embodiment
        waiting_action_A = np.zeros(embodiment.action_dim, np.float32)
        waiting_action_A[list(embodiment.grippers)] = embodiment.gripper_open
        self._policy = policy
        self._suite = suite
        self._settings, self._warned = settings, False
        self._chunker = settings.chunker(embodiment.chunk, embodiment.control_hz)
        self._queue = deque((spec, 1) for spec in episodes)
        self._player_settings = PlayerSettings(
            make=suite.make,
            suite=suite.name,
            instructions=tuple(task.instruction for task in suite.tasks),
            image_size=max(max(camera.height, camera.width) for camera in embodiment.cameras),
            cameras=embodiment.camera_names,
            max_steps=settings.max_steps or suite.max_steps,
            waiting_steps=settings.waiting_steps,
            waiting_action=waiting_action_A,
            video_size=settings.video_size,
            fps=embodiment.control_hz,
            player=player,
        )
        self._start_worker = start_worker
        self._workers = min(workers, len(episodes))
        self._slots: list[_Slot] = []
        # `_built`: an environment could be built. `_lost_starts`: workers that died before they had built theirs.
        self._built, self._lost_starts = False, 0
        self._failures = FirstFailures(suite.name) if stop_if_all_fail else None
        self._inference_s = 0.0  # duration of the last batch

    def start(self) -> None:
        for _ in range(self._workers):
            self._slots.append(_Slot(self._start_worker(self._player_settings)))

    def close(self) -> None:
        for slot in self._slots:
            slot.worker.close()

    def run(self, choose_video: Callable[[EpisodeResult], Path | None] | None) -> Iterator[EpisodeResult]:
        self._policy.reset()
        while not all(slot.idle for slot in self._slots):
            for slot, reply in self._replies():
                match reply:
                    case Ready():
                        self._check(reply)
                        self._built = True
                        self._next_episode(slot)
                    case Observed():
                        slot.observed, slot.asked_at = reply, time.perf_counter()
                        if reply.anew:
                            self._begin(slot)
                    case Finished():
                        self._failures = None  # one episode could be played
                        result = self._result(slot, reply)
                        path = choose_video(result) if choose_video else None
                        if path is None:
                            yield result
                            self._next_episode(slot)
                        else:
                            slot.result = result
                            slot.send(Record(path, result.success))
                    case Recorded(path):
                        assert slot.result is not None, "only a finished episode is filmed"
                        yield replace(slot.result, video=str(path))
                        self._next_episode(slot)
                    case Failed():
                        yield from self._failed(slot, reply)
            if self._patience() <= 0:
                waiting = [slot for slot in self._slots if slot.observed is not None]
                yield from self._act(waiting[: self._settings.largest_batch])

    def _patience(self) -> float:
        since = [slot.asked_at for slot in self._slots if slot.observed is not None]
        if len(since) >= (self._settings.largest_batch or len(self._slots)):
            return 0.0
        busy = sum(not slot.idle for slot in self._slots)
        return patience(since, busy, self._inference_s, time.perf_counter()) if since else 1.0

    def _replies(self) -> list[tuple[_Slot, PlayerReply]]:
        """Return all replies that have arrived. Wait for the first one, but not longer than `_patience` allows."""
        playing = [slot for slot in self._slots if not slot.idle and slot.observed is None]
        connections = [slot.worker.connection for slot in playing if slot.worker.connection is not None]
        if not connections:
            return [(slot, slot.worker.receive()) for slot in playing]
        while (left := self._patience()) > 0:
            ready = set(map(id, wait(connections, timeout=min(left, 1.0))))
            if ready:
                return [(slot, slot.worker.receive()) for slot in playing if id(slot.worker.connection) in ready]
            for slot in playing:
                if time.perf_counter() - slot.asked_at > self._settings.timeout_s:
                    _log.warning("a worker has not answered for %.0f s and is ended", self._settings.timeout_s)
                    slot.worker.kill()
        return []

    def _check(self, ready: Ready) -> None:
        said = _misfit(self._policy.embodiment, self._suite.name, ready, self._settings.same_rate)
        if said is not None and not self._warned:
            _log.warning("%s", said)
        self._warned |= said is not None

    def _next_episode(self, slot: _Slot) -> None:
        slot.spec = slot.result = None
        if not self._queue:
            slot.idle = True
            return
        slot.spec, slot.attempt = self._queue.popleft()
        slot.started = time.perf_counter()
        self._begin(slot)
        slot.send(Play(slot.spec))

    def _begin(self, slot: _Slot) -> None:
        slot.inference_ms, slot.batch, slot.planned = [], [], []
        self._chunker.reset(id(slot))
        begin_episode(self._policy, [id(slot)])

    def _act(self, waiting: list[_Slot]) -> Iterator[EpisodeResult]:
        seen = [slot.observed for slot in waiting if slot.observed is not None]
        observation = Observation(
            images={name: np.stack([o.images[name] for o in seen]) for name in seen[0].images},
            state=np.stack([o.state for o in seen]),
            instruction=[o.instruction for o in seen],
            slots=[id(slot) for slot in waiting],
            committed=self._committed(waiting),
        )
        started = time.perf_counter()
        chunks_NKA = np.asarray(self._policy.act(observation).actions, np.float32)
        self._inference_s = time.perf_counter() - started
        planned_NTA = self._chunker.plan([id(slot) for slot in waiting], chunks_NKA)
        finite_N = np.isfinite(planned_NTA).all(axis=(1, 2))
        for slot, planned_TA, finite in zip(waiting, planned_NTA, finite_N, strict=True):
            slot.observed = None
            slot.planned.append(planned_TA)
            if finite:  # send everything first, so that no environment waits for the bookkeeping
                slot.send(Advance(planned_TA))
        for slot, finite in zip(waiting, finite_N, strict=True):
            slot.inference_ms.append(self._inference_s * 1e3)
            slot.batch.append(len(waiting))
            if not finite:
                text = "the policy answered with NaN or infinite actions"
                self._note_failure(slot, text)
                yield self._error(slot, text)
                self._next_episode(slot)

    def _committed(self, waiting: list[_Slot]) -> list[Committed | None] | None:
        if not (self._settings.committed and isinstance(self._chunker, Late) and reads_committed(self._policy)):
            return None
        return [self._chunker.committed(id(slot)) for slot in waiting]

    def _failed(self, slot: _Slot, reply: Failed) -> Iterator[EpisodeResult]:
        if reply.mistake is not None:
            raise reply.mistake
        if slot.spec is not None and slot.result is None:
            self._note_failure(slot, reply.text)
        if slot.spec is None:
            self._lost_starts += reply.died
            if not (reply.died and self._built and self._lost_starts < ATTEMPTS * len(self._slots)):
                # The environment cannot even be built, so every episode would fail in the same way.
                raise RuntimeError(f"the environment of suite {self._suite.name!r} cannot be built:\n{reply.text}")
            _log.warning("a worker was lost while it started: %s", last_line(reply.text))
        elif slot.result is not None:
            _log.warning("no video of %s: %s", slot.spec, last_line(reply.text))
            yield slot.result
        elif slot.attempt < ATTEMPTS:
            _log.warning("%s is started again after an error: %s", slot.spec, last_line(reply.text))
            self._queue.append((slot.spec, slot.attempt + 1))
        else:
            yield self._error(slot, reply.text)
        if reply.died:
            slot.worker.close()
            slot.worker, slot.spec, slot.result = self._start_worker(self._player_settings), None, None
            slot.asked_at = time.perf_counter()
        else:
            self._next_episode(slot)
        if self._queue:  # an episode to repeat has come back after other workers ran out of work
            for other in self._slots:
                if other.idle:
                    other.idle = False
                    self._next_episode(other)

    def _note_failure(self, slot: _Slot, text: str) -> None:
        """Raise EveryEpisodeFailsError if each worker has failed for the same reason, and nothing could be played.

        A worker that still builds its environment has no say: it may take longer than all episodes of another one.
        """
        slot.failed = True
        if self._failures is not None and slot.spec is not None:
            self._failures.add(slot.spec, text)
            if all(other.failed or other.idle or other.spec is None for other in self._slots):
                self._failures.check()

    def _result(self, slot: _Slot, finished: Finished) -> EpisodeResult:
        assert slot.spec is not None, "only a started episode finishes"
        return EpisodeResult(
            task=slot.spec.task,
            initial_state=slot.spec.initial_state,
            seed=slot.spec.seed,
            attempts=slot.attempt,
            wall_s=time.perf_counter() - slot.started,
            inference_ms=tuple(slot.inference_ms),
            batch=tuple(slot.batch),
            seam=self._seam(slot.planned, finished.steps),
            noticed=self._policy.noticed(id(slot)) if isinstance(self._policy, Watching) else None,
            **asdict(finished),
        )

    def _seam(self, planned: list[np.ndarray], steps: int) -> float | None:
        """Return how much larger the change of the action is where a chunk begins to decide than elsewhere."""
        if not planned:  # the player needed no action
            return None
        moving = np.ones(self._policy.embodiment.action_dim, bool)
        moving[list(self._policy.embodiment.grippers)] = False
        actions_TA = np.concatenate(planned)[:steps, moving]
        change_T = np.linalg.norm(np.diff(actions_TA, axis=0), axis=1)  # entry t: from action t to t + 1
        seam_T = (np.arange(1, len(actions_TA)) - self._chunker.delay) % self._chunker.steps == 0
        seam_T[: max(0, self._chunker.steps + self._chunker.delay - 1)] = False  # the first chunk is not late
        rest = change_T[~seam_T].mean() if (~seam_T).any() else 0.0
        return float(change_T[seam_T].mean() / rest) if seam_T.any() and rest > 0 else None

    def _error(self, slot: _Slot, text: str) -> EpisodeResult:
        assert slot.spec is not None, "an error belongs to an episode"
        return EpisodeResult(
            task=slot.spec.task,
            initial_state=slot.spec.initial_state,
            seed=slot.spec.seed,
            asked=slot.spec.asked if isinstance(slot.spec.asked, int) else None,
            error=text,
            attempts=slot.attempt,
            wall_s=time.perf_counter() - slot.started,
        )


def patience(waiting_since: Sequence[float], playing: int, inference_s: float, now: float) -> float:
    """Return the seconds to wait for a larger batch; 0 or less: act now.

    If half of the environments wait, act now: then the policy and the environments never wait for each other. If fewer
    wait, wait at most as long as an inference takes: this costs at most twice as much as the better choice.

    Args:
        waiting_since: times at which the waiting environments began to wait, in seconds; at least one.
        playing: number of environments that have work, including those that wait.
        inference_s: duration of the last batch in seconds.
        now: present time on the same clock.
    """
    return 0.0 if 2 * len(waiting_since) >= playing else min(waiting_since) + inference_s - now
