"""Policies of lerobot behind our contract: their own actions, in any batch, and one line for what cannot run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors.torch import load_file, save_file

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.interface import Embodiment, Observation
from cogvla.policy.lerobot.loading import _check_weights, _identity, open_lerobot_policy
from cogvla.policy.lerobot.policy import LeRobotPolicy
from cogvla.scripts import eval_libero, record_demonstrations
from cogvla.scripts.command import compose
from cogvla.scripts.policies import open_any_policy, report_name
from cogvla.tests.support import toy_suite
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.smolvlm import write_smolvlm

ROBOT = build(Embodiment, load("embodiment", "tabletop"), "embodiment")
SIZE = 32
ACT = {
    "chunk_size": 6,
    "n_action_steps": 4,
    "dim_model": 32,
    "n_heads": 2,
    "dim_feedforward": 32,
    "n_encoder_layers": 1,
    "pretrained_backbone_weights": None,
    "use_vae": False,
}
DIFFUSION = {
    "n_obs_steps": 1,
    "horizon": 4,
    "n_action_steps": 4,
    "crop_shape": None,
    "down_dims": (16, 32),
    "n_groups": 4,
    "num_train_timesteps": 4,
    "spatial_softmax_num_keypoints": 4,
    "drop_n_last_frames": 0,
    "use_group_norm": True,
    "pretrained_backbone_weights": None,
}
VQBET = {
    "n_obs_steps": 1,
    "n_action_pred_token": 2,
    "action_chunk_size": 3,
    "crop_shape": None,
    "pretrained_backbone_weights": None,
    "use_group_norm": True,
    "spatial_softmax_num_keypoints": 4,
    "vqvae_n_embed": 4,
    "vqvae_embedding_dim": 8,
    "vqvae_enc_hidden_dim": 8,
    "gpt_block_size": 32,
    "gpt_input_dim": 16,
    "gpt_output_dim": 16,
    "gpt_n_layer": 1,
    "gpt_n_head": 2,
    "gpt_hidden_dim": 16,
}
SMOLVLA = {
    "chunk_size": 6,
    "n_action_steps": 4,
    "num_vlm_layers": 2,
    "num_steps": 3,
    "resize_imgs_with_padding": (32, 32),
    "expert_width_multiplier": 0.5,
    "max_state_dim": 8,
    "max_action_dim": 8,
}
toy_suite.register()


def features(*cameras: str) -> dict[str, Any]:
    images = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for name in cameras}
    return {
        "input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (8,)), **images},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))},
    }


def saved(config: Any, folder: Path) -> Path:
    """Save a policy with random weights, as lerobot does after training."""
    torch.manual_seed(0)
    policy = get_policy_class(config.type)(config)
    shapes = {key: feature.shape for key, feature in {**config.input_features, **config.output_features}.items()}
    stats = {
        key: {
            "mean": torch.full((shape[0], *[1] * (len(shape) - 1)), 0.1),
            "std": torch.full((shape[0], *[1] * (len(shape) - 1)), 0.5),
            "min": torch.full((shape[0], *[1] * (len(shape) - 1)), -1.0),
            "max": torch.full((shape[0], *[1] * (len(shape) - 1)), 1.0),
        }
        for key, shape in shapes.items()
    }
    for part in (policy, *make_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def act(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ACTConfig(**ACT, **features("agentview", "wrist"), device="cpu", push_to_hub=False)
    return saved(config, tmp_path_factory.mktemp("act") / "pretrained_model")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="needs lerobot[diffusion]")
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    config = DiffusionConfig(**DIFFUSION, **features("agentview", "wrist"), device="cpu", push_to_hub=False)
    return saved(config, tmp_path_factory.mktemp("diffusion") / "pretrained_model")


@pytest.fixture(scope="module")
def vqbet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig

    config = VQBeTConfig(**VQBET, **features("agentview"), device="cpu", push_to_hub=False)
    return saved(config, tmp_path_factory.mktemp("vqbet") / "pretrained_model")


@pytest.fixture(scope="module")
def smolvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("num2words", reason="needs lerobot[smolvla]")
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    vlm = write_smolvlm(tmp_path_factory.mktemp("vlm"))
    shapes = features("agentview", "wrist")
    config = SmolVLAConfig(**SMOLVLA, **shapes, vlm_model_name=str(vlm), device="cpu", push_to_hub=False)
    return saved(config, tmp_path_factory.mktemp("smolvla") / "pretrained_model")


def opened(folder: Path | str, **changes: Any) -> LeRobotPolicy:
    return open_lerobot_policy(str(folder), **{"embodiment": ROBOT, "device": "cpu", **changes})[0]


def opened_identity(folder: Path, **changes: Any) -> dict[str, str]:
    return open_lerobot_policy(str(folder), ROBOT, "cpu", **changes)[1]


def part(observation: Observation, *rows: int) -> Observation:
    chosen = list(rows)
    images = {name: image[chosen] for name, image in observation.images.items()}
    return Observation(images, observation.state[chosen], [observation.instruction[row] for row in chosen])


def test_what_lerobot_would_execute(act: Path) -> None:
    policy = opened(act)
    assert [(camera.name, camera.height) for camera in policy.embodiment.cameras] == [
        ("agentview", SIZE),
        ("wrist", SIZE),
    ]
    assert (policy.embodiment.chunk, policy.embodiment.control_hz, policy.embodiment.gripper_index) == (4, 20.0, 6)
    seen = policy.embodiment.fake_observation(3)
    config = ACTConfig(**ACT, **features("agentview", "wrist"), device="cpu", push_to_hub=False)
    theirs = get_policy_class("act").from_pretrained(act, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(act))
    batch: dict[str, Any] = {
        f"observation.images.{name}": torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
        for name, image in seen.images.items()
    }
    batch |= {"observation.state": torch.from_numpy(seen.state), "task": list(seen.instruction)}
    with torch.inference_mode():
        expected = [after(theirs.select_action(before(dict(batch)))).numpy() for _ in range(4)]
    np.testing.assert_allclose(policy.act(seen).actions, np.stack(expected, axis=1), atol=1e-5)
    assert policy.act(seen).timing["inference_ms"] > 0
    assert policy.describe()["policy"] == "lerobot act"


@pytest.mark.parametrize("kind", ["act", "diffusion", "vqbet", "smolvla"])
def test_calls_stand_alone(kind: str, request: pytest.FixtureRequest) -> None:
    """Whatever was asked before, and in whatever batch, an observation gets the same actions."""
    policy = opened(request.getfixturevalue(kind))
    seen = policy.embodiment.fake_observation(3)
    together = policy.act(seen).actions
    for rows in ((2,), (1, 0), (0, 2, 1)):
        np.testing.assert_allclose(policy.act(part(seen, *rows)).actions, together[list(rows)], atol=1e-4)
    assert np.abs(np.diff(together, axis=0)).max() > 1e-3, "observations make a difference"


def test_random_numbers_have_a_seed(diffusion: Path) -> None:
    policies = [opened(diffusion, seed=seed) for seed in (0, 0, 1)]
    seen = policies[0].embodiment.fake_observation(2)
    before = torch.get_rng_state()
    first, same, other = (policy.act(seen).actions for policy in policies)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3
    assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers are left alone"
    assert policies[2].describe()["seed"] == 1


def test_the_chunk_is_what_is_executed(vqbet: Path) -> None:
    """VQ-BeT has another name for the number of actions that it executes until it looks again."""
    policy = opened(vqbet)
    assert policy.embodiment.chunk == VQBET["action_chunk_size"]
    assert policy.act(policy.embodiment.fake_observation(2)).actions.shape == (2, 3, 7)


def test_files_of_the_hub(smolvla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the checkpoint replaces are not asked for; a network or tokenizer that is not here is named."""
    folder = shutil.copytree(smolvla, tmp_path / "copy")
    write(folder, load_vlm_weights=True)
    seen = opened(folder).embodiment.fake_observation(1)
    np.testing.assert_array_equal(opened(folder).act(seen).actions, opened(smolvla).act(seen).actions)
    before = folder / "policy_preprocessor.json"
    here, there = json.loads((folder / "config.json").read_text())["vlm_model_name"], "nobody/nothing"
    for file in (before, folder / "config.json"):
        file.write_text(file.read_text().replace(here, there))
        with pytest.raises(
            ValueError, match=r"needs files of the hub .* name a folder with them in config.json"
        ) as error:
            opened(folder)
        assert "\n" not in str(error.value)


