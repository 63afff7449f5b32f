"""Build the report of an evaluation: numbers (`Report`, JSON) and one self-contained HTML file."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from cogvla.envs.episodes import EpisodeResult
from cogvla.envs.evaluation.perturbed import PICTURE, drawn_values
from cogvla.envs.evaluation.plots import latency_curves, length_histogram
from cogvla.envs.evaluation.statistics import Latency, Rate, latency, success_rate
from cogvla.envs.rollout.video import contact_sheet
from cogvla.envs.suite import Suite

MANY_ERRORS = 0.03
"""Share of episodes with errors above which console and report warn."""
EMBED_BYTES = 6_000_000
"""Bytes of videos that the HTML file embeds; it links to the other videos."""


@dataclass(frozen=True)
class TaskSummary:
    """Results of one task, or of all tasks. No rate includes errors, the episodes that could not be played.

    Attributes:
        name, instruction: name and instruction of the task.
        success: success rate on the task of the instruction.
        scene_task: success rate on the scene's own task with a swapped instruction; no trials without a swap.
        errors: number of episodes that ended in an error.
        repeated: number of episodes that needed a second attempt.
        steps: mean control steps of all episodes.
        steps_to_success: mean control steps of the successful episodes.
        inference: wall time of `Policy.act`, one sample for each chunk.
        loop: time from the finished observation to the first action, one sample for each chunk.
        seam: mean of `EpisodeResult.seam`.
        unknown_words: words of the instruction that the policy does not know; in total, those of all tasks.
    """

    name: str
    instruction: str
    success: Rate
    scene_task: Rate
    errors: int
    repeated: int
    steps: float | None
    steps_to_success: float | None
    inference: Latency | None
    loop: Latency | None
    seam: float | None = None
    unknown_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class ControlTiming:
    """Timing of a robot's control loop.

    Attributes:
        jitter: difference between the time of a tick and the control period, one sample for each tick.
        counts: counters of `cogvla.real_robot.control.measurements`: holds, deadline misses, starvations, faults etc.
    """

    jitter: Latency | None
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """All results of an evaluation.

    Attributes:
        suite: name of the suite.
        tasks: results of each task.
        total: results of all tasks together.
        inference_batch_1: latency of `Policy.act` with one observation while nothing else runs.
        batch_1_ms: its samples in ms.
        chunk_ms: duration of the executed part of a chunk on the robot, in ms; the loop must be faster.
        batch: batch size -> number of chunks computed in batches of that size.
        environment_ms: mean time of one control step in the environment, with rendering, in ms.
        max_steps: number of control steps after which an episode is a failure.
        reproduce: everything that repeats this evaluation.
        episodes: results of all episodes.
        control: timing of a robot in real time; None for rollouts, which wait for the policy.
    """

    suite: str
    tasks: tuple[TaskSummary, ...]
    total: TaskSummary
    inference_batch_1: Latency | None
    batch_1_ms: tuple[float, ...]
    chunk_ms: float
    batch: Mapping[int, int]
    environment_ms: float | None
    max_steps: int
    reproduce: Mapping[str, Any]
    episodes: tuple[EpisodeResult, ...]
    control: ControlTiming | None = None

    @property
    def perturbed(self) -> str | None:
        """The cell of the robustness benchmark; None: none."""
        cell = self.reproduce.get("perturbation", "none")
        return None if cell == "none" else str(cell)

    @property
    def late_ms(self) -> float:
        """Time from an observation to its chunk while the robot moves on; 0: the simulation waited for the policy."""
        return float(self.reproduce["protocol"].get("latency") or 0)

    @property
    def swapped(self) -> bool:
        """True if the instructions were swapped."""
        return self.reproduce["asked"] == "swap"

    @property
    def tasks_with_unknown_words(self) -> int:
        """Number of tasks whose instruction has words that the policy does not know."""
        return sum(bool(task.unknown_words) for task in self.tasks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the success rate, one sentence each."""
        episodes, found = len(self.episodes), []
        if self.total.errors > MANY_ERRORS * episodes:
            found.append(
                f"{self.total.errors} of {episodes} episodes ({self.total.errors / episodes:.0%}) ended in errors, "
                "which are not in the success rate"
            )
        if count := self.tasks_with_unknown_words:
            found.append(f"{count} of {len(self.tasks)} tasks have words that the policy does not know")
        return tuple(found)


