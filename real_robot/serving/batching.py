"""Dynamic batching: answer requests that arrive together with one forward pass, in one inference thread.

    connections:   a       b   c          d
                   |       |   |          |
    queue:         [a]    [a, b, c] wait until max_batch, batch_wait_ms, or every client has asked
    worker:                 act([a, b, c])          act([d])

Shape legend: B batch, K chunk, A action.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from cogvla.policy.interface import InstructionError, Observation, Policy, begin_episode, end_episode
from cogvla.real_robot.serving.quiet_log import QuietLog
from cogvla.real_robot.serving.server_metrics import ServerMetrics

LONG_TEXT = 200
"""Characters of an instruction that shares no batch with shorter ones, which would be padded to its length."""

LONGEST_MS = 1e9
"""Longest wait for others; Python cannot wait for ever, nor for 300 years."""


class ExpiredError(Exception):
    """The deadline of a request passed before its forward pass, so the policy did not compute it."""


class PolicyError(RuntimeError):
    """The policy raised an exception, or answered with actions that no robot may execute (wrong shape, NaN)."""


@dataclass(frozen=True)
class BatchSettings:
    """Settings that decide when a forward pass starts.

    Attributes:
        max_batch: maximum number of requests in one forward pass.
        batch_wait_ms: maximum time in milliseconds that the first request of a batch waits for others.
    """

    max_batch: int = 8
    batch_wait_ms: float = 2.0

    def __post_init__(self) -> None:
        if self.max_batch < 1 or not 0 <= self.batch_wait_ms <= LONGEST_MS:
            raise ValueError(f"max_batch must be at least 1 and batch_wait_ms 0 to {LONGEST_MS:g}, got {self!r}")


@dataclass(frozen=True)
class BatchAnswer:
    """Answer to one request.

    Attributes:
        actions_KA: float32 [K,A] in physical units, all finite.
        timing: milliseconds per stage as reported by the policy.
        infer_ms: duration of the forward pass, in milliseconds.
        queue_ms: time in the queue before the forward pass, in milliseconds.
        batch: number of requests in the forward pass.
    """

    actions_KA: np.ndarray
    timing: Mapping[str, float]
    infer_ms: float
    queue_ms: float
    batch: int


@dataclass(frozen=True, eq=False)
class _Job:
    observation: Observation
    deadline: float | None
    slot: Hashable = None
    episode: Hashable = None
    arrived: float = field(default_factory=time.monotonic)
    future: Future[BatchAnswer] = field(default_factory=Future)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Image shapes of the request, and whether its text is long; only requests with the same can share a batch."""
        text = (len(self.observation.instruction[0]) > LONG_TEXT,)
        return (text, *(image.shape for image in self.observation.images.values()))


