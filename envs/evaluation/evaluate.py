"""Evaluate a policy on a suite with a protocol: play the episodes, and write report, data and videos to a folder."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.evaluation.episode_log import (
    REPORT,
    RUN,
    EpisodeLog,
    VideoChoice,
    check_fingerprint,
    check_simulators,
    check_videos,
    read_run,
)
from cogvla.envs.evaluation.perturbed import PICTURE, first_images
from cogvla.envs.evaluation.protocol import MEASURED, EvaluationProtocol
from cogvla.envs.evaluation.report import Report, build_report, render_html, report_json
from cogvla.envs.evaluation.statistics import latency
from cogvla.envs.evaluation.watched_policy import WatchedPolicy
from cogvla.envs.perturbation.perturbation import Perturbation
from cogvla.envs.rollout.failures import EveryEpisodeFailsError
from cogvla.envs.rollout.player import PlayerSettings
from cogvla.envs.rollout.rollout import check_fit, check_workers, rollout, warn_of_unknown_words
from cogvla.envs.rollout.workers import ProcessWorker, Worker
from cogvla.envs.suite import Suite, get_suite
from cogvla.files import write_atomic
from cogvla.policy.interface import Embodiment, Observation, Policy, reads_committed
from cogvla.policy.provenance import provenance

ERROR = "error.txt"
MEASURED_MS = "measured_latency_ms"
"""Key of a session that has measured the latency: what it has found."""
PROBE_CALLS = 100
"""Number of calls of `Policy.act` that measure the latency at batch size 1."""


def evaluate(
    policy: Policy,
    suite: Suite | str,
    protocol: EvaluationProtocol,
    output: Path | str,
    *,
    workers: int = 2,
    start_worker: Callable[[PlayerSettings], Worker] = ProcessWorker,
    tasks: Sequence[int] | None = None,
    asked: Literal["swap"] | None = None,
    perturbation: Perturbation | None = None,
    shard: tuple[int, int] = (1, 1),
    videos: int = 2,
    resume: bool = True,
    command: str = "",
    identity: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Report:
    """Play the protocol's episodes and write `report.html`, `report.json`, `episodes.parquet` and videos.

    Every finished episode is on disk at once (`episodes.jsonl`). Another call with the same policy, suite and protocol
    plays only the missing episodes: after a crash, or with more tasks or more episodes for each task.

    Args:
        policy: the policy to evaluate.
        suite: a suite, or its name.
        protocol: the evaluation protocol.
        output: folder of this evaluation.
        workers: number of environment processes; 0 plays in this process.
        start_worker: function that starts an environment process, see `rollout`.
        tasks: indices of the tasks to play; None: all.
        asked: "swap" gives another instruction that is possible in the same scene, and measures success on both tasks.
        perturbation: how all episodes differ from training; None: not at all.
        shard: (i, n) plays every n-th episode from the i-th on, i in 1..n.
        videos: number of videos for each task, failures first.
        resume: False deletes earlier results in `output`.
        command: command line that repeats this evaluation, for the report.
        identity: additions to the policy's description that identify its weights.
        progress: show a bar with the present success rate.

    Raises:
        ValueError: the suite is unknown, the protocol does not fit the suite or the policy, or `output` holds results
            of another configuration.
        EveryEpisodeFailsError: the first episodes of all workers end in the same error, which `error.txt` then holds.
    """
    suite = get_suite(suite) if isinstance(suite, str) else suite
    output = Path(output)
    specs = protocol.episodes(suite, tasks, asked, shard)
    if perturbation is not None:
        specs = [replace(spec, perturbation=perturbation) for spec in specs]
    embodiment: Embodiment = policy.embodiment
    settings = protocol.for_suite(suite)
    before = read_run(output)[1] if resume and (output / RUN).exists() else []
    measured: dict[str, float] = {}
    if settings.latency == MEASURED:
        known = [each[MEASURED_MS] for each in before if MEASURED_MS in each]  # a resumed evaluation has one latency
        found = known[0] if known else _measured_latency(policy, suite, specs[0], settings, min(workers, 1))
        measured, settings = {MEASURED_MS: found}, replace(settings, latency=found)
    settings = _with_steps(settings, embodiment)
    if settings.latency and settings.committed and not reads_committed(policy):
        print(f"{suite.name}: this policy ignores committed actions: it does not know what is executed meanwhile")
    fingerprint = _fingerprint(policy, suite, settings, asked, perturbation, identity)
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        **provenance(),
        **measured,
    }
    check_simulators([*before, session], f"choose another output, or delete {output}")
    unknown = warn_of_unknown_words(policy, suite, sorted({spec.task for spec in specs}))
    precision = getattr(policy, "choice", None)  # how engine.dtype=auto has chosen; times differ from run to run
    chosen = {} if precision is None else {"precision": str(precision)}

    with EpisodeLog(output, fingerprint, session, resume) as log:
        (output / ERROR).unlink(missing_ok=True)
        missing = [spec for spec in specs if (spec.task, spec.initial_state) not in log.results]
        choice = VideoChoice(log, videos)
        # The first calls compile and allocate memory; the latency of the control loop must not include that.
        for batch in sorted({1, max(workers, 1)}):
            policy.warm_up(batch, [task.instruction for task in suite.tasks])
        started = time.perf_counter()
        results = rollout(
            policy,
            suite,
            missing,
            workers=workers,
            start_worker=start_worker,
            settings=settings.rollout_settings(),
            choose_video=choice,
            stop_if_all_fail=not log.results,
        )
        with closing(results), _Progress(log, specs, progress) as bar:  # type: ignore[type-var]
            try:
                for result in results:
                    log.append(result)
                    bar.show(result)
            except EveryEpisodeFailsError as error:
                write_atomic(output / ERROR, error.text)
                error.args = (f"{error}; all of it is in {output / ERROR}",)
                raise
        wall_s = time.perf_counter() - started
        choice.prune()
        if perturbation is not None and not (output / PICTURE).exists():
            picture = first_images(policy, suite, specs[0], settings.rollout_settings(), min(workers, 1))
            if picture is not None:
                write_atomic(output / PICTURE, picture)

        report = build_report(
            suite=suite,
            results=[log.results[spec.task, spec.initial_state] for spec in specs],
            batch_1_ms=_probe(policy, suite, specs[0], settings, min(workers, 1)),
            control_hz=embodiment.control_hz,
            reproduce={
                "protocol": asdict(replace(settings, name=protocol.name)),
                "asked": fingerprint["asked"],
                "unknown_words": unknown,
                "perturbation": "none" if perturbation is None else str(perturbation),
                "magnitudes": {} if perturbation is None else suite.magnitudes(perturbation),
                "policy": fingerprint["policy"],
                "simulation": dict(suite.settings),
                "command": command,
                "workers": workers,
                "run": {"episodes": len(missing), "seconds": wall_s, **chosen},
                **{key: session[key] for key in ("started", "versions", "commit", "machine")},
                "sessions": len(log.sessions),
                "commits": sorted({str((s.get("commit") or {}).get("hash")) for s in log.sessions}),
                **({} if shard == (1, 1) else {"shard": list(shard)}),
            },
        )
        write_report(report, suite, output)
    return report


def check_evaluation(
    suite: Suite,
    protocol: EvaluationProtocol,
    *,
    workers: int,
    videos: int = 0,
    tasks: Sequence[int] | None = None,
    shard: tuple[int, int] = (1, 1),
    robot: Embodiment | None = None,
    builds: bool = True,
) -> None:
    """Check arguments of `evaluate` before there is a policy, so that a mistake is not said only after a training.

    Args:
        suite: see `evaluate`, as for all of these but the last two.
        protocol: how to evaluate.
        workers: number of environment processes.
        videos: number of videos.
        tasks: task indices; None: all.
        shard: (i, n), the part of the episodes.
        robot: robot of the policy; None: not yet known.
        builds: this machine can build the suite's environment, which is then asked for cameras, state and action.

    Raises:
        ValueError: one is out of its range, or they do not fit each other.
    """
    protocol.episodes(suite, tasks, None, shard)
    check_workers(workers)
    check_videos(videos)
    if robot is not None:
        if builds:
            check_fit(robot, suite)
        protocol.for_suite(suite).rollout_settings().chunker(robot.chunk, robot.control_hz)


def check_results(
    policy: Policy,
    suite: Suite,
    protocol: EvaluationProtocol,
    output: Path,
    *,
    asked: Literal["swap"] | None = None,
    perturbation: Perturbation | None = None,
    identity: Mapping[str, str] | None = None,
) -> None:
    """Check that `evaluate` can go on in a folder, before other suites are played first. Arguments: see `evaluate`.

    Raises:
        ValueError: the folder holds results of another configuration. A latency that is measured is not compared yet.
    """
    if not (output / RUN).exists():
        return
    known, sessions = read_run(output)
    settings = protocol.for_suite(suite)
    if settings.latency == MEASURED:
        settings = replace(settings, latency=known.get("protocol", {}).get("latency", 0.0))
    settings = _with_steps(settings, policy.embodiment)
    check_fingerprint(output, known, _fingerprint(policy, suite, settings, asked, perturbation, identity))
    check_simulators([*sessions, provenance()], f"choose another output, or delete {output}")


def _fingerprint(
    policy: Policy,
    suite: Suite,
    settings: EvaluationProtocol,
    asked: str | None,
    perturbation: Perturbation | None,
    identity: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Return everything that changes the numbers, see `EpisodeLog`."""
    magnitudes = {} if perturbation is None else suite.magnitudes(perturbation)  # results of other ones are not mixed
    return {
        "suite": suite.name,
        "asked": asked or "own task",
        "protocol": _decisive(settings),
        "policy": {**policy.describe(), **(identity or {})},
        **({"simulation": dict(suite.settings)} if suite.settings else {}),
        **({} if perturbation is None else {"perturbation": {"cell": str(perturbation), **magnitudes}}),
    }


