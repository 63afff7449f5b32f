"""Evaluation: outcomes, resuming after anything, videos kept, user mistakes, and the command itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium.spaces import Dict

from cogvla.configs.load import names
from cogvla.envs import suite as registry
from cogvla.envs.episodes import EpisodeResult
from cogvla.envs.evaluation.evaluate import check_results, evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol, load_protocol
from cogvla.envs.evaluation.report import Report, summary
from cogvla.envs.rollout.failures import EveryEpisodeFailsError
from cogvla.envs.suite import Suite
from cogvla.policy.interface import ActionChunk, Observation
from cogvla.scripts import analyse_routing, compare_routers, console, eval_libero
from cogvla.scripts.command import MISTAKES, compose
from cogvla.scripts.eval_libero import run as run_command
from cogvla.scripts.eval_libero import suites
from cogvla.scripts.foresight import calibrate_monitor
from cogvla.tests.support.console_command import ended
from cogvla.tests.support.point_suite import EMBODIMENT, TASKS, ToyEnv, ToyPolicy, solvable, toy_suite

pytestmark = pytest.mark.usefixtures("no_figures")
PROTOCOL = EvaluationProtocol("toy", episodes_per_task=6)


def run(
    output: Path, protocol: EvaluationProtocol = PROTOCOL, policy: ToyPolicy | None = None, **options: Any
) -> Report:
    faults = options.pop("faults", {})
    defaults: dict[str, Any] = {"workers": 0, "videos": 0, "progress": False}
    return evaluate(policy or ToyPolicy(), toy_suite(**faults), protocol, output, **{**defaults, **options})


def outcomes(report: Report) -> list[tuple[Any, ...]]:
    return [(r.task, r.initial_state, r.success, r.steps, r.asked, r.instruction, r.error) for r in report.episodes]


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "episodes.jsonl").read_text().splitlines()]


def test_outcomes_and_files(tmp_path: Path) -> None:
    report = run(tmp_path)
    assert [(r.task, r.initial_state, r.success) for r in report.episodes] == [
        (task, state, solvable(state)) for task in range(3) for state in range(6)
    ]
    assert (report.total.success.successes, report.total.success.trials) == (12, 18)
    assert report.inference_batch_1 is not None
    assert report.inference_batch_1.count >= 100
    table = pq.read_table(tmp_path / "episodes.parquet")
    assert table.num_rows == 18
    assert sum(table["success"].to_pylist()) == 12
    assert [len(row) for row in table["loop_ms"].to_pylist()] == [len(r.loop_ms) for r in report.episodes]
    assert json.loads((tmp_path / "report.json").read_text())["total"]["success"]["successes"] == 12
    assert "66.7 %" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_a_second_run_plays_nothing_and_says_the_same(tmp_path: Path) -> None:
    first = run(tmp_path)
    policy = ToyPolicy()
    second = run(tmp_path, policy=policy, faults={"fault": "raise", "at": (0, 1)})  # would be an error if played
    assert outcomes(first) == outcomes(second)
    assert len(lines(tmp_path)) == 18


def test_the_report_says_how_the_precision_was_chosen_and_a_resumed_run_may_measure_it_again(tmp_path: Path) -> None:
    class Chosen(ToyPolicy):
        choice = "engine.dtype=auto: int8 (float32 10.00 ms; int8 4.00 ms)"

    assert run(tmp_path, policy=Chosen()).reproduce["run"]["precision"] == Chosen.choice
    assert Chosen.choice in (tmp_path / "report.html").read_text()
    again = Chosen()
    again.choice = "engine.dtype=auto: int8 (float32 11.00 ms; int8 4.10 ms)"
    report = run(tmp_path, policy=again)
    assert report.reproduce["run"] == {**report.reproduce["run"], "episodes": 0, "precision": again.choice}


def test_results_do_not_depend_on_where_the_run_was_cut(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    kept = (tmp_path / "whole" / "episodes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "run.json").write_text((tmp_path / "whole" / "run.json").read_text())
    (tmp_path / "cut" / "episodes.jsonl").write_text("".join(kept[:7]) + kept[7][:50])  # killed while writing a line
    resumed = run(tmp_path / "cut")
    assert outcomes(resumed) == outcomes(whole)
    assert len(lines(tmp_path / "cut")) == 18
    assert resumed.reproduce["sessions"] == 2


def test_more_episodes_and_tasks_are_added(tmp_path: Path) -> None:
    run(tmp_path, EvaluationProtocol("toy", episodes_per_task=2), tasks=[0, 2])
    report = run(tmp_path)
    assert len(report.episodes) == len(lines(tmp_path)) == 18
    assert len(run(tmp_path, tasks=[1]).episodes) == 6, "a part of them can be reported"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": EvaluationProtocol("toy", 6, execute_steps=2)}, r"protocol\.execute_steps: 4 there, 2 now"),
        ({"protocol": EvaluationProtocol("toy", 6, seed=1)}, r"protocol\.seed"),
        ({"policy": ToyPolicy(name="other")}, r"policy\.preset: point there, other now"),
        ({"identity": {"weights_sha256": "abc"}}, r"policy\.weights_sha256"),
        ({"asked": "swap"}, "asked: own task there, swap now"),
    ],
)
def test_results_of_another_configuration_are_not_mixed(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    run(tmp_path)
    before = (tmp_path / "episodes.jsonl").read_text()
    with pytest.raises(ValueError, match=f"{named}.*: choose another output, or delete"):
        run(tmp_path, **changes)
    assert (tmp_path / "episodes.jsonl").read_text() == before
    assert len(run(tmp_path, **changes, resume=False).episodes) == len(lines(tmp_path)) == 18


def test_results_of_another_simulator_are_not_mixed(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "run.json"
    file.write_text(re.sub(r'"mujoco": "[^"]*"', '"mujoco": "3.4.0"', file.read_text()))
    with pytest.raises(ValueError, match=r"episodes of MuJoCo 3\..* and 3\.4\.0 cannot be mixed: .* delete"):
        run(tmp_path)
    assert len(run(tmp_path, resume=False).episodes) == 18


def test_nothing_of_deleted_results_is_left(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "perturbation.png").write_bytes(b"of the policy before")
    with pytest.raises(EveryEpisodeFailsError):
        run(tmp_path, resume=False, faults={"fault": "raise", "at": None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes.jsonl", "error.txt", "run.json"]


def test_all_episodes_fail_for_one_reason(tmp_path: Path) -> None:
    with pytest.raises(EveryEpisodeFailsError, match=r"the toy is broken; all of it is in .*error.txt"):
        run(tmp_path, faults={"fault": "raise", "at": None})
    assert "Traceback" in (tmp_path / "error.txt").read_text()
    report = run(tmp_path)
    assert report.total.success.trials == 18
    assert not (tmp_path / "error.txt").exists()


def test_errors_after_a_result_stop_nothing(tmp_path: Path) -> None:
    run(tmp_path, tasks=[0])
    report = run(tmp_path, faults={"fault": "raise", "at": None})
    assert (report.total.success.trials, report.total.errors) == (6, 12)


def test_words_that_the_policy_does_not_know(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Knows(ToyPolicy):
        def unknown_words(self, instruction: str) -> list[str]:
            return [word for word in instruction.split() if word in ("left", "up")]

    report = run(tmp_path, policy=Knows())
    assert "the policy does not know words of 2 tasks (1, 2): left, up" in caplog.text
    assert [task.unknown_words for task in report.tasks] == [(), ("left",), ("up",)]
    assert (report.total.unknown_words, report.tasks_with_unknown_words) == (("left", "up"), 2)
    assert "2 of 3 tasks have words that the policy does not know" in summary(report)
    assert "unknown: left" in (tmp_path / "report.html").read_text()
    assert not any(task.unknown_words for task in run(tmp_path / "other").tasks)


def test_errors_are_counted_apart_and_tried_again(tmp_path: Path) -> None:
    report = run(tmp_path, faults={"fault": "raise", "at": (1, 1)})
    assert (report.total.errors, report.total.success.trials, report.total.success.successes) == (1, 17, 11)
    assert "the toy is broken" in (tmp_path / "report.html").read_text()
    repaired = run(tmp_path)
    assert (repaired.total.errors, repaired.total.success.trials, repaired.total.success.successes) == (0, 18, 12)


def test_videos_keep_failures_first(tmp_path: Path) -> None:
    report = run(tmp_path, EvaluationProtocol("toy", 9), tasks=[0], videos=3)
    assert [solvable(n) for n in range(9)].count(False) == 3
    kept = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert kept == [f"task00_state0{n}_failure.mp4" for n in (0, 4, 8)]
    assert [r.initial_state for r in report.episodes if r.video and (tmp_path / r.video).exists()] == [0, 4, 8]
    html = (tmp_path / "report.html").read_text()
    assert html.count('class="sheet"') == html.count("<video") == 3

    run(tmp_path / "few", EvaluationProtocol("toy", 4), tasks=[0], videos=3)
    outcome = sorted(path.stem.rpartition("_")[2] for path in (tmp_path / "few" / "videos").iterdir())
    assert outcome == ["failure", "success", "success"]


def test_swapped_instructions(tmp_path: Path) -> None:
    report = run(tmp_path, asked="swap")
    assert report.swapped
    assert (report.total.success.successes, report.total.success.trials) == (12, 18), "asked for something possible"
    assert (report.total.scene_task.successes, report.total.scene_task.trials) == (0, 18)
    for r in report.episodes:
        assert r.asked is not None
        assert r.asked != r.task
        assert r.instruction == TASKS[r.asked].instruction


def test_two_evaluations_do_not_write_into_one_folder(tmp_path: Path) -> None:
    from cogvla.envs.evaluation.episode_log import EpisodeLog

    with EpisodeLog(tmp_path, {}, {}), pytest.raises(ValueError, match="another process"):
        run(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run(tmp_path)
    good = (tmp_path / "episodes.jsonl").read_text()
    (tmp_path / "episodes.jsonl").write_text("nonsense\n" + good)
    with pytest.raises(ValueError, match=r"line 1 of .*episodes\.jsonl is damaged"):
        run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.json"):
        run(tmp_path)
    assert len(run(tmp_path, resume=False).episodes) == 18


def test_protocol_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"50 initial states.*lower episodes_per_task"):
        run(tmp_path, EvaluationProtocol("toy", 51))
    with pytest.raises(ValueError, match="tasks 0 to 2"):
        run(tmp_path, tasks=[3])
    with pytest.raises(ValueError, match="predicts 4 actions"):
        run(tmp_path, EvaluationProtocol("toy", execute_steps=5))
    with pytest.raises(ValueError, match="episodes_per_task must be a whole number of at least 1"):
        EvaluationProtocol("toy", 0)
    with pytest.raises(ValueError, match=r"protocol 'nonsense' is neither a YAML file nor one of .*tabletop"):
        load_protocol("nonsense")


@pytest.mark.parametrize("name", names("protocol"))
def test_named_protocols_are_valid(name: str) -> None:
    protocol = load_protocol(name, seed=3)
    assert (protocol.name, protocol.seed) == (name, 3)


def test_results_survive_json() -> None:
    result = EpisodeResult(1, 2, 3, loop_ms=(1.5,), batch=(2,), error="x")
    assert EpisodeResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_suites_by_name_list_and_group() -> None:
    everything = suites("all_tabletop")
    assert "tabletop_object" in everything
    assert all(name.startswith("tabletop_") for name in everything)
    assert suites(["point", "all_tabletop", "point"]) == ["point", *everything]
    with pytest.raises(ValueError, match=r"unknown suite 'nonsense'; one of .*tabletop_object"):
        suites(["point", "nonsense"])


# --- the command ---------------------------------------------------------------------------------------------------

EVALUATE_SLOWLY = """
import sys
from pathlib import Path
from cogvla.envs.evaluation.evaluate import check_results, evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol
from cogvla.tests.support.point_suite import ToyPolicy, toy_suite
evaluate(ToyPolicy(), toy_suite(sleep_s=0.01), EvaluationProtocol("toy", 20), Path(sys.argv[1]), workers=2, videos=0)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_loses_nothing(tmp_path: Path, stop: signal.Signals) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", EVALUATE_SLOWLY, str(output)], process_group=0,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    log = output / "episodes.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, stop)
    assert process.wait(timeout=300) != 0
    done = log.read_text().count("\n")
    assert 5 <= done < 60
    assert not (output / "report.html").exists()

    resumed = run(output, EvaluationProtocol("toy", 20))
    assert len(lines(output)) == 60, "the finished episodes were not played again"
    assert outcomes(resumed) == outcomes(run(tmp_path / "whole", EvaluationProtocol("toy", 20)))


