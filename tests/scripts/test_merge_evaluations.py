"""Shards play every episode once, and their merged report is that of one evaluation."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogvla.envs.evaluation.evaluate import evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol
from cogvla.envs.evaluation.report import Report
from cogvla.scripts.merge_evaluations import main, merge
from cogvla.tests.support.point_suite import ToyPolicy, toy_suite

pytestmark = pytest.mark.usefixtures("no_figures")
PROTOCOL = EvaluationProtocol("toy", episodes_per_task=5)


def run(output: Path, shard: tuple[int, int] = (1, 1), **options: Any) -> Report:
    faults = options.pop("faults", {})
    defaults: dict[str, Any] = {"protocol": PROTOCOL, "workers": 0, "videos": 0, "progress": False}
    return evaluate(ToyPolicy(), toy_suite(**faults), output=output, shard=shard, **{**defaults, **options})


def outcomes(report: Report) -> list[tuple[Any, ...]]:
    return [(r.task, r.initial_state, r.success, r.steps, r.instruction, r.error is None) for r in report.episodes]


@pytest.mark.parametrize("parts", [1, 2, 4, 15])
def test_shards_are_a_partition(parts: int) -> None:
    shards = [PROTOCOL.episodes(toy_suite(), shard=(i + 1, parts)) for i in range(parts)]
    together = [(s.task, s.initial_state) for shard in shards for s in shard]
    assert sorted(together) == sorted((s.task, s.initial_state) for s in PROTOCOL.episodes(toy_suite()))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 16)])
def test_shards_that_do_not_exist_are_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="shard i/n needs i from 1 to n"):
        PROTOCOL.episodes(toy_suite(), shard=shard)


def test_the_merged_report_is_that_of_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path / "whole")
    folders = [tmp_path / f"shard{i}" for i in (1, 2, 3, 4)]
    for i, folder in enumerate(folders, start=1):
        run(folder, (i, 4), videos=1)
    main([*map(str, folders), f"output={tmp_path / 'merged'}"])
    assert "of 15 episodes, 0 errors" in capsys.readouterr().out
    found = json.loads((tmp_path / "merged" / "report.json").read_text())
    expected = json.loads((tmp_path / "whole" / "report.json").read_text())
    for name in ("suite", "max_steps", "chunk_ms"):
        assert found[name] == expected[name]
    for ours, theirs in zip([*found["tasks"], found["total"]], [*expected["tasks"], expected["total"]], strict=True):
        for name in ("name", "instruction", "success", "errors", "steps", "steps_to_success"):
            assert ours[name] == theirs[name]
    assert len(found["batch_1_ms"]) == 4 * len(expected["batch_1_ms"])
    assert found["reproduce"]["sessions"] == 4
    assert found["reproduce"]["run"]["episodes"] == 15
    assert all((tmp_path / "merged" / e["video"]).is_file() for e in found["episodes"] if e["video"])
    assert any(e["video"] for e in found["episodes"])
    assert (tmp_path / "merged" / "report.html").is_file()
    again = run(tmp_path / "merged", faults={"fault": "raise", "at": (0, 1)})  # would be an error if it were played
    assert outcomes(again) == outcomes(whole)


def test_shards_of_errors_only_end_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(PROTOCOL, episodes_per_task=1)
    for i in (1, 2, 3):
        run(tmp_path / f"{i}", (i, 3), protocol=one, faults={"fault": "raise", "at": None})
    with pytest.raises(SystemExit, match=r"error: point: none of 3 episodes could be played; 3 times: .*toy is broken"):
        main([*(str(tmp_path / f"{i}") for i in (1, 2, 3)), f"output={tmp_path / 'merged'}"])
    assert "no episode could be played" in capsys.readouterr().out


def test_errors_stay_errors(tmp_path: Path) -> None:
    run(tmp_path / "a", (1, 2), faults={"fault": "raise", "at": (0, 0)})
    run(tmp_path / "b", (2, 2))
    report = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert (report.total.errors, report.total.success.trials) == (1, 14)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", (1, 2))
    run(tmp_path / "b", (2, 2), protocol=replace(PROTOCOL, seed=1))
    with pytest.raises(ValueError, match=r"b has another configuration than .*protocol\.seed: 0 there, 1 now"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    run(tmp_path / "c", (1, 3))
    with pytest.raises(ValueError, match=r"c has episodes of another part"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="is not empty"):
        merge([tmp_path / "a"], tmp_path / "c")
    (tmp_path / "a" / "report.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        merge([tmp_path / "a"], tmp_path / "merged")


def test_a_missing_shard_is_not_left_out_in_silence(tmp_path: Path) -> None:
    for i in (1, 3):
        run(tmp_path / str(i), (i, 3))
    with pytest.raises(ValueError, match="shard 2/3 is missing: play it"):
        merge([tmp_path / "1", tmp_path / "3"], tmp_path / "merged")
    run(tmp_path / "other", (5, 5), protocol=replace(PROTOCOL, episodes_per_task=2))
    with pytest.raises(ValueError, match="shards are of 3 and of 5 parts"):
        merge([tmp_path / "1", tmp_path / "other"], tmp_path / "merged")


def test_shards_of_other_tasks_or_episodes_are_not_merged(tmp_path: Path) -> None:
    run(tmp_path / "a", (1, 2), protocol=replace(PROTOCOL, episodes_per_task=7))
    run(tmp_path / "b", (2, 2))
    with pytest.raises(ValueError, match=r"no shard has the episode .* other tasks or episodes_per_task"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")


def test_shards_of_two_simulators_are_not_mixed(tmp_path: Path) -> None:
    for i in (1, 2):
        run(tmp_path / str(i), (i, 2))
    file = tmp_path / "2" / "run.json"
    file.write_text(re.sub(r'"mujoco": "[^"]*"', '"mujoco": "3.4.0"', file.read_text()))
    with pytest.raises(ValueError, match=r"episodes of MuJoCo 3\..* and 3\.4\.0 cannot be mixed: play all shards"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")


def test_a_deleted_line_is_said(tmp_path: Path) -> None:
    run(tmp_path / "a")
    lines = tmp_path / "a" / "episodes.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"jsonl lacks an episode of its report, \(task, state\) \(0, 0\): run"):
        merge([tmp_path / "a"], tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["a", "b"], "must be output=FOLDER"), (["nowhere", "output=x"], "is not the folder of an evaluation")],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main([str(tmp_path / arguments[0]), arguments[1]])