def _with_steps(settings: EvaluationProtocol, robot: Embodiment) -> EvaluationProtocol:
    """Return a protocol that names the number of actions to execute of each chunk."""
    chunker = settings.rollout_settings().chunker(robot.chunk, robot.control_hz)
    return replace(settings, execute_steps=chunker.steps)


def _decisive(protocol: EvaluationProtocol) -> dict[str, Any]:
    """Return what changes an episode's result; without a latency, as evaluations were described that knew of none."""
    without = {"name", "episodes_per_task"} | (set() if protocol.latency else {"latency", "overlap", "committed"})
    return {key: value for key, value in asdict(protocol).items() if key not in without}


def _measured_latency(
    policy: Policy, suite: Suite, spec: EpisodeSpec, protocol: EvaluationProtocol, workers: int
) -> float:
    """Return the 95th percentile of the policy's latency in ms, rounded up to control steps.

    Raises:
        ValueError: no episode can be played.
    """
    policy.warm_up(1, [task.instruction for task in suite.tasks])
    measured = latency(_probe(policy, suite, spec, protocol, workers))
    if measured is None:
        raise ValueError(f"latency={MEASURED}: the first episode of {suite.name} cannot be played; give milliseconds")
    period_ms = 1000 / policy.embodiment.control_hz
    found = math.ceil(measured.p95 / period_ms) * period_ms
    print(f"{suite.name}: a call takes {measured.p95:.1f} ms (p95), so latency={found:g} ms")
    return found