def test_weights_that_were_not_loaded(act: Path, tmp_path: Path) -> None:
    """Some policies of lerobot only print that their weights cannot be read, and go on with random ones."""
    policy = opened(act)._parts.policy
    _check_weights(policy, act)
    weights = load_file(act / "model.safetensors")
    last = sorted(weights)[-1]
    for content in ({**weights, last: weights[last] + 1}, {"nothing": torch.zeros(1)}):
        save_file(content, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"has not loaded the weights in model.safetensors"):
            _check_weights(policy, tmp_path)


def test_weights_that_the_file_lacks(act: Path, tmp_path: Path) -> None:
    """Some policies of lerobot only print what is missing, and keep its random numbers."""
    policy = opened(act)._parts.policy
    weights = load_file(act / "model.safetensors")
    missing = weights.pop("model.action_head.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has not loaded the weights in .*\(model.action_head.weight\)"):
        _check_weights(policy, tmp_path)
    save_file({**weights, "by.another.name": missing}, tmp_path / "model.safetensors")
    _check_weights(policy, tmp_path)


def test_several_observations_are_refused(diffusion: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(diffusion, tmp_path / "copy")
    write(folder, n_obs_steps=2, n_action_steps=3)
    with pytest.raises(ValueError, match=r"reads 2 observations .*: train it with --policy.n_obs_steps=1"):
        opened(folder)


def test_nothing_is_downloaded_that_the_checkpoint_replaces(act: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(act, tmp_path / "copy")
    write(folder, pretrained_backbone_weights="ResNet18_Weights.IMAGENET1K_V1")
    policy = opened(folder)
    seen = policy.embodiment.fake_observation(1)
    np.testing.assert_array_equal(policy.act(seen).actions, opened(act).act(seen).actions)
    assert policy._parts.policy.config.pretrained_backbone_weights is None


def test_cameras_of_other_names(tmp_path: Path) -> None:
    config = ACTConfig(**ACT, **features("image", "image2"), device="cpu", push_to_hub=False)
    folder = saved(config, tmp_path / "pretrained_model")
    policy = opened(folder, cameras={"agentview": "image2", "wrist": "image"})
    assert policy.embodiment.camera_names == ("wrist", "agentview")
    plain = opened(folder)
    seen = policy.embodiment.fake_observation(1)
    renamed = Observation(
        {"image": seen.images["wrist"], "image2": seen.images["agentview"]}, seen.state, seen.instruction
    )
    np.testing.assert_array_equal(policy.act(seen).actions, plain.act(renamed).actions)
    turned = opened_identity(folder, cameras={"agentview": "image", "wrist": "image2"})
    assert turned != opened_identity(folder, cameras={"agentview": "image2", "wrist": "image"}), "no resume with others"
    for wrong in ({"agentview": "top"}, {"agentview": "image", "wrist": "image"}):
        with pytest.raises(ValueError, match="cameras names"):
            opened(folder, cameras=wrong)


def test_images_of_another_size_are_resized_unless_the_policy_does_it(act: Path) -> None:
    policy = opened(act)
    seen = policy.embodiment.fake_observation(1)
    large = Observation({k: v.repeat(2, 1).repeat(2, 2) for k, v in seen.images.items()}, seen.state, seen.instruction)
    shapes = []
    policy._parts.before.register_before_step_hook(lambda _, t: shapes.append(t["observation"]))
    policy.act(large)
    assert shapes[0]["observation.images.wrist"].shape[-2:] == (SIZE, SIZE)
    policy._parts.policy.config.resize_imgs_with_padding = (64, 64)
    shapes.clear()
    policy.act(large)
    assert shapes[0]["observation.images.wrist"].shape[-2:] == (2 * SIZE, 2 * SIZE)


def test_eval_libero_plays_it(act: Path, tmp_path: Path) -> None:
    given = [f"checkpoint='lerobot:{act}'", f"suite={toy_suite.NAME}", f"output={tmp_path}", "threads=1"]
    short = ["episodes_per_task=1", "workers=0", "videos=0", "protocol.max_steps=6"]
    config = compose("eval_libero", [*given, *short])
    (report,) = eval_libero.run(config, "eval_libero")
    assert [episode.error for episode in report.episodes] == [None] * 3
    described = json.loads((tmp_path / toy_suite.NAME / "report.json").read_text())["reproduce"]["policy"]
    assert described["policy"] == "lerobot act"
    assert len(described["processors_sha256"]) == 64


def test_record_demonstrations_corrects_it(act: Path, tmp_path: Path) -> None:
    given = [
        f"checkpoint='lerobot:{act}'",
        "suite=tabletop_object",
        f"image_size={SIZE}",
        f"output={tmp_path / 'data'}",
    ]
    record_demonstrations.main(compose("record_demonstrations", [*given, "episodes=1", "workers=0", "patience=5"]))
    made = json.loads((tmp_path / "data" / "meta" / "recording.json").read_text())
    assert made["policy"]["processors_sha256"] == opened_identity(act)["processors_sha256"]
    assert 0 < made["intervention_share"] <= 1


def test_a_recording_of_another_image_size_is_refused_before_the_weights_are_loaded(
    act: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_demonstrations, "open_any_policy", lambda *_, **__: pytest.fail("loaded"))
    words = [f"checkpoint='lerobot:{act}'", "suite=tabletop_object", "image_size=128", f"output={tmp_path / 'data'}"]
    with pytest.raises(ValueError, match=f"the policy sees .* {SIZE} x {SIZE} pixels, and the recording has 128 x 128"):
        record_demonstrations.main(compose("record_demonstrations", words))


def write(folder: Path, **changes: Any) -> None:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, **changes}))


