"""`gpu_report`: the rehearsal as a command, limits, errors, and going on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.data.packed import pack
from cogvla.scripts.measure.gpu import learning
from cogvla.scripts.measure.gpu.parts import PARTS
from cogvla.scripts.measure.gpu.runner import attempt
from cogvla.scripts.measure.gpu.settings import Settings
from cogvla.scripts.measure.gpu_report import main, report
from cogvla.tests.support.gpu_parts import MIXED, SLOW
from cogvla.tests.support.small_data import ROBOT, small_data

FORBIDDEN = ["lerobot", "hydra", "omegaconf", "mujoco", "pyarrow", "datasets", "wandb", "gymnasium", "av"]
COMMAND = """
import sys

for name in {blocked!r}:
    sys.modules[name] = None  # as if it were not installed

from cogvla.scripts.measure.gpu_report import main

main({arguments!r})
"""


def settings(folder: Path, **limits: float) -> Settings:
    return Settings(str(folder), "cpu", rehearse=True, threads=1, limits=tuple(limits.items()))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_report.json").read_text())["parts"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = COMMAND.format(blocked=FORBIDDEN, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.timeout(1800)  # a minute, on cores with nothing else to do
def test_the_rehearsal_does_everything_where_nothing_else_is_installed(tmp_path: Path) -> None:
    arguments = ["--rehearse", "--output", str(tmp_path)]
    done = command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = results(tmp_path)
    assert list(parts) == list(PARTS)
    for name, part in parts.items():
        assert part["state"] == "finished", part["note"]
        rows = [row for task in part["tasks"].values() for row in task["rows"]]
        assert rows, name
        missing = [row["missing"] for row in rows if "missing" in row]
        assert not missing or name == "rendering", missing
    exact = [row for row in found(parts, "equality") if row["precision"] == "float32"]
    assert max(row["largest"] for row in exact) < 1e-4
    assert max(row["batch"] for row in exact) < 1e-4
    latency = {(row["variant"], row["batch"]): row for row in found(parts, "latency")}
    assert {"faithful", "drop, float8", "OpenVLA as published"} <= {variant for variant, _ in latency}
    assert all(0 < row["p50"] <= row["p95"] <= row["p99"] for row in latency.values())
    text = (tmp_path / "gpu_report.md").read_text()
    for expected in ("A rehearsal", "at most 15 ms", "RTX 5090", "| cogvla_7b, faithful | 8 | plain |", "commit "):
        assert expected in text
    steps = {(row["preset"], row["variant"], row["checkpointing"]): row for row in found(parts, "training")}
    assert {("cogvla_7b", "all off", "on"), ("cogvla_7b", "bypass", "off"), ("small", "bypass", "off")} <= steps.keys()
    assert all(row["samples_per_s"] > 0 and row["of_peak"] > 0 for row in steps.values())
    assert [row["row"] for row in found(parts, "learning")] == ["tiny", "small"]
    for name in ("roofline_cogvla_7b", "training", "learning"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    again = command(*arguments)
    assert again.returncode == 0, again.stderr
    assert "latency: finished before" in again.stdout


@pytest.mark.usefixtures("own_accelerator")
def test_what_was_learned_from_a_packed_data_set_acts(tmp_path: Path) -> None:
    file = tmp_path / "packed.safetensors"
    pack(small_data(), ROBOT, file, 10_000_000)
    rehearsal = replace(settings(tmp_path), demonstrations=str(file))
    (row,) = learning.learn(rehearsal, "tiny")
    assert row["steps"] > 1
    assert 0 < row["action_l1"] < 2
    assert "traceback" not in row
    policy = load_policy(tmp_path / "tiny")
    assert policy.embodiment == ROBOT
    assert policy.act(ROBOT.fake_observation(2)).actions.shape == (2, ROBOT.chunk, ROBOT.action_dim)
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_size < 16e6
    rows = attempt("tiny", partial(learning.learn, replace(rehearsal, rehearse=False, demonstrations=None), "tiny"))
    assert "no file of demonstrations" in next(iter(rows))["missing"]


def found(parts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for task in parts[name]["tasks"].values() for row in task["rows"]]


def test_an_error_becomes_a_row_and_is_measured_again(tmp_path: Path) -> None:
    assert not report([MIXED], settings(tmp_path))
    tasks = results(tmp_path)["mixed"]["tasks"]
    assert list(tasks) == ["first", "failing", "impossible", "dying", "last"]
    assert tasks["failing"]["rows"][0]["value"] == 1.5
    assert tasks["failing"]["rows"][1]["missing"] == "RuntimeError: CUDA out of memory"
    assert "raise RuntimeError" in tasks["failing"]["rows"][1]["traceback"]
    assert tasks["impossible"]["rows"][0]["missing"] == "not measured: no FP8 here"
    assert "SIGKILL" in tasks["dying"]["rows"][1]["missing"]
    text = (tmp_path / "gpu_report.md").read_text()
    assert "- failing: RuntimeError: CUDA out of memory" in text
    assert "| last | 1.5 |" in text
    report([MIXED], settings(tmp_path))
    ran = (tmp_path / "ran").read_text().split()
    assert ran.count("first") == ran.count("last") == 1
    assert ran.count("before") == ran.count("dying") == ran.count("impossible") == 2


def test_a_part_ends_at_its_limit_and_goes_on_later(tmp_path: Path) -> None:
    report([SLOW, MIXED], settings(tmp_path, slow=10))
    slow = results(tmp_path)["slow"]
    assert slow["state"] == "stopped"
    assert "stopped at its limit of 10 s, in second" in slow["note"]
    assert [row["row"] for row in found(results(tmp_path), "slow")] == ["first", "second"]
    assert results(tmp_path)["mixed"]["state"] == "finished"
    (tmp_path / "quick").touch()
    assert report([SLOW], settings(tmp_path))
    slow = results(tmp_path)["slow"]
    assert slow["state"] == "finished"
    assert [row["row"] for row in found(results(tmp_path), "slow")] == ["first", "second", "third"]
    report([SLOW], settings(tmp_path), fresh=True)
    assert list(results(tmp_path)) == ["slow"]


def test_a_killed_report_goes_on(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from cogvla.scripts.measure.gpu_report import report\n"
        "from cogvla.tests.support.gpu_parts import *\n"
        f"folder = Path({str(tmp_path)!r}); (folder / 'quick').touch()\n"
        "settings = Settings(str(folder), 'cpu', rehearse=True, threads=1)\n"
        "report([SLOW], settings)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode < 0, killed.stderr
    report([SLOW, MIXED], settings(tmp_path))
    assert list(results(tmp_path)) == ["slow", "mixed"]


def test_mistakes_are_said(tmp_path: Path) -> None:
    report([SLOW], settings(tmp_path, slow=0))
    with pytest.raises(SystemExit, match="one of both is a rehearsal"):
        report_anew(tmp_path)
    (tmp_path / "gpu_report.json").write_text('{"parts": ')
    with pytest.raises(SystemExit, match="is no GPU report"):
        main(["--rehearse", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="--limits takes PART=SECONDS"):
        main(["--rehearse", "--output", str(tmp_path / "other"), "--limits", "latency"])


def report_anew(folder: Path) -> None:
    body = json.loads((folder / "gpu_report.json").read_text())
    (folder / "gpu_report.json").write_text(json.dumps({**body, "rehearse": False}))
    main(["--rehearse", "--output", str(folder)])