class Batcher:
    """Queue of requests, and the only thread that calls the policy.

    Args:
        policy: policy that answers the requests.
        settings: batch size and waiting time.
        metrics: counters that this object updates.
        log: where failures of the policy are written.

    Attributes:
        ready: future that is done after the warm-up; it holds the exception if the warm-up failed.
    """

    def __init__(
        self, policy: Policy, settings: BatchSettings, metrics: ServerMetrics, log: QuietLog | None = None
    ) -> None:
        self._policy, self._settings, self._metrics = policy, settings, metrics
        self._log = log or QuietLog()
        self._condition = threading.Condition()
        self._waiting: list[_Job] = []
        self._closed = False
        self._clients = 0
        self._begun: dict[Hashable, Hashable] = {}  # slot -> its episode; only the inference thread uses it
        self._gone: list[Hashable] = []
        metrics.queue.set_function(lambda: len(self._waiting))
        self.ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Start the inference thread. It warms the policy up first; wait for `ready`."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """True after a successful warm-up, while the inference thread runs."""
        return self.ready.done() and self.ready.exception() is None and self._thread.is_alive() and not self._closed

    def count_clients(self, clients: int) -> None:
        """Set the number of connected clients. When all of them have asked, a batch starts without waiting."""
        with self._condition:
            self._clients = clients
            self._condition.notify()

    def forget(self, slot: Hashable) -> None:
        """Let a policy that remembers forget the robot of this slot, which sends no more requests."""
        with self._condition:
            self._gone.append(slot)

    def submit(
        self,
        observation: Observation,
        deadline: float | None = None,
        slot: Hashable = None,
        episode: Hashable = None,
    ) -> Future[BatchAnswer]:
        """Queue an observation and return the future of its answer. Cancel the future to withdraw the request.

        Args:
            observation: batch size 1, already validated.
            deadline: `time.monotonic()` after which the request fails with `ExpiredError`; None for no deadline.
            slot: whose observation it is, for policies that remember an episode; one request at a time. None: of a
                robot of its own, whose episode begins.
            episode: a value for each episode of the slot; with another one, the policy begins anew.

        Raises:
            PolicyError: the server is shutting down. The future raises it, too, if the policy fails, and
                InstructionError if the policy cannot read the instruction.
        """
        job = _Job(observation, deadline, object() if slot is None else slot, episode)
        if slot is None:
            job.future.add_done_callback(lambda _: self.forget(job.slot))
        with self._condition:
            if self._closed:
                raise PolicyError("the server is shutting down")
            self._waiting.append(job)
            self._condition.notify()
        return job.future

    def close(self, timeout_s: float = 5.0) -> None:
        """Drop the waiting requests, finish the running forward pass and end the thread."""
        with self._condition:
            self._closed = True
            dropped, self._waiting = self._waiting, []
            self._condition.notify()
        for job in dropped:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(PolicyError("the server is shutting down"))
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._warm_up()
        except Exception as error:  # raised by `ready.result()`
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        while jobs := self._collect():
            self._answer([job for job in jobs if self._wanted(job)])

    def _warm_up(self) -> None:
        """Run every batch size once, because the first pass of a size compiles and allocates memory."""
        sizes = {self._settings.max_batch} | {2**i for i in range(self._settings.max_batch.bit_length())}
        for size in sorted(s for s in sizes if s <= self._settings.max_batch):
            if not self._closed:
                self._policy.warm_up(size)

    def _collect(self) -> list[_Job]:
        """Wait for the next batch: the oldest request and those with the same image shapes. Empty when closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            until = self._waiting[0].arrived + self._settings.batch_wait_ms / 1e3
            while len(self._waiting) < min(self._settings.max_batch, self._clients) and not self._closed:
                left = until - time.monotonic()
                if left <= 0 or not self._condition.wait(left):
                    break
            if not self._waiting:  # closed meanwhile
                return []
            fitting = [job for job in self._waiting if job.shapes == self._waiting[0].shapes]
            jobs = fitting[: self._settings.max_batch]
            self._waiting = [job for job in self._waiting if job not in jobs]
            return jobs

    def _begin(self, jobs: Sequence[_Job]) -> None:
        """Tell the policy which slots are gone, and which begin an episode."""
        with self._condition:
            gone, self._gone = self._gone, []
        end_episode(self._policy, [slot for slot in gone if self._begun.pop(slot, self) is not self])
        new = [job for job in jobs if self._begun.get(job.slot, self) != job.episode]
        begin_episode(self._policy, [job.slot for job in new])
        self._begun |= {job.slot: job.episode for job in new}

    @staticmethod
    def _wanted(job: _Job) -> bool:
        if not job.future.set_running_or_notify_cancel():
            return False
        if job.deadline is not None and time.monotonic() > job.deadline:
            job.future.set_exception(ExpiredError("the deadline passed before the request was computed"))
            return False
        return True

    def _answer(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        started = time.monotonic()
        try:
            self._begin(jobs)
            seen = Observation.stack([job.observation for job in jobs])
            chunk = self._policy.act(replace(seen, slots=[job.slot for job in jobs]))
            actions_BKA = np.asarray(chunk.actions, np.float32)
            embodiment = self._policy.embodiment
            expected = (len(jobs), embodiment.chunk, embodiment.action_dim)
            if actions_BKA.shape != expected:
                raise PolicyError(f"the policy answered with shape {actions_BKA.shape}, not {expected}")
        except Exception as error:
            if len(jobs) > 1:  # one request may be at fault: compute each alone, so that the others get their answer
                for job in jobs:
                    self._answer([job])
                return
            if isinstance(error, InstructionError):
                jobs[0].future.set_exception(error)
                return
            self._log.exception("the policy failed")
            failed = PolicyError("the policy failed; the server's log says why")
            failed.__cause__ = error
            jobs[0].future.set_exception(failed)
            return
        infer_s = time.monotonic() - started
        self._metrics.inference.observe(infer_s)
        self._metrics.batch.observe(len(jobs))
        for job, actions_KA in zip(jobs, actions_BKA, strict=True):
            if np.isfinite(actions_KA).all():
                queue_ms = 1e3 * (started - job.arrived)
                job.future.set_result(BatchAnswer(actions_KA, chunk.timing, 1e3 * infer_s, queue_ms, len(jobs)))
            else:
                self._log.error("the policy answered with NaN or infinite actions")
                job.future.set_exception(PolicyError("the policy answered with NaN or infinite actions"))
