from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer

from cogvla.policy.interface import Camera
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import IMAGENET_MEAN, IMAGENET_STD, TowerConfig, VisionConfig
from cogvla.policy.model.vision import DualVision
from cogvla.tests.support.tiny_model import ROBOT, tiny_config, tiny_input, tiny_model

STYLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dinov2": {"class_token": True, "registers": 2, "layer_scale": 0.3},
    "class token": {"class_token": True},
}


@pytest.mark.parametrize("style", STYLES)
@torch.inference_mode()
def test_without_routing_a_tower_is_timms(style: str) -> None:
    """Also the folded normalisation: timm gets the normalised image, ours the bytes."""
    torch.manual_seed(0)
    tower = TowerConfig(patch_size=8, width=16, depth=3, heads=2, **STYLES[style])
    config = VisionConfig(tower, tower, aggregation_tokens=4)
    vision: Any = DualVision(config, replace(tiny_config().routing, efa=False), ROBOT, width=32)
    theirs = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        class_token=tower.class_token,
        reg_tokens=tower.registers,
        no_embed_class=True,
        init_values=tower.layer_scale,
        num_classes=0,
        global_pool="",
    ).eval()
    theirs.load_state_dict(vision.towers["dinov2"].vit.state_dict(), strict=False)
    pixels = tiny_input().pixels
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = ((pixels / 255 - mean) / std).flatten(0, 1)
    expected = theirs.forward_intermediates(image, indices=[1], output_fmt="NLC", intermediates_only=True, norm=False)[
        0
    ]
    ours = vision.streams(pixels, vision.condition(torch.zeros(3, 32)))[0]
    torch.testing.assert_close(ours, expected.unflatten(0, (3, 2)).flatten(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("efa", [True, False])
@torch.inference_mode()
def test_film_goes_between_attention_and_mlp_and_the_short_last_block_equals_the_whole_one(efa: bool) -> None:
    model: Any = tiny_model(efa=efa, film=True).eval()
    inputs = tiny_input()
    text = model.encode_text(inputs.text_ids, inputs.text_mask)
    streams = model.vision.streams(inputs.pixels, text.vision)
    for name, film, stream in zip(model.vision.towers, text.vision.films, streams, strict=True):
        tower = model.vision.towers[name]
        vit = tower.vit
        mean, std = tower.offset / tower.gain, 1 / tower.gain
        x = vit.patch_embed(((inputs.pixels / 255 - mean[:, None, None]) / std[:, None, None]).flatten(0, 1))
        x = vit._pos_embed(x)
        if efa:
            x = torch.cat((x, tower.aggregation.tokens.expand(6, -1, -1)), 1)
        for index in range(2):
            block = vit.blocks[index]
            scale, shift = (parameter[index].repeat_interleave(2, 0) for parameter in film)
            x = x + block.ls1(block.attn(block.norm1(x)))
            x = x * scale + shift
            x = x + block.ls2(block.mlp(block.norm2(x)))
        expected = x[:, -6:] if efa else x[:, vit.num_prefix_tokens :]
        torch.testing.assert_close(stream, expected.unflatten(0, (3, 2)).flatten(1, 2), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_gaze_is_the_attention_that_the_last_block_pays() -> None:
    model: Any = tiny_model().eval()
    inputs = tiny_input()
    output = model(inputs, watch=True)
    assert output.gaze is not None
    text = model.encode_text(inputs.text_ids, inputs.text_mask)
    for name, film, gaze in zip(model.vision.towers, text.vision.films, output.gaze, strict=True):
        tower = model.vision.towers[name]
        seen: list[torch.Tensor] = []
        last = tower.vit.blocks[1].attn
        last.fused_attn = False  # timm then passes the attention through a module that can be watched
        last.attn_drop.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        x = torch.nn.functional.linear(_cut(inputs.pixels), *tower.embedding())
        whole = _all_rows(tower, x, film)
        last(whole)
        prefix = tower.vit.num_prefix_tokens
        torch.testing.assert_close(gaze.exp(), seen[0][:, :, -6:, prefix : prefix + 16], rtol=1e-4, atol=1e-5)


def _cut(pixels: torch.Tensor) -> torch.Tensor:
    return rearrange(pixels, "b v c (h p) (w q) -> (b v) (h w) (c p q)", p=8, q=8).float()


def _all_rows(tower: Any, x: torch.Tensor, film: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What the last computed block's attention is given."""
    vit = tower.vit
    prefix = [t.expand(len(x), -1, -1) for t in (vit.cls_token, vit.reg_token) if t is not None]
    x = torch.cat((*prefix, x + vit.pos_embed, tower.aggregation.tokens.expand(len(x), -1, -1)), 1)
    first = vit.blocks[0]
    x = x + first.ls1(first.attn(first.norm1(x)))
    x = x * film[0][0].repeat_interleave(2, 0) + film[1][0].repeat_interleave(2, 0)
    x = x + first.ls2(first.mlp(first.norm2(x)))
    return vit.blocks[1].norm1(x)


def test_bytes_and_floats_are_the_same_pixels() -> None:
    model, inputs = tiny_model().eval(), tiny_input()
    as_float = replace(inputs, pixels=inputs.pixels.float() / 255)
    torch.testing.assert_close(model(inputs).actions, model(as_float).actions, rtol=1e-4, atol=1e-5)


def test_the_unused_block_is_kept_only_on_request() -> None:
    config = tiny_config()
    usual: Any = CogVLA(config, ROBOT)
    assert len(usual.vision.towers["siglip"].vit.blocks) == 2
    kept: Any = CogVLA(replace(config, vision=replace(config.vision, drop_last_block=False)), ROBOT)
    assert len(kept.vision.towers["siglip"].vit.blocks) == 3
    assert kept.vision.towers["siglip"].computed == 2


def test_token_counts() -> None:
    assert tiny_model().vision_tokens == 2 * 6
    assert tiny_model(efa=False).vision_tokens == tiny_model(efa=False, film=True).vision_tokens == 2 * 16


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must all have one size"):
        CogVLA(tiny_config(), replace(ROBOT, cameras=(Camera("a", 32, 32), Camera("b", 64, 32))))
    with pytest.raises(ValueError, match="cannot be cut into patches of 8"):
        CogVLA(tiny_config(), replace(ROBOT, cameras=(Camera("a", 32, 36),)))
