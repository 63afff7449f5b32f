"""`verify_reference` on folders of a second, plain implementation: agreement everywhere, and errors where they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvla.scripts.checkpoints.verify_reference import main, relative_error
from cogvla.tests.support.plain_cogvla import Sizes, write_reference

SCHEDULES: dict[str, dict[str, Any]] = {
    "shiftedcos_decay_0.85_0.15": {"layers": 10},
    "shiftedcos_decay_1.0_0.15": {"lfp_avg": 0.6, "layers": 9},  # its first ratios are above one: not routed
    "shiftedlinear_decay_0.9_0.1": {"layers": 7},
    "shiftedlinear_decay_0.98_0.0": {
        "layers": 33,
        "agg": 32,
    },  # deeper than the period: nothing is kept at the end
    "interleave": {},
    "deep_all": {"lfp_avg": 0.4},
    "deep_all_wo_last": {"lfp_avg": 0.7},
    "none": {},
}


def verify(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    try:
        main([str(folder), *options])
        code = 0
    except SystemExit as end:
        code = int(str(end.code))
    return code, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("views", [1, 3])  # the other tests have two
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_and_views(schedule: str, views: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"lfp_type": schedule, "images": views, "cases": 1, **SCHEDULES[schedule]}
    write_reference(tmp_path, Sizes(**sizes))
    code, lines = verify(tmp_path, capsys)
    assert code == 0, "\n".join(lines)
    assert sum("hidden.layer" in line for line in lines[:-1]) == Sizes(**sizes).layers
    assert any("kept.layer" in line for line in lines[:-1]) == (schedule != "none")


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(chunk=7, action_dim=5, proprio_dim=9, normalization="bounds"),
        Sizes(dinov2_registers=0, vit_depth=2, image_size=18, agg=3),
        Sizes(siglip_dim=24, dino_dim=16, vit_heads=4, hidden=24, inter=40, llm_heads=2, vit_depth=5),
    ],
)
def test_sizes(sizes: Sizes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_reference(tmp_path, sizes)
    code, lines = verify(tmp_path, capsys)
    assert code == 0, "\n".join(lines)
    assert any(line.startswith("case 1  actions") for line in lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_reference(tmp_path, Sizes(lfp_type="interleave"))
    return tmp_path


def change(folder: Path, file: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / f"{file}.safetensors")
    edit(tensors)
    save_file(tensors, folder / f"{file}.safetensors")


@pytest.mark.parametrize(
    "stage",
    [
        "vision.view0.dinov2",
        "vision.view1.siglip",
        "hidden.layer0",
        "hidden.layer4",
        "kept.layer3",
        "action_hidden",
        "normalized_actions",
        "actions",
    ],
)
def test_a_deviating_number_is_reported_at_its_stage(
    stage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plant(cases: dict[str, torch.Tensor]) -> None:
        values = cases[f"1.{stage}"].view(-1)
        spot = 2 if stage.startswith("kept") else values.abs().argmax()
        values[spot] += 9 if stage.startswith("kept") else 0.01 * values[spot]

    change(folder, "cases", plant)
    code, lines = verify(folder, capsys)
    assert code == 1
    assert [line.split()[2] for line in lines if "FAILED" in line] == [stage]
    assert lines[-1].endswith(f"first above: case 1, {stage}")
    if not stage.startswith("kept"):
        assert verify(folder, capsys, "tolerance=0.1")[0] == 0


@pytest.mark.parametrize(
    ("file", "weight", "first"),
    [
        ("model", "vision_backbone.vision_backbone.fused_featurizer.blocks.1.shift.bias", "vision.view0.siglip"),
        ("model", "aggregation_router.router.2.bias", "hidden.layer0"),
        ("model", "language_model.model.layers.2.mlp.down_proj.weight", "hidden.layer2"),
        ("model", "language_model.model.layers.3.router.router.bias", "hidden.layer3"),
        ("model", "language_model.model.norm.weight", "action_hidden"),
        ("action_head", "model.fc2.bias", "normalized_actions"),
        ("proprio_projector", "fc1.weight", "hidden.layer0"),
    ],
)
def test_a_changed_weight_is_reported_where_it_first_matters(
    file: str, weight: str, first: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, file, lambda tensors: tensors[weight].view(-1)[:1].add_(1.0))
    code, lines = verify(folder, capsys)
    assert code == 1
    assert lines[-1].endswith(f"first above: case 0, {first}")


def test_numbers_that_are_none_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, "cases", lambda cases: cases["0.action_hidden"].view(-1)[:1].fill_(float("nan")))
    code, lines = verify(folder, capsys)
    assert code == 1
    assert [line.split()[2] for line in lines if "FAILED" in line] == ["action_hidden"]


def without(file: str, name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, file, lambda tensors: tensors.pop(name))


def misshapen(file: str, name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, file, lambda tensors: tensors.update({name: tensors[name][..., :-1].clone()}))


def sized(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        body = json.loads((folder / "fixture.json").read_text()) | changes
        body = {key: value for key, value in body.items() if value is not None}
        (folder / "fixture.json").write_text(json.dumps(body))

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "norm_stats.json").unlink(), "norm_stats.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "cannot read .*model.safetensors"),
        (without("model", "featurizer_proj.fc1.weight"), r"parameter featurizer_proj.fc1.weight \[16, 8\] is missing"),
        (
            misshapen("model", "language_model.model.layers.1.mlp.up_proj.weight"),
            r"layers.1.mlp.up_proj.weight must have shape \[24, 16\], found \[24, 15\]",
        ),
        (without("action_head", "model.fc2.bias"), r"action_head.model.fc2.bias \[3\] is missing"),
        (without("cases", "1.hidden.layer2"), "has no 1.hidden.layer2"),
        (misshapen("cases", "0.action_hidden"), r"0.action_hidden: expected values have shape \[1, 6, 15\]"),
        (misshapen("cases", "0.pixel_values"), r"0.pixel_values must have shape \[1, 12, 12, 12\]"),
        (sized(chunk=None), "'chunk' is missing"),
        (sized(hidden="wide"), "a wrong type"),
        (sized(lfp_type="whenever"), "unknown keep schedule 'whenever'"),
        (sized(normalization="normal"), "unknown normalization 'normal'"),
        (sized(agg=4), r"vision_aggr_featurizer must have shape \[4, 8\], found \[1, 5, 8\]"),
    ],
)
def test_a_broken_folder_is_explained(
    damage: Callable[[Path], None], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    code, lines = verify(folder, capsys)
    assert code == 2
    assert lines[-1].startswith("error: ")
    assert re.search(said, lines[-1]), lines[-1]


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path / "nowhere", capsys) == (
        2,
        [f"error: no folder at {tmp_path / 'nowhere'}; give one with fixture.json and its weights"],
    )


def test_the_worst_vector_counts() -> None:
    expected = torch.tensor([[100.0, 0.0], [1.0, 0.5]])
    assert relative_error(expected + torch.tensor([[0.0, 0.0], [0.0, 0.01]]), expected) == pytest.approx(0.01)
