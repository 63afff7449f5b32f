"""Weights that contradict themselves are refused, and every tensor of an adapter lands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogvla.policy.weights.import_weights import Renamed, load_parameters, read_pt
from cogvla.policy.weights.lora import Lora, LoraMerged, read_lora
from cogvla.policy.weights.safetensor_files import SafetensorFiles
from cogvla.tests.support.published_layouts import write_shards

WEIGHTS = {f"layers.{i}.weight": torch.full((2, 3), float(i)) for i in range(6)}
OLD = {name: -1 - tensor for name, tensor in WEIGHTS.items()}


def test_the_index_decides_between_old_and_new_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, OLD, shards=2)
    write_shards(tmp_path, WEIGHTS, shards=3)  # with the index of the new ones
    source = SafetensorFiles(tmp_path)
    assert sorted(source) == sorted(WEIGHTS)
    assert all(torch.equal(source[name], tensor) for name, tensor in WEIGHTS.items())
    assert {path.name for path in source.files} == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        changed = change(content["weight_map"])
        path.write_text(json.dumps({"weight_map": content["weight_map"] if changed is None else changed}))

    return apply


def edit_shard(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model-00002-of-00003.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def mixed_without_index(folder: Path) -> None:
    without_index(folder)
    save_file(OLD, folder / "model.safetensors")


def shard_missing_without_index(folder: Path) -> None:
    without_index(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edit_shard(lambda t: t.pop("layers.1.weight")), r"00002-of-00003.safetensors lacks layers.1.weight"),
        (edit_shard(lambda t: t.update(OLD)), r"00002-of-00003.safetensors holds layers.0.weight, .* and 1 more"),
        (edit_index(lambda m: m.update({"new": "model-00001-of-00003.safetensors"})), "lacks new"),
        (edit_index(lambda m: m.update({"new": "model-00009-of-00003.safetensors"})), "00009.* missing"),
        (edit_index(lambda m: m.update({"new": "../other.safetensors"})), "must give each tensor a file"),
        (edit_index(lambda m: {}), "must give each tensor a file"),
        (edit_index(lambda m: list(m)), "must give each tensor a file"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"a": 1, "a": 2}'), "has the key 'a' twice"),
        (lambda f: (f / "old.safetensors.index.json").write_text("{}"), "has several indices"),
        (lambda f: save_file(OLD, f / "model.safetensors"), "has model.safetensors and an index of other files"),
        (mixed_without_index, "both hold layers.0.weight, .*, and no index says which one"),
        (shard_missing_without_index, "number 2 of 3 files model-"),
    ],
)
def test_files_and_index_that_contradict_each_other(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    write_shards(tmp_path, WEIGHTS)
    damage(tmp_path)
    with pytest.raises(ValueError, match=said):
        SafetensorFiles(tmp_path)


A, B = torch.arange(6.0).reshape(2, 3), torch.tensor([[1.0, 0], [0, 2], [1, 1], [0, 0]])
BASE = {"model.q.weight": torch.ones(4, 3), "model.q.bias": torch.zeros(4), "model.norm.weight": torch.ones(4)}
LORA = Lora(rank=2, scale=0.5, targets=("q",))
PREFIX = "base_model.model."


@pytest.mark.parametrize(
    "names",
    [
        ("base_model.model.model.q.lora_A.weight", "base_model.model.model.q.lora_B.weight"),
        ("model.q.lora_A.default.weight", "model.q.lora_B.default.weight"),
        ("base_model.model.model.q.lora_A.policy-2.weight", "base_model.model.model.q.lora_B.policy-2.weight"),
    ],
)
def test_updates_land_whatever_their_names(names: tuple[str, str]) -> None:
    merged = LoraMerged(BASE, dict(zip(names, (A, B), strict=True)), LORA)
    assert torch.equal(merged["model.q.weight"], BASE["model.q.weight"] + 0.5 * B @ A)
    assert merged["model.q.bias"] is BASE["model.q.bias"]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.norm.modules_to_save.default.weight"])
def test_modules_that_peft_saves_whole_replace_the_bases(name: str) -> None:
    adapter = {"model.q.lora_A.weight": A, "model.q.lora_B.weight": B, PREFIX + name: torch.full((4,), 7.0)}
    adapter["base_model.model.model.q.base_layer.bias"] = torch.full((4,), 5.0)
    merged = LoraMerged(BASE, adapter, LORA)
    assert merged["model.norm.weight"].tolist() == [7.0] * 4
    assert merged["model.q.bias"].tolist() == [5.0] * 4


PAIR = {"model.q.lora_A.weight": A, "model.q.lora_B.weight": B}


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            {"language_model.model.q.lora_A.weight": A, "language_model.model.q.lora_B.weight": B},
            "1 of 1 tensors of the adapter fit nothing in its base: language_model.model.q.weight",
        ),
        ({**PAIR, "model.k.lora_A.weight": A, "model.k.lora_B.weight": B}, "1 of 2 tensors .*: model.k.weight"),
        ({**PAIR, "model.head.weight": A}, "1 of 2 tensors .*: model.head.weight"),
        ({"model.q.lora_A.weight": A}, "only one matrix of the update of model.q.weight"),
        ({"model.q.lora_B.weight": B}, "only one matrix of the update of model.q.weight"),
        ({"model.norm.weight": torch.ones(4)}, "no update of its target_modules q"),
        ({**PAIR, "model.q.lora_magnitude_vector": torch.ones(4)}, "not plain LoRA"),
        ({**PAIR, "model.e.lora_embedding_A": A}, "not plain LoRA"),
        ({**PAIR, "model.q.lora_B.bias": torch.ones(4)}, "not plain LoRA"),
        ({"model.q.lora_A.one.weight": A, "model.q.lora_B.one.weight": B, **PAIR}, "several adapters .default, one"),
        ({**PAIR, PREFIX + "model.q.lora_A.weight": A}, "the same matrix twice"),
    ],
)
def test_no_tensor_of_an_adapter_is_lost(adapter: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoraMerged(BASE, adapter, LORA)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model.q.lora_A.weight": A[:1], "model.q.lora_B.weight": B[:, :1]}, "with rank 2 .adapter_config.json"),
        ({"model.q.lora_A.weight": A.T}, "has the shapes"),
        ({"model.q.lora_B.weight": B.int()}, "type int32"),
        ({"model.q.lora_A.weight": A * torch.nan}, "NaN or infinite"),
    ],
)
def test_updates_that_do_not_fit_their_weight(changed: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoraMerged(BASE, {**PAIR, **changed}, LORA)["model.q.weight"]


def test_a_wrapped_layer_without_its_update() -> None:
    inside = {"q.base_layer.weight": A, "k.base_layer.weight": A, "q.lora_A.default.weight": A[:, :3]}
    with pytest.raises(ValueError, match=r"the updates of k.weight are missing"):
        LoraMerged({**inside, "q.lora_B.default.weight": B[:2]}, None, Lora(2, 1.0))
    with pytest.raises(ValueError, match=r"hold q.weight twice"):
        LoraMerged({**inside, "q.weight": A}, None, Lora(2, 1.0))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 0}, "whole number r from 1"),
        ({"r": 4.5}, "whole number r from 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha above 0"),
        ({"lora_alpha": 0}, "lora_alpha above 0"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"rank_pattern": {"q": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q": 8}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"lora_alpha": None}, "does not give r and lora_alpha"),
    ],
)
def test_adapters_that_are_not_plain_lora(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    with pytest.raises(ValueError, match=said):
        read_lora(tmp_path)


def test_the_scale_of_an_adapter(tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "modules_to_save": ["norm"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_lora(tmp_path) == Lora(4, 2.0, ("q", "norm"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    assert read_lora(tmp_path).scale == 4.0


@pytest.mark.parametrize(
    "content",
    [
        {"module.fc.weight": A},
        {"module.module.fc.weight": A},
        {"_orig_mod.fc.weight": A},
        {"state_dict": {"module.fc.weight": A}, "epoch": 3},
        {"model_state_dict": {"fc": {"weight": A}}},
    ],
)
def test_wrappers_of_state_dicts_are_removed(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert list(read_pt(tmp_path / "a.pt")) == ["fc.weight"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"module.fc.weight": A, "fc.weight": A}, "has fc.weight twice"),
        ({"state_dict": {"a": A}, "model_state_dict": {"a": A}}, "several state dicts"),
        ({"state_dict": {}, "epoch": 3}, "has no tensors"),
        ([A], "is not a state dict: it is a list"),
    ],
)
def test_state_dicts_that_say_two_things(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        read_pt(tmp_path / "a.pt")


def test_two_tensors_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"hold x twice, as a.x and as b.x"):
        Renamed(({"a.x": A, "b.x": A}, lambda name: name[2:]))
    assert Renamed(({"x": A}, str), ({"x": B}, str))["x"] is B


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (A.to(torch.int8), "weight has numbers of type int8"),
        (A.to(torch.float8_e4m3fn), "weight has numbers of type float8_e4m3fn"),
        (A.to(torch.complex64), "weight has numbers of type complex64"),
        (A.to_sparse(), "weight is sparse"),
        (A / 0, "weight has NaN or infinite numbers"),
        (A.double() * 1e300, "weight has NaN or infinite numbers"),  # too large for float32
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_are_no_numbers(weight: Tensor, said: str, device: str) -> None:
    model = nn.Linear(3, 2, device=device)
    with pytest.raises(ValueError, match=said):
        load_parameters(model, {"weight": weight, "bias": torch.zeros(2)}, lambda name: (name,), torch.float32)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("language_model.model.layers.0.q.bias", "has no place in the model"),
        ("language_model.model.layers.7.q.weight", "has no place in the model"),
        ("language_model.model.layers.0.q.lora_A.weight", "an update of LoRA that is not merged"),
        (None, ""),
    ],
)
def test_more_than_the_model_has(left: str | None, said: str) -> None:
    used = {"language_model.model.layers.0.q.weight": A}
    spare = {"language_model.lm_head.weight": B, "vision_backbone.featurizer.blocks.9.norm.weight": B}
    model = nn.Linear(3, 2, bias=False)
    if left is None:
        assert load_parameters(model, used | spare, lambda _: list(used)) == []
        return
    with pytest.raises(ValueError, match=said):
        load_parameters(model, used | spare | {left: A}, lambda _: list(used))
