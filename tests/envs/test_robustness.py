"""The robustness benchmark: paired comparison with the clean run, the page, and the command over real processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cogvla.envs.episodes import EpisodeResult
from cogvla.envs.evaluation.evaluate import evaluate
from cogvla.envs.evaluation.perturbed import PICTURE, drawn_values
from cogvla.envs.evaluation.protocol import EvaluationProtocol
from cogvla.envs.evaluation.report import Report, build_report, summary
from cogvla.envs.evaluation.robustness import chosen_cells, compare, table
from cogvla.envs.perturbation.perturbation import DIMENSIONS, LEVELS, Perturbation
from cogvla.envs.perturbation.sensor import FAULTS
from cogvla.envs.suite import get_suite
from cogvla.scripts.command import MISTAKES, compose
from cogvla.scripts.eval_libero import run as run_command
from cogvla.scripts.merge_evaluations import merge
from cogvla.tests.support.point_suite import ToyPolicy, toy_suite

pytestmark = pytest.mark.usefixtures("no_figures")


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
    assert found.drop == pytest.approx(0.75 - (0.75 + 0 + 1) / 3)
    assert "light        75 %         0 %           -        38 %" in table(found)


def test_cells_of_a_command() -> None:
    suite, toy = get_suite("tabletop_goal"), toy_suite()
    assert chosen_cells("all", None, suite) == [Perturbation(d, level) for d in DIMENSIONS for level in LEVELS]
    assert chosen_cells("all", 2, toy) == [Perturbation("sensor", 2), Perturbation("wording", 2)]
    assert chosen_cells("camera", None, suite) == [Perturbation("camera", level) for level in LEVELS]
    listed = [Perturbation("light", 1), Perturbation("light", 3), Perturbation("sensor", 1), Perturbation("sensor", 3)]
    assert chosen_cells(["light", "sensor", "light"], [1, 3], suite) == listed
    assert chosen_cells(["all"], [3], toy) == [Perturbation("sensor", 3), Perturbation("wording", 3)]
    for names, levels in (([], None), ("light", [])):
        with pytest.raises(ValueError, match="must not be empty"):
            chosen_cells(names, levels, suite)
    with pytest.raises(ValueError, match="cannot be perturbed in 'camera'; it supports sensor, wording"):
        chosen_cells("camera", 1, toy)
    with pytest.raises(ValueError, match="unknown perturbation 'fog'; one of all, camera"):
        chosen_cells("fog", 1, suite)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["perturbation=fog"], "unknown perturbation 'fog'"),
        (["perturbation=lights"], "did you mean light"),
        (["perturbation=[camera,5]"], "unknown perturbation 5"),
        (["perturbation=light", "level=4"], "level must be 1, 2 or 3, got 4"),
        (["perturbation=light", "level=[1,0]"], "level must be 1, 2 or 3, got 0"),
        (["perturbation=light", "level=high"], "level must be 1, 2 or 3, got 'high'"),
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
    suite = toy_suite()
    other_noise = ({**suite.perturbations["sensor"][0], "noise": 7}, *suite.perturbations["sensor"][1:])
    changed = replace(suite, perturbations={**suite.perturbations, "sensor": other_noise})
    with pytest.raises(ValueError, match=r"perturbation\.noise: 6 there, 7 now"):
        evaluate(
            ToyPolicy(), changed, protocol, tmp_path, workers=0, progress=False, perturbation=Perturbation("sensor", 1)
        )


def test_the_report_of_a_cell_shows_what_was_drawn(tmp_path: Path) -> None:
    protocol = EvaluationProtocol("toy", episodes_per_task=7)
    cell = Perturbation("sensor", 3)
    options: dict[str, Any] = {"workers": 0, "videos": 1, "progress": False, "perturbation": cell}
    report = evaluate(ToyPolicy(), toy_suite(), protocol, tmp_path / "whole", **options)
    assert "perturbed (sensor_3)" in summary(report)
    assert drawn_values(report.episodes) == {"fault": "; ".join(f"{fault} (3×)" for fault in FAULTS[:6]) + "; 1 others"}
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "perturbation sensor, level 3" in page
    assert "noise (3×)" in page
    with Image.open(tmp_path / "whole" / PICTURE) as image:
        # Of both cameras, without and with the perturbation.
        images = [np.asarray(image)[:, left : left + 32] for left in range(0, 4 * 36, 36)]
    assert images[0].shape == (32, 32, 3)
    assert not any(np.array_equal(images[i], images[i + 1]) for i in (0, 2))
    rows = pq.read_table(tmp_path / "whole" / "episodes.parquet")["perturbation"].to_pylist()
    assert {json.loads(row)["fault"] for row in rows} == set(FAULTS)

    for part in (1, 2):
        evaluate(ToyPolicy(), toy_suite(), protocol, tmp_path / f"part{part}", **options, shard=(part, 2))
    merged = merge([tmp_path / "part1", tmp_path / "part2"], tmp_path / "merged")
    assert [e.perturbation for e in merged.episodes] == [e.perturbation for e in report.episodes]
    assert (tmp_path / "merged" / PICTURE).read_bytes() == (tmp_path / "part1" / PICTURE).read_bytes()
    evaluate(ToyPolicy(), toy_suite(), protocol, tmp_path / "clean", **{**options, "perturbation": None}, shard=(2, 2))
    with pytest.raises(ValueError, match=r"another configuration .*perturbation"):
        merge([tmp_path / "part1", tmp_path / "clean"], tmp_path / "mixed")


def test_drawn_values_are_summed_up() -> None:
    episodes = [
        EpisodeResult(0, state, 0, perturbation={"tint": [0.9, 1.1 + state], "pattern": "checks", "shadows": state > 1})
        for state in range(3)
    ]
    assert drawn_values(episodes) == {
        "tint": "0.9 to 3.1",
        "pattern": "checks (3×)",
        "shadows": "False (2×); True (1×)",
    }
    assert drawn_values([EpisodeResult(0, 0, 0)]) == {}


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two cells and the clean run over real processes; the second time nothing is played."""
    options = ["checkpoint=random", f"output={tmp_path}", "perturbation=wording", "tasks=[0]", "episodes_per_task=1"]
    options += ["videos=0", "workers=1", "protocol.max_steps=8"]
    for _ in range(2):
        run_command(compose("eval_libero", options), "")
    said = capsys.readouterr().out
    assert "clean 0 % of 1 episodes" in said
    body = json.loads((tmp_path / "tabletop_object_robustness.json").read_text())
    assert [cell["perturbation"] for cell in body["cells"]] == [
        {"dimension": "wording", "level": level} for level in LEVELS
    ]
    page = (tmp_path / "tabletop_object_robustness.html").read_text()
    assert page.count("data:image/png") == 3
    texts = []
    for folder in ("tabletop_object", *(f"tabletop_object_wording_{level}" for level in LEVELS)):
        (line,) = (tmp_path / folder / "episodes.jsonl").read_text().splitlines()
        texts.append(json.loads(line)["instruction"])
    assert texts[0] == "put the red cube in the tray"
    assert len(set(texts)) == 4
    assert all(f"“{text}”" in page for text in texts[1:])

    capsys.readouterr()
    run_command(compose("eval_libero", [*options, "level=1"]), "")
    assert json.loads((tmp_path / "tabletop_object_robustness.json").read_text())["cells"] == body["cells"]
    index = (tmp_path / "index.html").read_text()
    assert all(f"tabletop_object_wording_{level}/report.html" in index for level in LEVELS)
    run = tmp_path / "tabletop_object_wording_2" / "run.json"
    run.write_text(run.read_text().replace('"max_steps": 8', '"max_steps": 9'))
    (tmp_path / "tabletop_object_wording_3" / "episodes.jsonl").write_text("")
    run_command(compose("eval_libero", [*options, "level=1"]), "")
    shorter = json.loads((tmp_path / "tabletop_object_robustness.json").read_text())
    assert shorter["cells"] == body["cells"][:1], "only what can be compared"
    said = capsys.readouterr().out
    assert all(f"note: wording_{level} is not on the page of tabletop_object" in said for level in (2, 3))
