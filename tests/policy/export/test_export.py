"""Exported policies: the same actions as the checkpoint in every format, and what is wrong with them in one line.

Shape legend: H, W image.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cogvla.policy.export.export as exporting
import cogvla.tests.support.small_data as small
from cogvla.policy.checkpoint import load_policy, save_checkpoint, weights_hash
from cogvla.policy.checkpoint_folder import is_exported
from cogvla.policy.export.export import TOLERANCE, ExportConfig, export
from cogvla.policy.export.exported import ExportedPolicy, file_hash, open_exported
from cogvla.policy.export.formats import open_file
from cogvla.policy.export.graph import PolicyGraph, _weights
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.resize import KERNELS, resize
from cogvla.policy.inputs.tokenizer import PretrainedTokenizer
from cogvla.policy.interface import InstructionError, Observation
from cogvla.policy.policy import CogVLAPolicy
from cogvla.tests.policy.engine.test_engine import random_policy
from cogvla.tests.support.extras import needs
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.published_layouts import write_tokenizer

pytest.importorskip("onnxscript", reason=needs("export"))
pytest.importorskip("onnxruntime", reason=needs("export"))
pytest.importorskip("openvino", reason=needs("export"))

LENGTHS = (5, 8)
SHORT, LONG = "touch the red square", "touch the blue one touch the blue one"
PATCHES = {"efa": False, "film": True, "lfp": False}


def observations(count: int, height: int = small.SIZE, width: int = small.SIZE, first: int = 0) -> list[Observation]:
    rng = np.random.default_rng(first)
    return [
        Observation(
            {name: rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8) for name in small.ROBOT.camera_names},
            rng.standard_normal((1, small.ROBOT.state_dim)).astype(np.float32),
            [(SHORT, LONG)[index % 2]],
        )
        for index in range(count)
    ]


def saved(folder: Path, policy: CogVLAPolicy) -> Path:
    statistics = small.small_data().statistics()
    save_checkpoint(
        folder, policy.model.state_dict(), policy.model.config, policy.preprocessor, statistics, {"step": 3}
    )
    return folder


def exported(folder: Path, policy: CogVLAPolicy, config: ExportConfig, seen: list[Observation] | None = None) -> Path:
    checkpoint, output = saved(folder / "policy", policy), folder / "exported"
    shown = seen or observations(2)
    export(load_policy(checkpoint, "cpu"), checkpoint, output, config, shown, observations(8, first=1), "recorded")
    return output


@pytest.fixture(scope="module")
def policy() -> CogVLAPolicy:
    return random_policy({"vision": {"aggregation_tokens": 8}})  # OpenVINO has no layer without vision tokens


@pytest.fixture(scope="module")
def onnx(policy: CogVLAPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("onnx"), policy, ExportConfig(text_tokens=LENGTHS))


def same(policy: CogVLAPolicy, other: ExportedPolicy, seen: Observation, tolerance: float = TOLERANCE) -> None:
    expected, found = policy.act(seen).actions, other.act(seen).actions
    assert found.dtype == np.float32
    assert np.abs(expected).max() > 1e-3, "there is something to compare"
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_a_batch_of_two_instructions_gets_the_actions_of_the_checkpoint(policy: CogVLAPolicy, onnx: Path) -> None:
    opened, identity = open_exported(str(onnx), "cpu", 1)
    batch = Observation.stack(observations(4, first=7))
    opened.warm_up(2, batch.instruction)
    same(policy, opened, batch)
    assert opened.embodiment == small.ROBOT
    assert identity["weights_sha256"] == weights_hash(onnx.parent / "policy")
    assert identity["exported_sha256"] == file_hash(onnx / "exported.json")
    assert opened.unknown_words("touch the violet square") == ["violet"]
    described = opened.describe()
    assert (described["step"], described["engine"], described["device"]) == (3, "onnx", "cpu")
    assert described["dtype"] == "float32"
    assert described["exported"]["checked"] == {
        **json.loads((onnx / "exported.json").read_text())["checked"],
        "observations": 2,
        "recorded": "recorded",
    }
    assert 0 < described["exported"]["checked"]["max"] <= TOLERANCE


def test_a_file_and_its_folder_are_the_same_policy(policy: CogVLAPolicy, onnx: Path) -> None:
    assert is_exported(str(onnx))
    assert is_exported(str(onnx / "policy_8.onnx"))
    assert not is_exported(str(onnx.parent / "policy"))
    opened, identity = open_exported(str(onnx / "policy_8.onnx"), "cpu", 1)
    assert identity == open_exported(str(onnx), "cpu", 1)[1]
    same(policy, opened, observations(1)[0])


FORMATS: dict[str, ExportConfig] = {
    "openvino": ExportConfig("openvino", text_tokens=(8,)),
    "torch_export": ExportConfig("torch_export", text_tokens=(8,)),
    "another opset": ExportConfig(text_tokens=(8,), opset=18),
}


@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
def test_each_format_computes_the_actions_of_the_checkpoint(
    policy: CogVLAPolicy, config: ExportConfig, tmp_path: Path
) -> None:
    folder = exported(tmp_path, policy, config)
    same(policy, open_exported(str(folder), "cpu", 1)[0], Observation.stack(observations(2, first=3)))


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_int8_is_near_the_checkpoint_and_differs_from_it(policy: CogVLAPolicy, kind: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, policy, ExportConfig(kind, "int8", (8,)))
    checked = json.loads((folder / "exported.json").read_text())["checked"]
    assert TOLERANCE < checked["max"] < 0.5
    assert [path.name for path in sorted(folder.glob("*.onnx"))] == (["policy_8.onnx"] if kind == "onnx" else [])
    assert open_exported(str(folder), "cpu", 1)[0].describe()["dtype"] == "int8"


PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flow": ({"head": {"kind": "flow"}}, {}),
    "discrete": ({"head": {"kind": "discrete"}}, {}),
    "diffusion with committed actions": ({"head": {"kind": "diffusion", "prefix": 2, "steps": 2}}, {}),
    "a router that sorts": ({}, {**PATCHES, "router": {"name": "token_norm", "budget": 4}}),
    "a router in a layer": (
        {"language": {"layers": 3}},
        {**PATCHES, "router": {"name": "token_norm", "stage": "llm_layer", "layers": [1], "budget": 4}},
    ),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_heads_and_routers(parts: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    policy = random_policy(*parts)
    folder = exported(tmp_path, policy, ExportConfig(text_tokens=(8,)))
    opened = open_exported(str(folder), "cpu", 1)[0]
    same(policy, opened, Observation.stack(observations(2, first=5)))
    assert "committed" not in opened.describe(), "its files have no such input"


@pytest.mark.parametrize("kernel", KERNELS)
def test_resizing_and_crop_are_inside(kernel: str, tmp_path: Path) -> None:
    plain = random_policy()
    words, statistics = plain.preprocessor.tokenizer, small.small_data().statistics()
    policy = CogVLAPolicy(plain.model, Preprocessor(small.ROBOT, words, statistics, 0.9, kernel))
    config = ExportConfig(text_tokens=(8,), camera_size=(48, 80))
    folder = exported(tmp_path, policy, config, observations(2, 48, 80))
    opened = open_exported(str(folder), "cpu", 1)[0]
    assert [(camera.height, camera.width) for camera in opened.embodiment.cameras] == [(48, 80)] * 2
    assert opened.resize_kernel == kernel
    same(policy, opened, observations(1, 48, 80, first=9)[0])
    with pytest.raises(ValueError, match="camera 'front' gives 32x32 pixels, this exported policy takes 48x80"):
        opened.act(observations(1)[0])


@settings(deadline=None)
@given(st.sampled_from(KERNELS), st.tuples(*[st.integers(2, 90)] * 2), st.tuples(*[st.integers(2, 90)] * 2))
def test_the_weights_of_resizing_are_those_of_preprocessing(
    kernel: str, before_HW: tuple[int, int], after_HW: tuple[int, int]
) -> None:
    image = torch.randint(0, 256, (1, 3, *before_HW), dtype=torch.uint8)
    rows, columns = (_weights(a, b, kernel) for a, b in zip(before_HW, after_HW, strict=True))
    found = (rows @ image.float() @ columns.mT).round().clamp(0, 255)
    assert (found - resize(image, after_HW, kernel).float()).abs().max() <= 1, "a tie may be rounded either way"


def test_what_cannot_be_exported_says_why(onnx: Path, tmp_path: Path) -> None:
    policy = random_policy(routing={**PATCHES, "router": {"name": "random", "budget": 4}})
    graph = PolicyGraph(policy)
    router = graph.network.router.before  # type: ignore[union-attr]
    route = router.route  # type: ignore[union-attr]

    def reads(*given: Any) -> Any:
        assert float(given[0].sum()) != 1
        return route(*given)

    router.route = reads  # type: ignore[union-attr, assignment]
    inputs = [torch.zeros(1, 32, 32, 3, dtype=torch.uint8)] * 2 + [torch.zeros(1, 3), torch.ones(1, 8).long()]
    with pytest.raises(ValueError, match="its router 'random' decides in Python by values of tensors"):
        graph.check([*inputs, torch.ones(1, 8, dtype=torch.bool)])

    remembering = random_policy({"language": {"layers": 3}}, {**PATCHES, "router": {"name": "vla_iap", "budget": 4}})
    with pytest.raises(ValueError, match="router 'vla_iap' remembers earlier decisions, and an exported"):
        PolicyGraph(remembering)

    random = saved(tmp_path / "random", policy)
    with pytest.raises(ValueError, match=r"router 'random' draws numbers, .* format=torch_export"):
        export(load_policy(random), random, tmp_path / "new", ExportConfig(text_tokens=(8,)), observations(1))

    checkpoint = onnx.parent / "policy"
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="exists and is no exported policy; give another output"):
        export(load_policy(checkpoint), checkpoint, tmp_path / "notes", ExportConfig(), observations(1))
    config = ExportConfig(precision="int8", text_tokens=(2,))
    with pytest.raises(ValueError, match="no instruction of the recorded frames has up to 2 tokens"):
        export(load_policy(checkpoint), checkpoint, tmp_path / "new", config, observations(1), observations(2))
    assert not list(tmp_path.glob("*new*")), "nothing half written"


def test_actions_that_are_no_numbers_are_refused(onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, float]:
        return {"mean": math.nan, "max": math.nan}

    monkeypatch.setattr(exporting, "_compared", broken)
    checkpoint = onnx.parent / "policy"
    for precision, limit in (("float32", "0.0001"), ("int8", "inf")):
        config = ExportConfig(precision=precision, text_tokens=(8,))
        with pytest.raises(RuntimeError, match=f"differ by nan, not by less than {limit}; nothing was written"):
            export(load_policy(checkpoint), checkpoint, tmp_path / "new", config, observations(1), observations(2))
    assert not list(tmp_path.glob("*new*"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "tensorrt"}, "unknown format 'tensorrt'; one of onnx, openvino, torch_export"),
    "precision": ({"precision": "int4"}, "unknown precision 'int4'; one of float32, int8"),
    "int8 of torch": ({"format": "torch_export", "precision": "int8"}, "needs format=onnx or format=openvino"),
    "no lengths": ({"text_tokens": ()}, "text_tokens must be increasing positive lengths"),
    "lengths fall": ({"text_tokens": (8, 4)}, "text_tokens must be increasing positive lengths"),
    "one side": ({"camera_size": (128,)}, r"camera_size must be \[HEIGHT,WIDTH\] in pixels"),
    "half a token": ({"text_tokens": (8.5,)}, "text_tokens must be increasing positive lengths"),
    "half a pixel": ({"camera_size": (128.5, 128)}, r"camera_size must be \[HEIGHT,WIDTH\] in pixels"),
    "half an opset": ({"opset": 18.0}, "opset must be 18 to 20"),
    "old opset": ({"opset": 11}, "opset must be 18 to 20, got 11"),
}


@pytest.mark.parametrize(("values", "words"), WRONG.values(), ids=WRONG)
def test_settings_that_do_not_fit(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExportConfig(**values)


def changed(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / "exported.json").read_text())
    (folder / "exported.json").write_text(json.dumps({**manifest, **values}))


def other_camera(folder: Path) -> None:
    manifest = json.loads((folder / "exported.json").read_text())
    for camera in manifest["embodiment"]["cameras"]:
        camera["height"] = 64
    changed(folder, embodiment=manifest["embodiment"])


def robot(folder: Path, **values: Any) -> None:
    changed(folder, embodiment={**json.loads((folder / "exported.json").read_text())["embodiment"], **values})


def cut(folder: Path) -> None:
    file = folder / "policy_8.onnx"
    file.write_bytes(file.read_bytes()[:-100])


def cut_and_declared(folder: Path) -> None:
    cut(folder)
    files = json.loads((folder / "exported.json").read_text())["files"]
    changed(folder, files={**files, "8": {"policy_8.onnx": file_hash(folder / "policy_8.onnx")}})


def without(folder: Path, key: str) -> None:
    manifest = json.loads((folder / "exported.json").read_text())
    del manifest[key]
    (folder / "exported.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Any, str]] = {
    "a file is missing": (
        lambda folder: (folder / "policy_8.onnx").unlink(),
        "policy_8.onnx is missing; copy the whole",
    ),
    "a file is cut": (cut, "policy_8.onnx is damaged or of another export"),
    "a file that no runtime reads": (cut_and_declared, "policy_8.onnx cannot be opened; export it again"),
    "no manifest": (lambda folder: (folder / "exported.json").unlink(), "no exported.json beside it"),
    "half a manifest": (lambda folder: (folder / "exported.json").write_text('{"form'), "exported.json is damaged"),
    "another version": (lambda folder: changed(folder, format=9), "has format 9, this version reads 1"),
    "no files": (lambda folder: changed(folder, files=None), "exported.json is damaged"),
    "no file": (lambda folder: changed(folder, files={}), r"damaged \(files names no .onnx file"),
    "a file without a hash": (
        lambda folder: changed(folder, files={"8": {}}),
        r"files names no .onnx file for text lengths \[8\]",
    ),
    "no length": (lambda folder: changed(folder, files={"long": {}}), "exported.json is damaged"),
    "unknown kind": (lambda folder: changed(folder, kind="tensorrt"), "kind is 'tensorrt', not one of onnx, openvino"),
    "the kind of other files": (lambda folder: changed(folder, kind="openvino"), "files names no .xml file for text"),
    "unknown kernel": (lambda folder: changed(folder, resize_kernel="area"), "resize_kernel is 'area'"),
    "a key is missing": (lambda folder: without(folder, "precision"), r"exported.json is incomplete \(no precision\)"),
    "another chunk": (lambda folder: robot(folder, chunk=9), r"says \(its actions have shape \[1, 4, 4\]\)"),
    "another action": (
        lambda folder: robot(folder, action_dim=3, action_normalise_mask=[True] * 3, gripper_index=None),
        r"says \(its actions have shape \[1, 4, 4\]\)",
    ),
    "other cameras": (other_camera, "does not take what its exported.json says"),
    "another robot": (lambda folder: robot(folder, state_dim=7), "does not take what its exported.json says"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_export_is_refused_in_one_line(onnx: Path, damage: Any, words: str, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=words) as error:
        open_exported(str(folder / "policy_5.onnx"), "cpu", 1)
    assert "\n" not in str(error.value)


def test_a_long_instruction_and_a_strange_device_are_refused(onnx: Path) -> None:
    opened = open_exported(str(onnx), "cpu", 1)[0]
    long = replace(observations(1)[0], instruction=["touch the red square " * 3])
    with pytest.raises(InstructionError, match=r"has 12 tokens; this exported policy takes 8: export it with longer"):
        opened.act(long)
    with pytest.raises(ValueError, match="device=cuda needs onnxruntime-gpu; give device=cpu"):
        open_exported(str(onnx), "cuda", 1)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", "onnxruntime runs on CPUs and NVIDIA GPUs here; give device=cpu or cuda"),
        ("cuda:1", "onnxruntime cannot use the GPU, .*give device=cpu"),  # as without a fitting CUDA
    ],
)
def test_onnxruntime_does_not_fall_back_to_the_cpu(
    device: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = pytest.importorskip("onnx.helper")
    place = [make.make_tensor_value_info(name, 1, [1]) for name in ("state", "actions")]
    graph = make.make_graph([make.make_node("Identity", ["state"], ["actions"])], "it", place[:1], place[1:])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=8)
    (tmp_path / "policy_8.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr("cogvla.policy.export.formats._has_cuda", lambda: True)
    with pytest.raises(ValueError, match=f"device={device}: {words}"):
        open_file("onnx", tmp_path / "policy_8.onnx", device)


def test_the_tokenizer_of_another_export_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    policy = random_policy({"vision": {"aggregation_tokens": 8}})
    policy.preprocessor.tokenizer = PretrainedTokenizer(str(tmp_path))
    folder = exported(tmp_path, policy, ExportConfig("torch_export", text_tokens=(32,)))
    same(policy, open_exported(str(folder), "cpu", 1)[0], observations(1)[0])
    file = folder / "tokenizer.json"
    words = file.read_text()
    file.write_text(words.replace("take", "give"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged or of another export; copy the whole folder"):
        open_exported(str(folder), "cpu", 1)
    file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing; copy the whole folder"):
        open_exported(str(folder), "cpu", 1)


def test_a_file_beside_an_export_is_not_taken_for_it(onnx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx, tmp_path / "copy")
    for name in ("policy_16.onnx", "mine.onnx"):
        with pytest.raises(ValueError, match=rf"{name} is none of the files of .*give one of policy_5.onnx, policy_8"):
            open_exported(str(folder / name), "cpu", 1)
    (folder / "notes.txt").write_text("mine")
    checkpoint = onnx.parent / "policy"
    with pytest.raises(ValueError, match=r"copy also holds notes\.txt, which would be lost; give another output"):
        export(load_policy(checkpoint), checkpoint, folder, ExportConfig(), observations(1))


def test_each_file_is_compared_or_said_to_be_unchecked(
    policy: CogVLAPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, (short, long) = ExportConfig("torch_export", text_tokens=LENGTHS), observations(2)
    folder = exported(tmp_path / "long", policy, config, [long])
    assert json.loads((folder / "exported.json").read_text())["checked"]["unchecked_text_tokens"] == [LENGTHS[0]]
    whole = exporting.open_files

    def other(*given: Any) -> ExportedPolicy:
        opened = whole(*given)
        run = opened._files[LENGTHS[1]]
        opened._files = {**opened._files, LENGTHS[1]: lambda inputs: run(inputs) + 1}
        return opened

    monkeypatch.setattr(exporting, "open_files", other)
    with pytest.raises(RuntimeError, match="normalised actions differ"):
        exported(tmp_path / "short", policy, config, [short])


def test_what_was_not_compared_is_no_exported_policy(
    policy: CogVLAPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a process that is killed leaves nothing that could be taken for one."""
    compare = exporting._compared
    seen: list[str] = []

    def compared(*given: Any) -> Any:
        seen.extend(path.name for path in tmp_path.rglob("*") if is_exported(str(path)) and path.is_dir())
        assert list(tmp_path.rglob("policy_8.pt2")), "all files are written"
        return compare(*given)

    monkeypatch.setattr(exporting, "_compared", compared)
    folder = exported(tmp_path, policy, ExportConfig("torch_export", text_tokens=(8,)))
    assert not seen
    assert is_exported(str(folder))


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch_export"])
def test_a_full_disk(onnx: Path, kind: str, tmp_path: Path) -> None:
    checkpoint = onnx.parent / "policy"
    config = ExportConfig(kind, text_tokens=(8,))
    with files_limited_to(20_000), pytest.raises(OSError, match=r"cannot write .* MB free") as error:
        export(load_policy(checkpoint), checkpoint, tmp_path / "new", config, observations(1))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing half written"
