"""The published code's numbers, stage by stage, from weights in its own naming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from cogvla.policy.config import CogVLAConfig
from cogvla.policy.import_cogvla import import_weights
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.model import CogVLA
from cogvla.routing.schedule import keep_ratios

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "cogvla_reference"
pytestmark = pytest.mark.skipif(not FIXTURE.is_dir(), reason="the reference's outputs are not beside this checkout")

TOLERANCE = 1e-4
FAITHFUL = {
    "summary": "faithful",
    "film_init": None,
    "period": 31,
    "position_policy": "renumber",
    "scale": "all",
}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def sizes() -> dict:
    return json.loads((FIXTURE / "fixture.json").read_text())


@pytest.fixture(scope="module")
def model(sizes: dict) -> CogVLA:
    tower = {"patch_size": sizes["patch_size"], "depth": sizes["vit_depth"], "heads": sizes["vit_heads"]}
    plain = {"mean": [0, 0, 0], "std": [1, 1, 1]}  # the fixture's pixels are already normalised
    dinov2 = {"width": sizes["dino_dim"], "class_token": True, "registers": sizes["dinov2_registers"], "layer_scale": 1}
    config = CogVLAConfig.from_dict(
        {
            "vision": {
                "dinov2": {**tower, **plain, **dinov2},
                "siglip": {**tower, **plain, "width": sizes["siglip_dim"]},
                "aggregation_tokens": sizes["agg"],
            },
            "language": {
                "vocab_size": sizes["vocab_size"],
                "width": sizes["hidden"],
                "intermediate": sizes["inter"],
                "layers": sizes["layers"],
                "heads": sizes["llm_heads"],
                "rms_norm_eps": sizes["rms_norm_eps"],
                "bos_token": 1,
                "stop_token": 2,
            },
            "head": {"tokens_per_step": "action_dim", "placeholder": "zero", "shifted": True},
            "routing": FAITHFUL,
        }
    )
    side = sizes["image_size"]
    cameras = tuple(Camera(f"view{view}", side, side) for view in range(sizes["images"]))
    robot = Embodiment("reference", cameras, sizes["proprio_dim"], sizes["action_dim"], sizes["chunk"], 20.0)
    model = CogVLA(config, robot).eval()
    files = (load_file(FIXTURE / f"{name}.safetensors") for name in ("model", "action_head", "proprio_projector"))
    model.load_state_dict(import_weights(*files))
    return model


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(FIXTURE / "cases.safetensors")


def test_schedule_routes_the_reference_layers(sizes: dict) -> None:
    ratios = keep_ratios(sizes["lfp_type"], sizes["layers"], sizes["lfp_avg"], period=31)
    assert [layer for layer, ratio in enumerate(ratios) if ratio is not None] == sizes["lfp_target_layers"]


@pytest.mark.parametrize("case", ["0", "1", "2"])
@torch.inference_mode()
def test_every_stage(model: CogVLA, cases: dict[str, torch.Tensor], sizes: dict, case: str) -> None:
    ids_1T = cases[f"{case}.input_ids"][:, 1:]  # bos is placed by the layout
    text = model.encode_text(ids_1T, torch.ones_like(ids_1T, dtype=torch.bool))
    views = sizes["images"]
    channels = rearrange(cases[f"{case}.pixel_values"], "b (v t c) h w -> t b v c h w", v=views, t=2)
    # The fixture's streams see unrelated random pixels, so each tower gets its own.
    streams = [model.vision.streams(channels[stream], text.vision)[stream] for stream in range(2)]
    for stream, name in enumerate(("dinov2", "siglip")):
        for view, tokens in enumerate(streams[stream].chunk(views, dim=1)):
            assert relative(tokens, cases[f"{case}.vision.view{view}.{name}"]) < TOLERANCE, (name, view)

    vision_BND = model.vision.fusion(streams, text.vision.weights_B2)
    output = model.decide(vision_BND, cases[f"{case}.proprio"][None], text, debug=True)
    assert output.debug is not None
    layout = output.debug["layout"]
    for layer in range(sizes["layers"]):
        assert relative(output.debug["hidden"][layer], cases[f"{case}.hidden.layer{layer}"]) < TOLERANCE, layer
    for layer in sizes["lfp_target_layers"]:
        expected = cases[f"{case}.kept.layer{layer}"]
        visual = expected[(expected >= layout.visual.start) & (expected < layout.visual.stop)] - layout.visual.start
        assert output.debug["kept"][layer][0].tolist() == visual.tolist(), layer
    assert relative(output.states, cases[f"{case}.action_hidden"]) < TOLERANCE
    assert relative(output.actions, cases[f"{case}.normalized_actions"]) < TOLERANCE

    fast = model.decide(vision_BND, cases[f"{case}.proprio"][None], text)
    assert relative(fast.actions, cases[f"{case}.normalized_actions"]) < TOLERANCE


def test_incomplete_weights_say_what_is_missing() -> None:
    head = load_file(FIXTURE / "action_head.safetensors")
    weights = load_file(FIXTURE / "model.safetensors")
    del weights["featurizer_proj.fc1.weight"]
    with pytest.raises(ValueError, match=r"featurizer_proj\.fc1\.weight"):
        import_weights(weights, head, load_file(FIXTURE / "proprio_projector.safetensors"))
