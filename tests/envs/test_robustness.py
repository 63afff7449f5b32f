"""The robustness benchmark: paired comparison with the clean run, the page, and the command over real processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cogvla.envs.episodes import EpisodeResult
from cogvla.envs.evaluation.evaluate import evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol
from cogvla.envs.evaluation.report import Report, build_report
from cogvla.envs.evaluation.robustness import chosen_cells, compare, table
from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, Perturbation
from cogvla.envs.suite import get_suite
from cogvla.scripts.command import MISTAKES, compose
from cogvla.scripts.eval_libero import run as run_command
from cogvla.tests.support.point_suite import ToyPolicy, toy_suite


def report(outcomes: str) -> Report:
    """A report whose episode N of task 0 succeeds (1), fails (0) or ends in an error (e)."""
    episodes = [
        EpisodeResult(0, state, 0, success=outcome == "1", error="broken" if outcome == "e" else None)
        for state, outcome in enumerate(outcomes)
    ]
    protocol = {"execute_steps": 4, "max_steps": 10}
    return build_report(toy_suite(), episodes, [], 20.0, {"asked": "own task", "protocol": protocol})


def test_cells_are_compared_episode_by_episode() -> None:
    cells = {Perturbation("light", 1): report("1101e"), Perturbation("light", 2): report("00000")}
    cells |= {Perturbation("wording", 2): report("11111")}
    found = compare(report("1e101"), cells)
    first, second, third = found.cells
    assert (first.won, first.lost, first.errors, first.difference) == (1, 1, 1, 0.0)
    assert (second.won, second.lost, second.difference) == (0, 3, -0.75)
    assert second.p == pytest.approx(0.25)
    assert (third.won, third.lost, third.difference) == (1, 0, 0.25)
    assert found.levels == {1: 0.75, 2: 0.5, 3: None}
    assert found.dimensions["light"] == 0.375
    assert found.dimensions["camera"] is None
    assert found.mean == pytest.approx((0.75 + 0 + 1) / 3)
    assert "light        75 %         0 %           -        38 %" in table(found)


def test_cells_of_a_command() -> None:
    suite, toy = get_suite("tabletop_goal"), toy_suite()
    assert chosen_cells("all", None, suite) == [Perturbation(d, level) for d in DIMENSIONS for level in LEVELS]
    assert chosen_cells("all", 2, toy) == [Perturbation("sensor", 2), Perturbation("wording", 2)]
    assert chosen_cells("camera", None, suite) == [Perturbation("camera", level) for level in LEVELS]
    with pytest.raises(ValueError, match="cannot be perturbed in 'camera'; it supports sensor, wording"):
        chosen_cells("camera", 1, toy)
    with pytest.raises(ValueError, match="unknown perturbation 'fog'; one of all, camera"):
        chosen_cells("fog", 1, suite)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["perturbation=fog"], "unknown perturbation 'fog'"),
        (["perturbation=light", "level=4"], "level must be 1, 2 or 3, got 4"),
        (["level=2"], "level= needs perturbation=NAME"),
        (["perturbation=all", "asked=swap"], "give either perturbation or asked"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, overrides: list[str], said: str) -> None:
    config = compose("eval_libero", ["checkpoint=random", f"output={tmp_path}", *overrides])
    with pytest.raises(MISTAKES, match=said):
        run_command(config, "")


def test_results_of_another_cell_are_not_mixed(tmp_path: Path) -> None:
    protocol = EvaluationProtocol("toy", episodes_per_task=1)

    def play(perturbation: Perturbation | None) -> Report:
        return evaluate(
            ToyPolicy(), toy_suite(), protocol, tmp_path, workers=0, videos=0, progress=False, perturbation=perturbation
        )

    first = play(Perturbation("sensor", 1))
    assert first.reproduce["perturbation"] == "sensor_1"
    again = play(Perturbation("sensor", 1))
    assert [replace(e, wall_s=0) for e in again.episodes] == [replace(e, wall_s=0) for e in first.episodes]
    for other in (Perturbation("sensor", 2), None):
        with pytest.raises(ValueError, match="perturbation"):
            play(other)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two cells and the clean run over real processes; the second time nothing is played."""
    options = ["checkpoint=random", f"output={tmp_path}", "perturbation=wording", "tasks=[0]", "episodes_per_task=1"]
    options += ["videos=0", "workers=1", "protocol.max_steps=8", "engine.kind=plain"]
    for _ in range(2):
        run_command(compose("eval_libero", options), "")
    said = capsys.readouterr().out
    assert "clean 0 % of 1 episodes" in said
    body = json.loads((tmp_path / "tabletop_object_robustness.json").read_text())
    assert [cell["perturbation"] for cell in body["cells"]] == [
        {"dimension": "wording", "level": level} for level in LEVELS
    ]
    page = (tmp_path / "tabletop_object_robustness.html").read_text()
    assert page.count("data:image/png") == 4
    texts = []
    for folder in ("tabletop_object", *(f"tabletop_object_wording_{level}" for level in LEVELS)):
        (line,) = (tmp_path / folder / "episodes.jsonl").read_text().splitlines()
        texts.append(json.loads(line)["instruction"])
    assert texts[0] == "put the red cube in the tray"
    assert len(set(texts)) == 4