def build_report(
    suite: Suite,
    results: Sequence[EpisodeResult],
    batch_1_ms: Sequence[float],
    control_hz: float,
    reproduce: Mapping[str, Any],
) -> Report:
    """Build the report from the results of episodes.

    Args:
        suite: the suite.
        results: results of all episodes.
        batch_1_ms: latencies of `Policy.act` with one observation, in ms.
        control_hz: control rate of the robot.
        reproduce: everything that repeats the evaluation; must hold "asked", and "protocol" with resolved steps; may
            hold "unknown_words" by the index of a task.
    """
    played = [r for r in results if r.error is None]
    steps = sum(r.steps for r in played)
    protocol = reproduce["protocol"]
    tasks = sorted({r.task for r in results})
    unknown: Mapping[str, Sequence[str]] = reproduce.get("unknown_words", {})
    return Report(
        suite=suite.name,
        tasks=tuple(
            _row(
                suite.tasks[t].name,
                suite.tasks[t].instruction,
                [r for r in results if r.task == t],
                unknown.get(str(t), ()),
            )
            for t in tasks
        ),
        total=_row(
            "all tasks", "", results, tuple(dict.fromkeys(word for t in tasks for word in unknown.get(str(t), ())))
        ),
        inference_batch_1=latency(batch_1_ms),
        batch_1_ms=tuple(batch_1_ms),
        chunk_ms=1000 * protocol["execute_steps"] / control_hz,
        batch=dict(sorted(Counter(size for r in played for size in r.batch).items())),
        environment_ms=1000 * sum(r.environment_s for r in played) / steps if steps else None,
        max_steps=protocol["max_steps"],
        reproduce=reproduce,
        episodes=tuple(sorted(results, key=lambda r: (r.task, r.initial_state))),
    )


