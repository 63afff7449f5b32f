"""Published weights become our checkpoints: whole CogVLAs act as published, and OpenVLA is a base to train from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvla.configs.load import load
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.empty_model import empty_model
from cogvla.policy.weights.import_weights import load_parameters
from cogvla.policy.weights.pretrained import load_base
from cogvla.policy.weights.release import open_release
from cogvla.policy.weights.safetensor_files import SafetensorFiles
from cogvla.scripts.checkpoints.import_checkpoint import main, run
from cogvla.scripts.command import compose
from cogvla.tests.support.plain_cogvla import PlainCogVLA, norm_stats, random_weights, unnormalise
from cogvla.tests.support.published_layouts import (
    SIZES,
    openvla_weights,
    write_cogvla,
    write_openvla,
    write_prismatic,
)

SIDE = SIZES.image_size
ROBOT = Embodiment(
    "toy",
    (Camera("front", SIDE, SIDE), Camera("wrist", SIDE, SIDE)),
    SIZES.proprio_dim,
    SIZES.action_dim,
    SIZES.chunk,
    20.0,
    action_normalise_mask=(True, True, False),
    gripper_index=2,
)
MODEL: dict[str, Any] = {
    "vision": {
        "dinov2": {
            "patch_size": SIZES.patch_size,
            "width": SIZES.dino_dim,
            "depth": SIZES.vit_depth,
            "heads": SIZES.vit_heads,
            "class_token": True,
            "registers": SIZES.dinov2_registers,
            "layer_scale": 1.0,
        },
        "siglip": {
            "patch_size": SIZES.patch_size,
            "width": SIZES.siglip_dim,
            "depth": SIZES.vit_depth,
            "heads": SIZES.vit_heads,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
        "aggregation_tokens": 64,
    },
    # Sizes of the language model, tokens and schedule are the paper's: the release's config.json corrects them.
    "language": load("policy", "cogvla_7b")["language"],
    "head": {"tokens_per_step": "action_dim", "placeholder": "zero", "shifted": True},
}


def imported(source: Path, output: Path, **options: Any) -> list[str]:
    """The command with small sizes in place of the presets' and without a crop."""
    values: Any = OmegaConf.to_container(compose("import_checkpoint"))
    plain = {"policy": MODEL, "embodiment": asdict(ROBOT), "dtype": "float32", "crop_area": 1.0, "empty_token": None}
    return run({**values, **plain, "source": str(source), "output": str(output), **options})


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("published") / "cogvla"
    return folder, write_cogvla(folder)


