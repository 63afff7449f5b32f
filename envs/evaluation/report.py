"""What an evaluation found, as numbers (`Report`, JSON) and as one HTML file that can be sent around."""

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
from cogvla.envs.evaluation.plots import latency_curves, length_histogram
from cogvla.envs.evaluation.statistics import Latency, Rate, latency, success_rate
from cogvla.envs.rollout.video import contact_sheet
from cogvla.envs.suite import Suite

EMBED_BYTES = 6_000_000
"""Videos are put into the report itself up to this total; the others are linked."""


@dataclass(frozen=True)
class Row:
    """One task, or all of them. Errors are episodes that could not be played; they are in no rate.

    Attributes:
        name, instruction: of the task.
        success: on the task that was asked for.
        scene_task: success on the scene's own task although another one was asked for; no trials when none was.
        errors, repeated: episodes that ended in an error, and that needed a second attempt.
        steps, steps_to_success: mean control steps of all episodes and of the successful ones.
        inference: wall time of `Policy.act`, one sample per chunk.
        loop: observation ready to first action, one sample per chunk.
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


@dataclass(frozen=True)
class ControlTiming:
    """How well a robot's control loop kept time.

    Attributes:
        jitter: distance of the time between two ticks from the control period, one sample per tick.
        counts: what `cogvla.real_robot.control.measurements` counted: holds, deadline misses, starvations, faults and
        so on.
    """

    jitter: Latency | None
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """See `Row` for the parts.

    Attributes:
        suite: its name.
        tasks, total: the results.
        inference_batch_1: `Policy.act` with one observation while nothing else runs.
        chunk_ms: how long the executed part of a chunk lasts on the robot; the loop must be faster.
        batch: how many chunks were computed in a batch of which size.
        environment_ms: mean time of one control step in the environment with its share of rendering.
        max_steps: control steps before an episode is a failure.
        reproduce: all that repeats this evaluation.
        episodes: every result.
        control: of a robot in real time; None for rollouts, which wait for the policy.
    """

    suite: str
    tasks: tuple[Row, ...]
    total: Row
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
    def swapped(self) -> bool:
        """Whether another instruction than the scene's own was given."""
        return self.reproduce["asked"] == "swap"


def build_report(
    suite: Suite,
    results: Sequence[EpisodeResult],
    batch_1_ms: Sequence[float],
    control_hz: float,
    reproduce: Mapping[str, Any],
) -> Report:
    """Count and average. `reproduce` must hold "asked" and the "protocol" with its resolved steps."""
    played = [r for r in results if r.error is None]
    steps = sum(r.steps for r in played)
    protocol = reproduce["protocol"]
    tasks = sorted({r.task for r in results})
    return Report(
        suite=suite.name,
        tasks=tuple(
            _row(suite.tasks[t].name, suite.tasks[t].instruction, [r for r in results if r.task == t]) for t in tasks
        ),
        total=_row("all tasks", "", results),
        inference_batch_1=latency(batch_1_ms),
        batch_1_ms=tuple(batch_1_ms),
        chunk_ms=1000 * protocol["execute_steps"] / control_hz,
        batch=dict(sorted(Counter(size for r in played for size in r.batch).items())),
        environment_ms=1000 * sum(r.environment_s for r in played) / steps if steps else None,
        max_steps=protocol["max_steps"],
        reproduce=reproduce,
        episodes=tuple(sorted(results, key=lambda r: (r.task, r.initial_state))),
    )


def _row(name: str, instruction: str, results: Sequence[EpisodeResult]) -> Row:
    played = [r for r in results if r.error is None]
    return Row(
        name=name,
        instruction=instruction,
        success=success_rate(r.success for r in played),
        scene_task=success_rate(r.scene_task_success for r in played if r.scene_task_success is not None),
        errors=len(results) - len(played),
        repeated=sum(r.attempts > 1 for r in results),
        steps=float(np.mean([r.steps for r in played])) if played else None,
        steps_to_success=float(np.mean([r.steps for r in played if r.success]))
        if any(r.success for r in played)
        else None,
        inference=latency(ms for r in played for ms in r.inference_ms),
        loop=latency(ms for r in played for ms in r.loop_ms),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def report_json(report: Report) -> str:
    """All numbers; per episode without the latency samples, which are in `episodes.parquet`."""
    values = asdict(report)
    for episode in values["episodes"]:
        for name in ("inference_ms", "loop_ms", "batch"):
            del episode[name]
    return json.dumps(values, indent=2, default=str) + "\n"


def render_html(report: Report, folder: Path) -> str:
    """The report as one HTML file; `folder` holds the videos and is where the links lead from."""
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
        errors=[r for r in report.episodes if r.error is not None],
    )


def render_index(reports: Mapping[str, Report]) -> str:
    """One page over several reports, by the folder that each is in, relative to the page."""
    return template("index.html.j2").render(reports=reports)


def template(name: str) -> Template:
    """A page of this folder, with the filters that pages use."""
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
    """What reproduces the numbers, by heading."""
    found = report.reproduce
    run = {name: found[name] for name in ("started", "sessions", "workers")}
    run |= {f"{name} in the last session": value for name, value in found["run"].items()}
    return [
        ("Policy", found["policy"]),
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
    """Failures first; as many as fit are embedded."""
    filmed = [r for r in report.episodes if r.video is not None and (folder / r.video).exists()]
    names = {task: row.name for task, row in zip(sorted({r.task for r in report.episodes}), report.tasks, strict=True)}
    budget = EMBED_BYTES
    videos = []
    for result in sorted(filmed, key=lambda r: (r.success, r.task, r.initial_state)):
        assert result.video is not None, "only filmed episodes are shown"
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
    """Nested values as lines of a table."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            shown = f"{shown:.4g}" if isinstance(shown, float) else shown
            lines.append((f"{prefix}{key}", "–" if shown in (None, "") else str(shown)))
    return lines