def write_report(report: Report, suite: Suite, output: Path) -> None:
    """Write `episodes.parquet`, `report.json` and `report.html`."""
    html, body, table = REPORT
    write_parquet(output / table, report.episodes, suite)
    write_atomic(output / body, report_json(report))
    write_atomic(output / html, render_html(report, output))


class _Progress:
    """Progress bar over all episodes, with the present success rate."""

    def __init__(self, log: EpisodeLog, specs: Sequence[EpisodeSpec], show: bool) -> None:
        done = [log.results[key] for s in specs if (key := (s.task, s.initial_state)) in log.results]
        self._successes = sum(r.success for r in done)
        self._played, self._errors = len(done), 0
        self._bar = tqdm(
            total=len(specs), initial=len(done), unit="episode", disable=not show, dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )  # fmt: skip

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, result: EpisodeResult) -> None:
        self._errors += result.error is not None
        self._played += result.error is None
        self._successes += result.success
        text = f"success {self._successes / self._played:.1%}" if self._played else "no result yet"
        self._bar.set_postfix_str(text + (f", {self._errors} errors" if self._errors else ""), refresh=False)
        self._bar.update()


def _probe(policy: Policy, suite: Suite, spec: EpisodeSpec, protocol: EvaluationProtocol, workers: int) -> list[float]:
    """Measure `PROBE_CALLS` calls of the policy with one observation each, in milliseconds, while nothing else runs.

    The observations come from a separate episode, so that a resumed evaluation measures the same.
    """
    observations: list[Observation] = []
    watched = WatchedPolicy(policy, observations.append)
    settings = protocol.rollout_settings()
    settings = replace(settings, max_steps=min(settings.max_steps or 40, 40))
    for result in rollout(watched, suite, [spec], workers=workers, settings=settings):
        if result.error is not None or not observations:
            return []
    return list(_timed_calls(policy, observations))


def _timed_calls(policy: Policy, observations: Sequence[Observation]) -> Iterator[float]:
    for call in range(PROBE_CALLS):
        started = time.perf_counter()
        policy.act(observations[call % len(observations)])
        yield (time.perf_counter() - started) * 1e3


def write_parquet(path: Path, episodes: Sequence[EpisodeResult], suite: Suite) -> None:
    """Write the episodes as Parquet: one row for each episode; lists hold one value for each chunk."""
    rows: list[Mapping[str, Any]] = [
        {
            "suite": suite.name,
            "task_name": suite.tasks[r.task].name,
            **r.to_dict(),
            "perturbation": None if r.perturbation is None else json.dumps(r.perturbation),
            "alarm": None if r.noticed is None else r.noticed["alarm"],
        }
        for r in episodes
    ]
    schema = pa.schema(
        [
            ("suite", pa.string()), ("task_name", pa.string()), ("task", pa.int32()), ("initial_state", pa.int32()),
            ("seed", pa.int64()), ("asked", pa.int32()), ("instruction", pa.string()), ("success", pa.bool_()),
            ("scene_task_success", pa.bool_()), ("steps", pa.int32()), ("reward", pa.float64()), ("error", pa.string()),
            ("attempts", pa.int32()), ("reset_s", pa.float64()), ("environment_s", pa.float64()),
            ("wall_s", pa.float64()), ("inference_ms", pa.list_(pa.float64())), ("loop_ms", pa.list_(pa.float64())),
            ("batch", pa.list_(pa.int32())), ("video", pa.string()),
            ("seam", pa.float64()), ("perturbation", pa.string()), ("alarm", pa.string()),
        ]
    )  # fmt: skip
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema), buffer)
    write_atomic(path, buffer.getvalue().to_pybytes())
