"""`benchmark_policy` on a machine without a GPU: the whole command, with few calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvla.policy.cost.flops import REPEATED, count_flops
from cogvla.policy.cost.timing import Peaks, machine_peaks
from cogvla.policy.cost.variants import VARIANTS, measure_row, preset, random_policy
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.scripts.measure.benchmark_policy import main
from cogvla.tests.support.paths import SHIPPED

FEW = ["--calls", "3", "--batches", "1", "--threads", "1", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rows_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["all off", "faithful", "faithful, engine", "drop"]
    main([*FEW, "--preset", "tiny", "--rows", *rows, "--output", str(tmp_path), "--profile"])
    body = json.loads((tmp_path / "benchmark.json").read_text())
    found = {row["row"]: row for row in body["rows"]}
    assert list(found) == rows
    assert body["versions"]["torch"]
    assert body["machine"]["torch_threads"] == 1
    assert [found[row]["engine"] for row in rows] == ["plain", "plain", "trace", "trace"]
    for row in found.values():
        assert 0 < row["least"] <= row["p50"] <= row["p95"] <= row["p99"]
        assert set(row["stages"]) == {"prepare", "vision", "decide", "head"}
        assert row["floor"] > 0
    assert found["all off"]["flops"] > 2 * found["drop"]["flops"]
    assert found["drop"]["deviation"][1] < 1e-4
    assert found["faithful"]["deviation"] is None
    assert (tmp_path / "trace_faithful_engine.json").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "times as fast as faithful" in said
    assert "measured now" in said


def test_openvla_as_published_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*FEW, "--preset", "tiny", "--rows", "OpenVLA as published", "drop", "--output", str(tmp_path)])
    published, drop = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert published["engine"] == "transformers"
    assert published["calls"] == drop["calls"] == 3
    said = capsys.readouterr().out
    assert f"drop, batch 1: {published['p50'] / drop['p50']:.2f} times as fast as OpenVLA as published" in said
    assert "the paper reports 2.8" in said


@pytest.mark.parametrize(
    ("eight_bits", "dtype", "engine"), [("float8", "bfloat16", "eager"), ("int8", "float32", "trace")]
)
def test_eight_bits(tmp_path: Path, eight_bits: str, dtype: str, engine: str) -> None:
    few = [*FEW[:-1], dtype, "--checkpoint", str(SHIPPED), "--engine", engine, "--smallest", "128"]
    main([*few, "--rows", "engine", eight_bits, "--output", str(tmp_path)])
    usual, fewer = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert 0 <= usual["deviation"][0] < fewer["deviation"][0] < 0.1
    assert fewer["moved"] < usual["moved"]
    assert fewer["peaks"]["flops"] != usual["peaks"]["flops"], "each has the floor of its precision"


def test_the_fastest_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*FEW, "--preset", "tiny", "--rows", "drop, auto", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    chosen = re.search(r"engine\.dtype=auto: (\w+) \(float32 [\d.]+ ms", capsys.readouterr().out)
    assert chosen is not None
    assert chosen[1] in ("float32", "bfloat16", "int8")
    assert row["deviation"][0] >= 0


def test_rows_that_cannot_be_in_eight_bits_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*FEW, "--preset", "tiny", "--rows", "drop, float8", "drop, int8", "drop", "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert "not measured: float8 layers need the other layers in bfloat16" in said
    assert "not measured: no layer of this model has 256 or more inputs and outputs" in said
    assert [row["row"] for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]] == ["drop"]
    main([*FEW, "--preset", "tiny", "--rows", "drop, int8", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"] == []
    main([*FEW[:-1], "bfloat16", "--preset", "tiny", "--rows", "drop, int8"])
    assert "not measured: int8 needs a CPU and float32" in capsys.readouterr().out


def test_a_checkpoint(tmp_path: Path) -> None:
    main([*FEW, "--checkpoint", str(SHIPPED), "--rows", "engine", "--output", str(tmp_path)])
    row = json.loads((tmp_path / "benchmark.json").read_text())["rows"][0]
    from cogvla.policy.checkpoint import load_policy

    policy = load_policy(SHIPPED)
    costs = count_flops(policy.model.config, policy.embodiment, 7)
    assert row["flops"] == next(cost.flops for cost in costs if cost.stage == REPEATED)
    assert row["deviation"][1] < 1e-4


def test_the_tokens_of_the_policys_own_prompt_are_counted() -> None:
    class Prompt(WordTokenizer):
        def encode(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
            return super().encode([f"what to do to {text} now" for text in instructions])

    policy = random_policy(*preset(VARIANTS["drop"], "tiny"), "cpu", "float32")
    policy.preprocessor.tokenizer = Prompt(["<pad>", "<unk>"])
    measured = measure_row("prompt", policy, None, 1, 1, Peaks("none", 1.0, 1.0))
    costs = count_flops(policy.model.config, policy.embodiment, 12)
    assert measured.flops == next(cost.flops for cost in costs if cost.stage == REPEATED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "policy 'huge' is neither a YAML file nor one of cogvla_7b, small, tiny"),
        (
            ["--checkpoint", str(SHIPPED), "--rows", "faithful"],
            "unknown row 'faithful'; one of 'plain', 'engine', 'float8', 'int8'",
        ),
        (["--checkpoint", "nowhere", "--rows", "engine"], "nowhere"),
        (["--checkpoint", "nowhere", "--rows", "int8"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main([*FEW, *arguments])


def test_peaks_are_those_of_large_products() -> None:
    peaks = machine_peaks("cpu", "float32")
    assert 1e9 < peaks.flops < 1e14
    assert 1e8 < peaks.bandwidth < 1e13


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--calls", "0"], "--calls and --batches must be at least 1, got 0"),
        (["--batches", "8", "0"], r"--calls and --batches must be at least 1, got 3 and \[8, 0\]"),
        (["--device", "gpu"], "device=gpu cannot be used here"),
        (["--threads", "0"], "threads must be a whole number, at least 1"),
        (["--checkpoint", "it", "--views", "1"], "--views changes nothing with --checkpoint"),
        (["--checkpoint", "it", "--preset", "tiny"], "--preset changes nothing with --checkpoint"),
        (["--statistics", "it"], "--statistics names a data set of a --checkpoint"),
    ],
)
def test_numbers_and_devices_that_make_no_sense_are_one_line(wrong: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=f"error: {said}") as error:
        main([*FEW, "--rows", "drop", *wrong])
    assert "\n" not in str(error.value)
