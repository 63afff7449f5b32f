from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.weights.pretrained import load_backbones
from cogvla.tests.support.tiny_model import MODEL, ROBOT, tiny_input, tiny_model


def published_language(folder: Path, intermediate: int = 48, **changes: Any) -> LlamaModel:
    torch.manual_seed(5)
    config = LlamaConfig(
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": intermediate,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            **changes,
        }
    )
    model = LlamaModel(config)
    model.save_pretrained(folder)
    return model


def published_tower(folder: Path) -> torch.nn.Module:
    torch.manual_seed(6)
    sizes = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 64, "patch_size": 16}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    save_for_hf(model, folder, model_args=sizes)
    return model


def config_with(**changes: dict[str, Any]) -> CogVLAConfig:
    return CogVLAConfig.from_dict({**MODEL, **changes})


def test_backbones_arrive(tmp_path: Path) -> None:
    language = published_language(tmp_path / "llm")
    tower: Any = published_tower(tmp_path / "vit")
    vision = {**MODEL["vision"], "dinov2": {"timm": f"local-dir:{tmp_path / 'vit'}", "patch_size": 8}}
    config = config_with(language={**MODEL["language"], "hub": str(tmp_path / "llm")}, vision=vision)
    model = CogVLA(config, ROBOT)
    assert len(load_backbones(model)) == 2
    assert torch.equal(model.decoder.llm.layers[2].mlp.up_proj.weight, language.layers[2].mlp.up_proj.weight)
    towers: Any = model.vision.towers
    vit = towers["dinov2"].vit
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, tower.blocks[1].mlp.fc1.weight)
    # 32 pixels in patches of 8 instead of 64 in patches of 16: same grid, the projection is resampled.
    assert torch.equal(vit.pos_embed, tower.pos_embed)
    assert vit.patch_embed.proj.weight.shape[-1] == 8
    assert model(tiny_input()).actions.isfinite().all()


def test_a_qwen_arrives_with_its_biases(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    published = Qwen2Model(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    torch.nn.init.normal_(published.layers[1].self_attn.k_proj.bias)
    published.save_pretrained(tmp_path)
    model = CogVLA(config_with(language={**MODEL["language"], "architecture": "qwen2", "hub": str(tmp_path)}), ROBOT)
    assert load_backbones(model) == [f"language: {tmp_path}"]
    for name, value in published.state_dict().items():
        assert torch.equal(model.decoder.llm.state_dict()[name], value), name
    assert model(tiny_input()).actions.isfinite().all()


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    published_language(tmp_path, intermediate=64)
    config = config_with(language={**MODEL["language"], "hub": str(tmp_path)})
    with pytest.raises(ValueError, match=r"do not fit the configuration: layers\.0\.mlp"):
        load_backbones(CogVLA(config, ROBOT))


def test_a_language_model_of_more_layers_is_not_cut(tmp_path: Path) -> None:
    published_language(tmp_path)
    config = config_with(language={**MODEL["language"], "layers": 3, "hub": str(tmp_path)})
    with pytest.raises(ValueError, match=r"have layers\.3\..* for which the configuration has no place"):
        load_backbones(CogVLA(config, ROBOT))


@pytest.mark.parametrize("damage", ["missing", "nan"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path) -> None:
    published_language(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del tensors["norm.weight"]
    else:
        tensors["norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = config_with(language={**MODEL["language"], "hub": str(tmp_path)})
    with pytest.raises(ValueError, match=r"lack norm.weight|norm.weight of .* has NaN"):
        load_backbones(CogVLA(config, ROBOT))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
            "language.heads 8, not 4: set policy.language.heads=8",
        ),
        ({"rope_theta": 1e5}, "language.rope_theta 100000.0, not 10000.0"),
        ({"rms_norm_eps": 1e-5}, "language.rms_norm_eps 1e-05, not 1e-06"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "positions of type 'linear'"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    published_language(tmp_path, **change)
    with pytest.raises(ValueError, match=said) as caught:
        load_backbones(CogVLA(config_with(language={**MODEL["language"], "hub": str(tmp_path)}), ROBOT))
    assert str(tmp_path) in str(caught.value)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    published_language(tmp_path)
    body = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**body, "model_type": "mistral"}))
    with pytest.raises(ValueError, match="has architecture mistral, the configuration llama"):
        load_backbones(CogVLA(config_with(language={**MODEL["language"], "hub": str(tmp_path)}), ROBOT))


def test_a_model_from_scratch_loads_nothing() -> None:
    assert load_backbones(tiny_model()) == []