def published_actions(weights: dict[str, torch.Tensor]) -> np.ndarray:
    """What the published model does for `ROBOT.fake_observation()`, computed by the plain implementation."""
    observation = ROBOT.fake_observation()
    pixels = []
    for camera in ROBOT.camera_names:
        image = torch.from_numpy(observation.images[camera][0]).permute(2, 0, 1) / 255
        for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)):
            pixels.append((image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    stats = norm_stats(SIZES)["proprio"]
    low, high = torch.tensor(stats["q01"]), torch.tensor(stats["q99"])
    state = (2 * (torch.from_numpy(observation.state[0]) - low) / (high - low) - 1).clamp(-1, 1)
    # "In: What action should the robot take to pick up the red cube?\nOut:" in the small tokenizer's words
    ids = torch.tensor([[1, 4, 13, 6, 7, 2, 2, 8, 9, 10, 2, 2, 2, 2, 12, 14, 5, 13]])
    out = PlainCogVLA(weights, SIZES).run(ids, torch.cat(pixels)[None], state)
    return unnormalise(SIZES, out["normalized_actions"][0]).numpy()


def test_a_release_acts_as_published(release: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, weights = release
    imported(folder, tmp_path / "ours")
    policy = load_policy(tmp_path / "ours")
    assert policy.model.config.vision.aggregation_tokens == SIZES.agg
    assert policy.model.config.routing.schedule == SIZES.lfp_type
    expected = published_actions(weights)
    expected[:, 2] = 1 - 2 * expected[:, 2]  # open is 1 there and -1 here, closed is 0 there and 1 here
    np.testing.assert_allclose(policy.act(ROBOT.fake_observation()).actions[0], expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_not_merged_is_merged_into_its_base(tmp_path: Path) -> None:
    weights = write_cogvla(tmp_path / "run", merged=False)
    imported(tmp_path / "run", tmp_path / "ours", base=tmp_path / "base", gripper="embodiment")
    actions = load_policy(tmp_path / "ours").act(ROBOT.fake_observation()).actions[0]
    np.testing.assert_allclose(actions, published_actions(weights), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"its adapter needs the weights of its base; give base="):
        imported(tmp_path / "run", tmp_path / "again")


def test_what_nothing_reads_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "cogvla"
    write_cogvla(folder)
    save_file({"old": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    torch.save({"x": torch.zeros(1)}, folder / "noise--20_checkpoint.pt")
    (folder / "second").mkdir()
    (folder / "second" / "adapter_config.json").write_text("{}")
    said = imported(folder, tmp_path / "ours")
    unused = next(line for line in said if line.startswith("not used, no place in the model: "))
    assert "vision_backbone.featurizer.pos_embed" in unused
    files = "model-00001-of-00002.safetensors, noise--20_checkpoint.pt, the adapter in second"
    assert f"not read: {files}" in said
    write_cogvla(tmp_path / "clean")
    assert not any(line.startswith("not read") for line in imported(tmp_path / "clean", tmp_path / "ours"))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    write_cogvla(tmp_path / "run", merged=False)
    adapter = tmp_path / "run" / "lora_adapter" / "adapter_model.safetensors"
    tensors = {name.replace("language_model.", "llm."): tensor for name, tensor in load_file(adapter).items()}
    save_file(tensors, adapter)
    with pytest.raises(ValueError, match=r"tensors of the adapter fit nothing in its base: llm\.model\.layers"):
        imported(tmp_path / "run", tmp_path / "ours", base=tmp_path / "base")


def test_the_updates_of_the_towers_may_be_in_the_adapter_too(tmp_path: Path) -> None:
    weights = write_cogvla(tmp_path / "run", merged=False)
    towers = torch.load(tmp_path / "run" / "vision_backbone--20_checkpoint.pt", weights_only=True)
    adapter = tmp_path / "run" / "lora_adapter" / "adapter_model.safetensors"
    updates = {f"base_model.model.vision_backbone.{n}": t for n, t in towers.items() if ".lora_" in n}
    save_file({**load_file(adapter), **updates}, adapter)
    imported(tmp_path / "run", tmp_path / "ours", base=tmp_path / "base", gripper="embodiment")
    actions = load_policy(tmp_path / "ours").act(ROBOT.fake_observation()).actions[0]
    np.testing.assert_allclose(actions, published_actions(weights), rtol=1e-4, atol=1e-4)


def test_options_without_use_are_refused(release: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    write_openvla(tmp_path / "openvla")
    with pytest.raises(ValueError, match="base= has no use"):
        open_release(release[0], base=tmp_path / "openvla")
    with pytest.raises(ValueError, match="only for adapters of a cogvla"):
        open_release(tmp_path / "openvla", base=tmp_path / "openvla")


def test_bfloat16_is_kept_and_acts(release: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    imported(release[0], tmp_path / "ours", dtype="bfloat16")
    policy = load_policy(tmp_path / "ours")
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.bfloat16}
    exact = published_actions(release[1])
    exact[:, 2] = 1 - 2 * exact[:, 2]
    assert np.abs(policy.act(ROBOT.fake_observation()).actions[0] - exact).mean() < 0.2


def drop(file: str, name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = torch.load(folder / file, weights_only=True)
        content.pop(name)
        torch.save(content, folder / file)

    return apply


def narrow(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                save_file({**tensors, name: tensors[name][:-1].clone()}, path)

    return apply


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return apply


def edit_statistics(part: str, **changes: Any) -> Callable[[Path], None]:
    robot = norm_stats(SIZES)
    return edit("dataset_statistics.json", robot={**robot, part: robot[part] | changes})


class Code:
    """A pickle that is not only numbers."""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            drop("action_head--20_checkpoint.pt", "module.model.fc2.bias"),
            r"action_head.model.fc2.bias \[3\] is missing",
        ),
        (
            drop("vision_backbone--20_checkpoint.pt", "vision_backbone.featurizer.blocks.0.scale.bias"),
            r"blocks.0.scale.bias \[8\] is missing",
        ),
        (
            drop(
                "vision_backbone--20_checkpoint.pt",
                "vision_backbone.featurizer.blocks.0.block.attn.qkv.lora_B.default.weight",
            ),
            "only one matrix of the update of vision_backbone.featurizer.blocks.0.block.attn.qkv.weight",
        ),
        (
            narrow("language_model.model.layers.0.mlp.up_proj.weight"),
            r"up_proj.weight must have shape \[24, 16\], found \[23, 16\]",
        ),
        (
            lambda folder: (folder / "proprio_projector--20_checkpoint.pt").unlink(),
            "no proprio_projector--N_checkpoint.pt",
        ),
        (lambda folder: (folder / "action_head--30_checkpoint.pt").write_bytes(b""), "several action_head--"),
        (
            lambda folder: torch.save(Code(), folder / "action_head--20_checkpoint.pt"),
            "cannot read weights from .*action_head",
        ),
        (
            lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(b"cut"),
            "00002.* is damaged or incomplete",
        ),
        (
            lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
            "is incomplete: model-00002-of-00003.safetensors missing",
        ),
        (
            lambda folder: (folder / "lora_adapter" / "adapter_config.json").unlink(),
            "does not give r and lora_alpha",
        ),
        (edit("config.json", use_film=False), "an ablation of CogVLA"),
        (
            edit("dataset_statistics.json", other=norm_stats(SIZES)),
            "several data sets; choose dataset= from robot, other",
        ),
        (
            edit("dataset_statistics.json", robot={"action": {}}),
            "statistics of 'robot' .* incomplete: action has no q01",
        ),
        (edit_statistics("action", q01=[9.0] * 3), "'robot' .* wrong: action: q01 is above q99 in dimension 0"),
        (edit_statistics("proprio", std=[-1.0] * SIZES.proprio_dim), "wrong: proprio: std is negative"),
        (edit_statistics("action", mask=[True]), "the mask of action must be 3 times true or false"),
        (edit_statistics("action", mask=["false"] * 3), "the mask of action must be 3 times true or false"),
        (edit_statistics("proprio", mask=[False] * SIZES.proprio_dim), "do not normalise all of proprio"),
    ],
)
def test_what_is_missing_or_misshapen_is_named(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    write_cogvla(tmp_path / "cogvla")
    damage(tmp_path / "cogvla")
    with pytest.raises(ValueError, match=said):
        imported(tmp_path / "cogvla", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "positions", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_positions_are_read_as_each_transformers_writes_them(positions: dict[str, Any], tmp_path: Path) -> None:
    write_openvla(tmp_path / "openvla")
    body = json.loads((tmp_path / "openvla" / "config.json").read_text())
    edit("config.json", text_config={**body["text_config"], **positions})(tmp_path / "openvla")
    found = open_release(tmp_path / "openvla").configure(CogVLAConfig.from_dict(MODEL))
    assert found.language.rope_theta == 5e5


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "positions of type 'linear'"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "positions of type 'llama3'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"model_type": "mistral"}, "architecture mistral, the configuration llama"),
    ],
)
def test_a_language_model_that_ours_does_not_compute_is_refused(
    other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_openvla(tmp_path / "openvla")
    body = json.loads((tmp_path / "openvla" / "config.json").read_text())
    edit("config.json", text_config={**body["text_config"], **other})(tmp_path / "openvla")
    with pytest.raises(ValueError, match=said):
        imported(tmp_path / "openvla", tmp_path / "ours")


def model_with(routing: dict[str, Any]) -> CogVLA:
    language = {"width": SIZES.hidden, "intermediate": SIZES.inter, "layers": SIZES.layers, "heads": SIZES.llm_heads}
    language = {**MODEL["language"], **language, "vocab_size": SIZES.vocab_size}
    torch.manual_seed(1)
    return CogVLA(CogVLAConfig.from_dict({**MODEL, "language": language, "routing": routing}), ROBOT)


@pytest.mark.parametrize("layout", ["hub", "prismatic"])
def test_openvla_is_a_base(layout: str, tmp_path: Path) -> None:
    weights = openvla_weights()
    (write_openvla if layout == "hub" else write_prismatic)(tmp_path / "openvla", weights)
    model, fresh = model_with({}), model_with({}).state_dict()
    loaded, said = load_base(model, tmp_path / "openvla")
    assert loaded == {"decoder.llm", "vision.towers.dinov2.vit", "vision.towers.siglip.vit"}
    assert "decoder.llm" in said[0]
    assert "vision.fusion" in said[1]
    towers: Any = model.vision.towers
    assert torch.equal(
        towers["dinov2"].vit.blocks[1].ls2.gamma, weights["vision_backbone.featurizer.blocks.1.ls2.scale_factor"]
    )
    siglip = towers["siglip"].vit.patch_embed.proj.weight
    assert torch.equal(siglip, weights["vision_backbone.fused_featurizer.patch_embed.proj.weight"])
    layer = model.decoder.llm.layers[4]
    assert torch.equal(layer.mlp.gate_proj.weight, weights["language_model.model.layers.4.mlp.gate_proj.weight"])
    for name, value in model.state_dict().items():
        theirs = name.startswith(("decoder.llm.", "vision.towers.dinov2.vit.", "vision.towers.siglip.vit."))
        assert torch.equal(value, fresh[name]) != theirs, name


def test_joined_streams_take_the_projector(tmp_path: Path) -> None:
    weights = openvla_weights()
    write_openvla(tmp_path / "openvla", weights)
    model = model_with({"efa": False, "lfp": False})
    loaded, _ = load_base(model, str(tmp_path / "openvla"))
    assert "vision.fusion" in loaded
    project: Any = model.vision.fusion.project
    assert torch.equal(project[2].weight, weights["projector.fc2.weight"])


def test_a_cogvla_is_a_base_too(release: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, weights = release
    config = {**MODEL, "vision": {**MODEL["vision"], "aggregation_tokens": SIZES.agg}, "head": {}}
    language = {"width": SIZES.hidden, "intermediate": SIZES.inter, "layers": SIZES.layers, "heads": SIZES.llm_heads}
    config["language"] = {**MODEL["language"], **language, "vocab_size": SIZES.vocab_size}
    config["routing"] = {"schedule": "interleave"}
    model = CogVLA(CogVLAConfig.from_dict(config), ROBOT)  # with one token per step, whose head is another
    loaded, said = load_base(model, folder)
    assert "head" in said[1]
    assert "vision.fusion" in loaded
    routers: Any = model.decoder.routers
    assert torch.equal(routers["3"].logits.bias, weights["language_model.model.layers.3.router.router.bias"])


def test_a_base_of_other_sizes_is_refused(tmp_path: Path) -> None:
    weights = openvla_weights()
    name = "vision_backbone.featurizer.blocks.0.mlp.fc1.weight"
    write_openvla(tmp_path / "wide", {**weights, name: weights[name][:-1]})
    write_openvla(tmp_path / "short", {k: v for k, v in weights.items() if k != "language_model.model.norm.weight"})
    with pytest.raises(ValueError, match=rf"{name} must have shape \[32, 8\], found \[31, 8\]"):
        load_base(model_with({}), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"language_model.model.norm.weight \[16\] is missing"):
        load_base(model_with({}), tmp_path / "short")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"rope_theta": 500000.0}, "rope_theta 500000.0, not 10000.0: set policy.language.rope_theta=500000.0"),
        ({"num_attention_heads": 1}, "heads 1, not"),
        ({"num_key_value_heads": 1}, "kv_heads 1, not"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps 0.1, not"),
        ({"model_type": "qwen2"}, "architecture qwen2, the configuration llama"),
    ],
)
def test_a_base_whose_language_model_computes_something_else_is_refused(
    theirs: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_openvla(tmp_path / "openvla")
    body = json.loads((tmp_path / "openvla" / "config.json").read_text())
    edit("config.json", text_config={**body["text_config"], **theirs})(tmp_path / "openvla")
    with pytest.raises(ValueError, match=said):
        load_base(model_with({}), tmp_path / "openvla")


def test_openvla_becomes_a_checkpoint(tmp_path: Path) -> None:
    write_openvla(tmp_path / "openvla")
    small = {**MODEL, "vision": {**MODEL["vision"], "aggregation_tokens": 4}}
    said = imported(tmp_path / "openvla", tmp_path / "ours", dataset="another", policy=small)
    assert "statistics of the release" in said
    policy = load_policy(tmp_path / "ours")
    assert np.isfinite(policy.act(ROBOT.fake_observation()).actions).all()
    statistics = json.loads((tmp_path / "ours" / "statistics.json").read_text())
    assert statistics["state"]["q01"] == norm_stats(SIZES)["proprio"]["q01"]
    # It has statistics of two robots, and none was chosen.
    assert "training computes its own" in imported(tmp_path / "openvla", tmp_path / "base", policy=small)[-2]


def test_the_head_of_openvla_oft_speaks_the_embodiments_gripper(tmp_path: Path) -> None:
    write_openvla(tmp_path / "oft")
    for part in ("action_head", "proprio_projector"):
        own = {n.removeprefix(f"{part}."): t for n, t in random_weights(SIZES, 0).items() if n.startswith(f"{part}.")}
        torch.save(own, tmp_path / "oft" / f"{part}--20_checkpoint.pt")
    actions = []
    for gripper in ("embodiment", "openvla"):
        torch.manual_seed(0)
        imported(tmp_path / "oft", tmp_path / gripper, dataset="robot", gripper=gripper)
        actions.append(load_policy(tmp_path / gripper).act(ROBOT.fake_observation()).actions)
    actions[0][..., 2] = 1 - 2 * actions[0][..., 2]  # as in a release
    np.testing.assert_allclose(actions[1], actions[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"nothing without statistics: .* several data sets; choose dataset= from"):
        imported(tmp_path / "oft", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command(tmp_path: Path) -> None:
    write_openvla(tmp_path / "openvla")
    # The preset's towers are larger than these.
    options = [f"output={tmp_path / 'ours'}", "policy=tiny", "policy.language={bos_token: 1, stop_token: 2}"]
    with pytest.raises(SystemExit, match=r"error: parameter vision_backbone.featurizer.* must have shape"):
        main([str(tmp_path / "openvla"), *options])
    with pytest.raises(SystemExit, match=r"error: .*output"):
        main([str(tmp_path / "openvla")])
    with pytest.raises(SystemExit, match=r"error: .*wheels"):
        main([str(tmp_path / "openvla"), "wheels=4"])


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no OpenVLA weights in .*empty"):
        open_release(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"not/there/at/all is not a folder, and cannot be downloaded"):
        open_release("not/there/at/all")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"somebody/openvla is not a folder, and cannot be downloaded from the hub"):
        open_release("somebody/openvla")


def large_model() -> CogVLA:
    """82 million parameters without memory."""
    size = {"width": 640, "intermediate": 2560, "heads": 8, "layers": 12, "kv_heads": 8}
    language = {**MODEL["language"], **size}
    return empty_model(CogVLAConfig.from_dict({**MODEL, "language": language, "routing": {"lfp": False}}), ROBOT)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._storages[StorageWeakRef(storage)] = storage.nbytes()
        self._storages = {reference: size for reference, size in self._storages.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self._storages.values()))
        return made


def test_loading_does_not_hold_the_weights_twice(tmp_path: Path) -> None:
    model = large_model()
    sizes = [2 * parameter.numel() for parameter in model.parameters()]
    for index, (name, value) in enumerate(model.state_dict().items()):
        save_file({name: torch.zeros(value.shape, dtype=torch.bfloat16)}, tmp_path / f"{index}.safetensors")
    with LiveBytes() as live:
        load_parameters(model, SafetensorFiles(tmp_path), lambda name: (name,), torch.bfloat16)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert sum(sizes) <= live.peak <= sum(sizes) + 4 * max(sizes), "a few tensors are on their way"
    with live:
        copies = [parameter.detach().clone() for parameter in model.parameters()]
    assert live.peak >= 2 * sum(sizes), "a second copy would be seen"
    del copies