def feature(folder: Path, key: str, value: Any) -> None:
    body = json.loads((folder / "config.json").read_text())
    write(folder, input_features={**body["input_features"], key: value})


def statistics(folder: Path, step: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    (file,) = folder.glob(f"*_{step}_processor.safetensors")
    saved = load_file(file)
    change(saved)
    save_file(saved, file)


def step_of_the_future(folder: Path) -> None:
    file = folder / "policy_preprocessor.json"
    body = json.loads(file.read_text())
    body["steps"].insert(1, {"registry_name": "fold_laundry", "config": {}})
    file.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: write(f, n_action_steps=7), "cannot read .*n_action_steps"),
        (lambda f: write(f, temporal_ensemble_coeff=0.01, n_action_steps=1), "protocol.temporal_ensemble=0.01"),
        (
            lambda f: feature(f, "observation.environment_state", {"type": "ENV", "shape": [3]}),
            "reads observation.environment_state, which robots here",
        ),
        (
            lambda f: feature(f, "observation.state", {"type": "STATE", "shape": [6]}),
            r"observation.state \[6\], .*\[8\]",
        ),
        (lambda f: write(f, output_features={"action": {"type": "ACTION", "shape": [14]}}), r"action \[14\], .*\[7\]"),
        (lambda f: write(f, type="wall_e"), "type 'wall_e', which lerobot .* lerobot_policy_wall_e"),
        (lambda f: write(f, field_of_the_future=1), "another version saved it"),
        (lambda f: (f / "config.json").write_text('{"a": 1}'), "does not say a type of policy"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (
            lambda f: (f / "policy_preprocessor.json").unlink(),
            "no policy_preprocessor.json: it was saved half, or by lerobot before 0.4",
        ),
        (lambda f: (f / "policy_postprocessor.json").write_text("[]"), "policy_postprocessor.json"),
        (lambda f: (f / "policy_postprocessor.json").write_text("{}"), "has no list of steps"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"0" * 100), "cannot load the act policy"),
        (lambda f: write(f, dim_model=64), "cannot load the act policy"),
        (step_of_the_future, "policy_preprocessor.json has the step fold_laundry, which lerobot .* does not know"),
        (lambda f: (f / "policy_preprocessor.json").write_text('{"steps": ['), "policy_preprocessor.json"),
        (
            lambda f: next(f.glob("*_normalizer_processor.safetensors")).unlink(),
            "has no .*_normalizer_processor.* incomplete",
        ),
        (
            lambda f: statistics(f, "normalizer", lambda s: s.pop("observation.state.mean")),
            "NormalizerProcessorStep has no mean of observation.state",
        ),
        (
            lambda f: statistics(f, "normalizer", lambda s: s["observation.images.wrist.std"].fill_(torch.nan)),
            "has NaN or infinite numbers as std of observation.images.wrist",
        ),
        (
            lambda f: statistics(f, "unnormalizer", lambda s: [s.pop(k) for k in list(s) if k.startswith("action.")]),
            "UnnormalizerProcessorStep has no mean of action",
        ),
        (
            lambda f: statistics(f, "unnormalizer", lambda s: s.update({"action.mean": s["action.mean"][:6].clone()})),
            "cannot act on its own inputs|of two checkpoints",
        ),
        (
            lambda f: statistics(f, "unnormalizer", lambda s: s["action.std"].fill_(9.0)),
            "are of two checkpoints: other statistics of action",
        ),
    ],
)
def test_what_cannot_run(act: Path, tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    folder = shutil.copytree(act, tmp_path / "copy")
    change(folder)
    with pytest.raises(ValueError, match=said) as error:
        opened(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (SHIPPED, "give checkpoint=.*tabletop_object without lerobot:"),
        ("/nowhere/at/all", "no checkpoint folder at"),
        ("nobody/nothing", "cannot be downloaded from the hub"),
    ],
)
def test_other_places(source: Path | str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        opened(source)


def test_the_folder_of_a_training(act: Path, tmp_path: Path) -> None:
    shutil.copytree(act, tmp_path / "run" / "checkpoints" / "last" / "pretrained_model")
    with pytest.raises(ValueError, match=r"give checkpoint=lerobot:.*checkpoints/last/pretrained_model"):
        opened(tmp_path / "run")


def test_and_the_reverse(act: Path) -> None:
    with pytest.raises(ValueError, match=f"holds a policy of lerobot: give checkpoint=lerobot:{act}"):
        open_any_policy(str(act))


@pytest.mark.parametrize("wrong", [{"statistics": "libero"}, {"router": {"name": "random"}}])
def test_keys_of_our_checkpoints(act: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a checkpoint, not"):
        open_any_policy(f"lerobot:{act}", embodiment=asdict(ROBOT), **wrong)


def test_cameras_are_for_policies_of_lerobot() -> None:
    with pytest.raises(ValueError, match="needs checkpoint=lerobot:PATH, not random"):
        open_any_policy("random", embodiment=asdict(ROBOT), cameras={"wrist": "image"})


@pytest.mark.parametrize(("key", "value"), [("kind", "eager"), ("dtype", "bfloat16")])
def test_an_engine_is_for_checkpoints(key: str, value: str) -> None:
    engine = {"kind": "auto", "dtype": None} | {key: value}
    with pytest.raises(ValueError, match=f"engine.{key}={value} needs a checkpoint, not random"):
        open_any_policy("random", embodiment=asdict(ROBOT), engine=engine)


def test_another_configuration_is_another_policy(tmp_path: Path) -> None:
    found = []
    (tmp_path / "model.safetensors").touch()
    for steps in (10, 50):
        (tmp_path / "config.json").write_text(f'{{"num_inference_steps": {steps}}}')
        found.append(_identity(tmp_path))
    assert found[0] != found[1]


def test_reports_have_a_name_of_their_own() -> None:
    assert report_name("lerobot:/runs/act/checkpoints/000010/pretrained_model") == "act_000010"
    assert report_name("lerobot:me/policy") == "me_policy"
    assert report_name("runs/policy") == "policy"