def test_the_command_end_to_end(tmp_path: Path) -> None:
    """On a real suite: the random policy, with the scene's instruction and with another one."""
    overrides = [
        "checkpoint=random", "suite=tabletop_object", "episodes_per_task=1", "tasks=[0,3]", "workers=1", "asked=both",
        "videos=1", "protocol.max_steps=24", f"output={tmp_path / 'out'}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "cogvla.scripts.eval_libero", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tabletop_object: success 0.0%" in done.stdout
    report = json.loads((tmp_path / "out" / "tabletop_object" / "report.json").read_text())
    assert report["total"]["errors"] == 0, report["episodes"]
    assert [episode["steps"] for episode in report["episodes"]] == [24, 24]
    assert report["reproduce"]["command"].startswith("eval_libero checkpoint=random suite=tabletop_object")
    assert report["reproduce"]["policy"]["preset"] == "random"
    assert report["reproduce"]["protocol"]["execute_steps"] == 4
    swapped = json.loads((tmp_path / "out" / "tabletop_object_swap" / "report.json").read_text())
    assert swapped["total"]["scene_task"]["trials"] == 2
    assert all(episode["asked"] != episode["task"] for episode in swapped["episodes"])
    assert len(list((tmp_path / "out").glob("*/videos/*.mp4"))) == 4
    assert "tabletop_object_swap/report.html" in (tmp_path / "out" / "index.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "hydra leaves no folders"


def test_an_unknown_key_ends_in_a_short_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(console.eval_libero, "checkpoint=random", "wrokers=3") == 1
    said = capsys.readouterr().err
    assert "wrokers" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 8
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = str(ended(console.eval_libero, "checkpoint=random", "suite=nonsense")).splitlines()
    assert line.startswith("error: unknown suite 'nonsense'; one of ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpoint=random", "suite=[]"], "suite is empty"),
        (["checkpoint=random", "suite=null"], "suite is empty"),
        (["checkpoint=nowhere"], "no checkpoint folder at nowhere"),
        (["checkpoint=openvla/openvla-7b"], "import_checkpoint openvla/openvla-7b output=FOLDER"),
        (["suite=libero_long"], "did you mean libero_10"),
        ([], "checkpoint"),
        (["checkpoint=random", "asked=nonsense"], "asked must be null, swap or both"),
        (["checkpoint=random", "workers=-1"], "workers must be a whole number, 0"),
        (["checkpoint=random", "videos=-1"], "videos per task"),
        (["checkpoint=random", "episodes_per_task=0"], "episodes_per_task must be a whole number of at least 1"),
        (["checkpoint=random", "imports=[nonsense]"], "imports: cannot import nonsense"),
        (["checkpoint=random", "imports=nonsense"], "imports: cannot import nonsense"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, overrides: list[str], said: str) -> None:
    config = compose("eval_libero", [f"output={tmp_path}", *overrides])
    with pytest.raises(MISTAKES, match=said):
        run_command(config, "")


@pytest.mark.parametrize(
    "wrong",
    ["seed=-1", "workers=-1", "videos=-1", "tasks=[10]", "episodes_per_task=51", "shard=1/999", "monitor=nowhere"],
)
def test_mistakes_come_before_the_policy(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_libero, "open_any_policy", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=wrong.partition("=")[0].replace("episodes_per_task", "initial states")):
        run_command(compose("eval_libero", ["checkpoint=random", f"output={tmp_path}", wrong]), "")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("seed=0", None),
        ("protocol.execute_steps=99", "execute_steps is 99, but the policy predicts"),
        ("embodiment.gripper_open=2", "the policy opens its gripper with 2 .* suite 'tabletop_object' with -1"),
        ("suite=[tabletop_object,without]", r"the policy needs the cameras \['wrist'\], suite 'without' has \['agent"),
    ],
)
def test_a_policy_must_fit_all_suites_before_the_first_is_played(
    wrong: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def played(*_: Any, **__: Any) -> Report:
        raise RuntimeError("played")

    class Without(ToyEnv):
        observation_space = Dict({name: box for name, box in ToyEnv.observation_space.items() if name != "wrist"})

    monkeypatch.setitem(registry._SUITES, "without", (lambda: replace(toy_suite(), name="without", make=Without), None))
    monkeypatch.setattr(eval_libero, "evaluate", played)
    words = ["checkpoint=random", f"output={tmp_path}", "suite=[tabletop_object,tabletop_goal]", wrong]
    with pytest.raises(ValueError if said else RuntimeError, match=said or "played"):
        run_command(compose("eval_libero", words), "")


def test_other_results_are_named_before_anything_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second suite was played with other steps; the command said so after the whole first suite."""
    short = ["checkpoint=random", f"output={tmp_path}", "tasks=[0]", "episodes_per_task=1", "protocol.max_steps=8"]
    short += ["workers=0", "videos=0", "embodiment.chunk=4"]
    run_command(compose("eval_libero", [*short, "suite=tabletop_goal", "protocol.execute_steps=2"]), "")

    def played(*_: Any, **__: Any) -> Report:
        raise RuntimeError("played")

    monkeypatch.setattr(eval_libero, "evaluate", played)
    both = compose("eval_libero", [*short, "suite=[tabletop_object,tabletop_goal]"])
    with pytest.raises(ValueError, match=r"tabletop_goal holds results of .*execute_steps: 2 there, 4 now.*: choose"):
        run_command(both, "")
    both.resume = False
    with pytest.raises(RuntimeError, match="played"):
        run_command(both, "")


@pytest.mark.parametrize("latency", [100.0, "measured"])
def test_results_to_go_on_with_are_no_mistake(latency: float | str, tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, latency=latency)
    run(tmp_path, protocol)
    check_results(ToyPolicy(), toy_suite(), protocol, tmp_path)
    with pytest.raises(ValueError, match=r"protocol\.seed: 0 there, 1 now"):
        check_results(ToyPolicy(), toy_suite(), replace(protocol, seed=1), tmp_path)


@pytest.mark.parametrize("command", [eval_libero, compare_routers, analyse_routing, calibrate_monitor])
def test_a_suite_gets_its_group_of_the_configuration(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def world(**values: Any) -> Suite:
        given.append(values)
        raise ValueError("far enough")

    monkeypatch.setitem(registry._SUITES, "world", (world, "world"))
    more = ["foresight=nowhere"] if command is calibrate_monitor else []
    words = ["checkpoint=random", "suite=world", "+world.gravity=2", *more]
    with pytest.raises(ValueError, match="far enough"):
        command.run(compose(command.__name__.rpartition(".")[2], words), "")
    assert given == [{"gravity": 2}]


def test_with_a_latency_the_robot_moves_on_and_the_report_says_so(tmp_path: Path) -> None:
    period_ms = 1000 / EMBODIMENT.control_hz
    late = EvaluationProtocol("toy", 6, execute_steps=2, latency=period_ms, overlap="real_time")
    report = run(tmp_path / "late", late)
    protocol = report.reproduce["protocol"]
    assert (protocol["latency"], protocol["overlap"]) == (period_ms, "real_time")
    assert f"chunks are {period_ms:g} ms late" in summary(report)
    assert f"chunks {period_ms:.0f} ms late" in (tmp_path / "late" / "report.html").read_text()
    assert pq.read_table(tmp_path / "late" / "episodes.parquet")["seam"].to_pylist() == [
        episode.seam for episode in report.episodes
    ]
    with pytest.raises(ValueError, match=r"protocol\.latency: .* there, .* delete"):
        run(tmp_path / "late", replace(late, latency=2 * period_ms))
    with pytest.raises(
        ValueError, match="is 3 control steps; with execute_steps=2 the policy must predict 5 actions at"
    ):
        run(tmp_path / "later", replace(late, latency=2.5 * period_ms))


def test_a_measured_latency_is_that_of_the_policy_in_whole_control_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    period_ms = 1000 / EMBODIMENT.control_hz
    protocol = EvaluationProtocol("toy", 2, execute_steps=2, latency="measured")
    latency = run(tmp_path, protocol).reproduce["protocol"]["latency"]
    assert latency > 0
    assert (latency / period_ms).is_integer()
    assert f"so latency={latency:g} ms" in capsys.readouterr().out


def test_a_latency_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([40.0, 40.0, 90.0, 90.0, 90.0])
    monkeypatch.setattr("cogvla.envs.evaluation.evaluate._probe", lambda *_: [next(measured)] * 9)
    protocol = EvaluationProtocol("toy", 1, execute_steps=2, latency="measured")
    first = run(tmp_path, protocol).reproduce["protocol"]["latency"]
    resumed = run(tmp_path, replace(protocol, episodes_per_task=2))
    assert resumed.reproduce["protocol"]["latency"] == first
    assert run(tmp_path, protocol, resume=False).reproduce["protocol"]["latency"] > first


def test_shards_do_not_measure_a_latency_each(tmp_path: Path) -> None:
    protocol = EvaluationProtocol("toy", 2, execute_steps=2, latency="measured")
    with pytest.raises(ValueError, match=r"latency=measured with shard=1/2: .* give all of them latency=MS"):
        run(tmp_path, protocol, shard=(1, 2))
    assert not list(tmp_path.iterdir())
    words = ["checkpoint=nowhere", f"output={tmp_path}", "latency=measured", "shard=1/2"]
    with pytest.raises(ValueError, match="latency=measured with shard=1/2"):  # before the policy
        run_command(compose("eval_libero", words), "")


def test_all_modes_of_a_suite_have_one_measured_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([40.0, *[90.0] * 9])
    monkeypatch.setattr("cogvla.envs.evaluation.evaluate._probe", lambda *_: [next(measured)] * 9)
    words = ["checkpoint=random", f"output={tmp_path}", "asked=both", "tasks=[0]", "episodes_per_task=1", "videos=0"]
    words += ["workers=0", "protocol.max_steps=3", "latency=measured", "protocol.execute_steps=2"]
    found = [report.late_ms for report in run_command(compose("eval_libero", words), "")]
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"latency": "soon"}, "latency must be a number of milliseconds or 'measured', got 'soon'"),
        ({"latency": -1}, "latency must be a finite number of milliseconds, 0 or more; got -1"),
        ({"latency": float("nan")}, "latency must be a finite number of milliseconds"),
        ({"latency": True}, "latency must be a number of milliseconds or 'measured', got True"),
        ({"overlap": "real_time"}, "overlap=real_time is for chunks that arrive late: give latency=MS, too"),
        ({"latency": 50, "temporal_ensemble": float("nan")}, "temporal_ensemble must be a finite number, got nan"),
        ({"execute_steps": 2.5}, "execute_steps must be a whole number of control steps, got 2.5"),
        ({"overlap": "ensemble"}, "overlap must be replace or real_time, got 'ensemble'"),
        ({"overlap": "real_time", "temporal_ensemble": 0.1}, "give either temporal_ensemble or overlap=real_time"),
    ],
)
def test_latencies_that_do_not_fit(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluationProtocol("toy", **values)


def test_a_seam_is_where_the_next_chunk_begins_to_decide(tmp_path: Path) -> None:
    class Steps(ToyPolicy):
        """Actions that change by 1 mm from each to the next, and by 3 mm from chunk to chunk."""

        def __init__(self) -> None:
            super().__init__()
            self.calls, self.executed = 0, 0

        def act(self, observation: Observation) -> ActionChunk:
            start = self.calls * (self.executed + 2)
            self.calls += 1
            actions_BKA = np.zeros((1, 4, 7), np.float32)
            actions_BKA[0, :, 2] = 1e-3 * (start + np.arange(4))
            actions_BKA[..., 6] = self.calls % 2  # the gripper does not count
            return ActionChunk(actions_BKA)

    for latency, executed in ((0, 4), (0, 2), (50, 3), (50, 1), (100, 2)):
        policy = Steps()
        policy.executed = executed
        protocol = EvaluationProtocol("toy", 1, execute_steps=executed, latency=latency)
        report = run(tmp_path / f"{latency}_{executed}", protocol, policy, tasks=[0])
        assert report.episodes[0].steps > 8
        assert report.episodes[0].seam == pytest.approx(3)