def _row(name: str, instruction: str, results: Sequence[EpisodeResult], unknown: Sequence[str]) -> TaskSummary:
    played = [r for r in results if r.error is None]
    return TaskSummary(
        name=name,
        instruction=instruction,
        success=success_rate(r.success for r in played),
        scene_task=success_rate(r.scene_task_success for r in played if r.scene_task_success is not None),
        errors=len(results) - len(played),
        repeated=sum(r.attempts > 1 for r in results),
        steps=_mean([r.steps for r in played]),
        steps_to_success=_mean([r.steps for r in played if r.success]),
        inference=latency(ms for r in played for ms in r.inference_ms),
        loop=latency(ms for r in played for ms in r.loop_ms),
        seam=_mean([r.seam for r in played if r.seam is not None]),
        unknown_words=tuple(unknown),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def report_json(report: Report) -> str:
    """Return all numbers as JSON, without the latency samples of each episode, which are in `episodes.parquet`."""
    values = asdict(report)
    for episode in values["episodes"]:
        for name in ("inference_ms", "loop_ms", "batch"):
            del episode[name]
    return json.dumps(values, indent=2, default=str) + "\n"


def summary(report: Report) -> str:
    """Return what was found as one line for a terminal."""
    total, probe = report.total, report.inference_batch_1
    rate = total.success
    if rate.value is None or rate.low is None or rate.high is None:
        line = f"{report.suite}: no episode could be played"
    else:
        mode = ", another task asked for" if report.swapped else ""
        mode += f", perturbed ({report.perturbed})" if report.perturbed else ""
        line = (
            f"{report.suite}{mode}: success {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}] "
            f"of {rate.trials} episodes, {total.errors} errors"
        )
    if total.scene_task.value is not None:
        line += f"; own task of the scene {total.scene_task.value:.1%}"
    if probe is not None:
        line += f"; inference p50 {probe.p50:.1f} ms, p95 {probe.p95:.1f} ms at batch 1"
    if total.loop is not None:
        line += f"; control loop p50 {total.loop.p50:.1f} ms, p95 {total.loop.p95:.1f} ms"
    if report.late_ms:
        line += f"; chunks are {report.late_ms:g} ms late"
        line += (
            "" if total.seam is None else f", and the action changes {total.seam:.1f} times as much there as elsewhere"
        )
    watched = [episode.noticed for episode in report.episodes if episode.noticed is not None]
    if watched:
        alarms = Counter(str(n["alarm"]).partition(" (")[0] for n in watched if n["alarm"] is not None)
        line += f"; {sum(alarms.values())} of {len(watched)} episodes with an alarm"
        line += "".join(f"\n{count} x {reason}" for reason, count in alarms.most_common())
    return line + "".join(f"\nWARNING: {warning}" for warning in report.warnings)


def check_played(report: Report, where: Path) -> None:
    """Check that a report has at least one result.

    Raises:
        ValueError: every episode ended in an error.
    """
    errors = Counter((r.error or "").strip().rpartition("\n")[2] for r in report.episodes)
    if report.total.success.trials == 0:
        (reason, count), *others = errors.most_common()
        more = f" and {len(others)} other errors" if others else ""
        raise ValueError(
            f"{report.suite}: none of {len(report.episodes)} episodes could be played; {count} times: {reason}{more}; "
            f"see {where / 'report.html'}"
        )


def render_html(report: Report, folder: Path) -> str:
    """Return the report as one HTML file. `folder` holds the videos; links are relative to it."""
    played = [r for r in report.episodes if r.error is None]
    figures = {
        "latency": latency_curves(
            [
                ("control loop, as run", [ms for r in played for ms in r.loop_ms]),
                ("inference, as run", [ms for r in played for ms in r.inference_ms]),
                ("inference, batch 1", report.batch_1_ms),
            ],
            report.chunk_ms,
        ),
        "length": length_histogram(
            [r.steps for r in played if r.success], [r.steps for r in played if not r.success], report.max_steps
        ),
    }
    return template("report.html.j2").render(
        report=report,
        figures=figures,
        sections=_sections(report),
        videos=_videos(report, folder),
        picture=(folder / PICTURE).read_bytes() if report.perturbed and (folder / PICTURE).exists() else None,
        drawn=drawn_values(report.episodes),
        errors=[r for r in report.episodes if r.error is not None],
    )


def render_index(reports: Mapping[str, Report]) -> str:
    """Return an HTML page over several reports. Keys are their folders, relative to the page."""
    return template("index.html.j2").render(reports=reports)


def template(name: str) -> Template:
    """Load a template of the folder `templates`, with the filters that templates use."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "data": _data, "flat": _flat}
    return environment.get_template(name)


def _sections(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (heading, values) of everything that reproduces the numbers."""
    found = report.reproduce
    run = {name: found[name] for name in ("started", "sessions", "workers")}
    run |= {f"{name} in the last session": value for name, value in found["run"].items()}
    return [
        ("Policy", found["policy"]),
        *([("Perturbation", {"cell": report.perturbed, **found["magnitudes"]})] if report.perturbed else []),
        ("Protocol", {"suite": report.suite, "instruction": found["asked"], **found["protocol"]}),
        *([("Simulation", found["simulation"])] if found.get("simulation") else []),
        ("Machine", found["machine"]),
        ("Software", {"commit": (found["commit"] or {}).get("hash"), **found["versions"]}),
        ("Run", run),
    ]


@dataclass(frozen=True)
class _Video:
    result: EpisodeResult
    task: str
    sheet: bytes
    embedded: bytes | None


def _videos(report: Report, folder: Path) -> list[_Video]:
    """Return the videos, failures first, and embed as many as fit into `EMBED_BYTES`."""
    filmed = [r for r in report.episodes if r.video is not None and (folder / r.video).exists()]
    names = {task: row.name for task, row in zip(sorted({r.task for r in report.episodes}), report.tasks, strict=True)}
    budget = EMBED_BYTES
    videos = []
    for result in sorted(filmed, key=lambda r: (r.success, r.task, r.initial_state)):
        assert result.video is not None, "episodes without a video are filtered out"
        path = folder / result.video
        content = path.read_bytes() if path.stat().st_size <= budget else None
        budget -= len(content or b"")
        videos.append(_Video(result, names[result.task], contact_sheet(path, frames=5), content))
    return videos


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _data(content: str | bytes, kind: str) -> str:
    raw = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Convert nested values to lines of a table."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            shown = f"{shown:.4g}" if isinstance(shown, float) else shown
            lines.append((f"{prefix}{key}", "–" if shown in (None, "") else str(shown)))
    return lines
