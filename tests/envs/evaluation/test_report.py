"""The report: right numbers in the JSON and in the HTML, nothing loaded from elsewhere, no text taken as markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvla.envs.episodes import EpisodeResult
from cogvla.envs.evaluation import report as report_module
from cogvla.envs.evaluation.report import (
    Report,
    build_report,
    check_played,
    render_html,
    render_index,
    report_json,
    summary,
)
from cogvla.envs.evaluation.statistics import wilson_interval
from cogvla.envs.rollout.video import VideoWriter
from cogvla.policy.provenance import provenance
from cogvla.tests.support.point_suite import TASKS, toy_suite


def result(task: int, state: int, success: bool, steps: int = 10, **fields: Any) -> EpisodeResult:
    chunks = -(-steps // 4)
    values: dict[str, Any] = {
        "instruction": TASKS[task].instruction,
        "inference_ms": tuple(5.0 + n for n in range(chunks)),
        "loop_ms": tuple(8.0 + n for n in range(chunks)),
        "batch": (1,) * (chunks - 1) + (2,),
        "environment_s": 0.002 * steps,
    }
    return EpisodeResult(task, state, 0, success=success, steps=steps, **{**values, **fields})


def broken(task: int, state: int) -> EpisodeResult:
    return EpisodeResult(task, state, 0, error="Traceback ...\nRuntimeError: <b>the arm fell off</b>", attempts=2)


RESULTS = [
    *[result(0, n, True, 8 + n) for n in range(8)],
    *[result(0, n, False, 20) for n in (8, 9)],
    *[result(2, n, n == 0, 20 if n else 11) for n in range(3)],
    broken(2, 3),
]


def build(results: list[EpisodeResult] = RESULTS, **changes: Any) -> Report:
    reproduce = {
        "protocol": {"name": "toy", "execute_steps": 4, "max_steps": 20, "seed": 7},
        "asked": "own task",
        "policy": {"preset": "tiny", "data": {"repo": "<script>alert(1)</script>"}},
        "command": "eval_libero checkpoint=somewhere suite=point",
        "workers": 2,
        "run": {"episodes": 14, "seconds": 12.5},
        "started": "2025-01-02T03:04:05+00:00",
        "sessions": 1,
        "commits": ["abc"],
        **provenance(),
        **changes,
    }
    return build_report(toy_suite(), results, [2.0] * 99 + [9.0], 20.0, reproduce)


def test_many_errors_are_a_warning() -> None:
    said = "1 of 14 episodes (7%) ended in errors, which are not in the success rate"
    assert f"WARNING: {said}" in summary(build())
    assert said in render_html(build(), Path())
    assert "WARNING" not in summary(build([*RESULTS, *(result(1, n, True, 9) for n in range(20))]))


@pytest.mark.parametrize("errors", [1, 3])
def test_nothing_played_is_an_error(errors: int, tmp_path: Path) -> None:
    report = build([broken(0, n) for n in range(errors)])
    with pytest.raises(ValueError, match=rf"none of {errors} episodes could be played; {errors} times: RuntimeError"):
        check_played(report, tmp_path)
    check_played(build(), tmp_path)


def test_numbers() -> None:
    report = build()
    first, third = report.tasks
    assert (first.name, third.name) == ("right", "up")
    assert (first.success.successes, first.success.trials) == (8, 10)
    assert (first.success.low, first.success.high) == wilson_interval(8, 10)
    assert (third.success.successes, third.success.trials, third.errors, third.repeated) == (1, 3, 1, 1)
    assert (report.total.success.successes, report.total.success.trials) == (9, 13), "errors are in no rate"
    assert first.steps == pytest.approx((sum(range(8, 16)) + 40) / 10)
    assert first.steps_to_success == pytest.approx(11.5)
    assert report.chunk_ms == 200
    assert report.environment_ms == pytest.approx(2.0)
    assert report.inference_batch_1 is not None
    assert report.inference_batch_1.p50 == 2.0
    assert sum(report.batch.values()) == sum(len(r.batch) for r in RESULTS)
    assert report.total.loop is not None
    assert report.total.loop.p50 == report.total.inference.p50 + 3  # type: ignore[union-attr]


def test_json_holds_the_same_numbers_and_all_that_reproduces_them() -> None:
    values = json.loads(report_json(build()))
    low, high = wilson_interval(9, 13)
    assert values["total"]["success"] == {"successes": 9, "trials": 13, "value": 9 / 13, "low": low, "high": high}
    assert values["reproduce"]["versions"]["mujoco"]
    assert values["reproduce"]["machine"]["cpu"]
    assert values["reproduce"]["protocol"]["seed"] == 7
    assert len(values["episodes"]) == len(RESULTS)
    assert "the arm fell off" in values["episodes"][-1]["error"]


def test_html_says_it_and_needs_nothing_else(tmp_path: Path) -> None:
    html = render_html(build(), tmp_path)
    low, high = wilson_interval(9, 13)
    for text in (f"{900 / 13:.1f} %", f"{100 * low:.1f} %", f"{100 * high:.1f} %", "go up", "eval_libero checkpoint=",
                 "9 of 13", "1 (", provenance()["versions"]["mujoco"]):  # fmt: skip
        assert text in html, text
    assert "<script" not in html, "names of data sets and the like are text"
    assert "<b>the arm" not in html
    assert "the arm fell off" in html
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert sources
    assert all(source.startswith("data:") for source in sources), sources
    assert not re.search(r"url\(|@import|<link", html)


def film(path: Path, shade: int) -> None:
    with VideoWriter(path) as video:
        video.add(np.full((64, 64, 3), shade, np.uint8), repeat=3)


def test_videos_failures_first_and_embedded_up_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {(0, 0): "a.mp4", (0, 8): "b.mp4", (2, 0): "c.mp4", (2, 1): "gone.mp4"}
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        film(tmp_path / name, 100)
    size = (tmp_path / "a.mp4").stat().st_size
    monkeypatch.setattr(report_module, "EMBED_BYTES", 2 * size + 50)
    results = [replace(r, video=names.get((r.task, r.initial_state))) for r in RESULTS]
    html = render_html(build(results), tmp_path)
    assert re.findall(r'href="(\w+\.mp4)"', html) == ["b.mp4", "a.mp4", "c.mp4"], "missing files are not shown"
    assert html.count("<video") == 2


def test_swapped_instructions_show_both_rates(tmp_path: Path) -> None:
    results = [replace(r, asked=1, scene_task_success=r.initial_state == 9) for r in RESULTS if r.error is None]
    report = build(results, asked="swap")
    assert report.swapped
    assert (report.total.scene_task.successes, report.total.scene_task.trials) == (1, 13)
    html = render_html(report, tmp_path)
    assert "instruction following" in html
    assert f"{100 / 13:.1f} %" in html
    assert "instruction following" not in render_html(build(), tmp_path)


def test_a_modified_tree_and_mixed_commits_are_said(tmp_path: Path) -> None:
    clean = render_html(build(commit={"hash": "abc", "modified": False}), tmp_path)
    assert "changes that are not in the commit" not in clean
    dirty = render_html(build(commit={"hash": "abc", "modified": True}, commits=["abc", "def"]), tmp_path)
    assert "changes that are not in the commit" in dirty
    assert "abc, def" in dirty


def test_a_report_without_any_played_episode(tmp_path: Path) -> None:
    report = build([broken(0, 0)], commit=None)
    assert report.total.success.value is None
    assert report.environment_ms is None
    assert "the arm fell off" in render_html(report, tmp_path)
    assert json.loads(report_json(report))["total"]["loop"] is None


def test_an_index_links_every_report() -> None:
    swapped = [replace(r, asked=1, scene_task_success=False) for r in RESULTS if r.error is None]
    html = render_index({"point": build(), "point_swap": build(swapped, asked="swap")})
    assert re.findall(r'href="([^"]+)"', html) == ["point/report.html", "point_swap/report.html"]
    assert html.count(f"{900 / 13:.1f} %") == 2
    assert html.count("instructed with another task of the scene") == 1


def test_an_index_tells_perturbed_reports_apart() -> None:
    clean = build()
    lit = replace(clean, reproduce={**clean.reproduce, "perturbation": "light_2"})
    html = render_index({"point": clean, "point_light_2": lit})
    assert html.count("perturbed: light, level 2") == html.count("perturbed:") == 1
