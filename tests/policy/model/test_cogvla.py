from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.tests.support.tiny_model import ROBOT, alone, tiny_config, tiny_input, tiny_model

ROUTINGS: dict[str, dict[str, Any]] = {
    "bypass": {"scale": "values"},
    "drop": {"mode": "drop"},
    "renumber": {"position_policy": "renumber", "scale": "all", "mode": "drop"},
    "faithful": {"position_policy": "renumber", "scale": "all", "summary": "faithful"},
    "no_efa": {"efa": False},
    "film_patches": {"efa": False, "film": True},
    "no_lfp": {"lfp": False},
    "no_catten": {"attention": "causal"},
    "bidirectional": {"attention": "bidirectional"},
    "none": {"efa": False, "lfp": False, "attention": "causal"},
    "sum": {"fusion": "sum"},
    "concat": {"fusion": "concat"},
    "experts": {"fusion": "experts"},
}
HEADS: dict[str, dict[str, Any]] = {
    "new": {},
    "paper": {"tokens_per_step": "action_dim", "placeholder": "zero", "shifted": True},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("routing", ROUTINGS)
@torch.inference_mode()
def test_a_batch_answers_what_each_sample_answers_alone(routing: str, head: str) -> None:
    model, inputs = tiny_model(HEADS[head], **ROUTINGS[routing]).eval(), tiny_input((3, 7, 5, 1))
    together = model(inputs)
    assert together.actions.shape == (4, 4, 3)
    assert together.vision.shape == (4, model.vision_tokens, model.width)
    for index in range(4):
        single = model(alone(inputs, index))
        torch.testing.assert_close(together.actions[index], single.actions[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together.actions[0], together.actions[1], atol=1e-3)


@pytest.mark.parametrize("routing", ["bypass", "drop", "no_efa", "none"])
def test_gradient_reaches_every_parameter(routing: str) -> None:
    model, inputs = tiny_model(**{"scale": "values", **ROUTINGS[routing]}), tiny_input()
    model(inputs).actions.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_which_routers_learn_depends_on_what_the_probability_scales() -> None:
    learns = {}
    for scale in ("visual_only", "values"):
        model: Any = tiny_model(scale=scale)
        model(tiny_input()).actions.square().sum().backward()
        learns[scale] = [
            layer for layer, router in model.decoder.routers.items() if router.logits.weight.grad.abs().sum() > 0
        ]
    assert learns["values"] == ["1", "2", "3"]
    assert "1" in learns["visual_only"]
    assert "3" not in learns["visual_only"]


@torch.inference_mode()
def test_the_instruction_decides_what_is_seen_and_kept() -> None:
    model, inputs = tiny_model().eval(), tiny_input((5, 5))
    same_scene = ModelInput(
        inputs.pixels[:1].expand(2, -1, -1, -1, -1), inputs.text_ids, inputs.text_mask, inputs.state[:1].expand(2, -1)
    )
    output = model(same_scene, debug=True)
    assert output.debug is not None
    assert not torch.allclose(output.vision[0], output.vision[1], atol=0.1)
    assert any(kept[0].tolist() != kept[1].tolist() for kept in output.debug["kept"].values())
    weights = output.debug["stream_weights"]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)


@torch.inference_mode()
def test_text_features_can_be_kept_for_an_instruction() -> None:
    model, inputs = tiny_model().eval(), tiny_input()
    text = model.encode_text(inputs.text_ids, inputs.text_mask)
    unread = replace(inputs, text_ids=torch.zeros_like(inputs.text_ids))
    assert torch.equal(model(unread, text=text).actions, model(inputs).actions)


@torch.inference_mode()
def test_the_towers_see_the_order_of_the_words() -> None:
    """ "stack red on blue" and "stack blue on red": the same words, another condition of both towers."""
    ids_BT = torch.tensor([[3, 7, 11, 5], [3, 5, 11, 7]])
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    for summary in ("words", "contextual"):
        model = tiny_model(summary=summary).eval()
        condition = model.encode_text(ids_BT, mask_BT).vision
        assert condition.weights_B2 is not None
        films = [film for scale_and_shift in condition.films if scale_and_shift for film in scale_and_shift]
        for part_B in (*[film.transpose(0, 1) for film in films], condition.weights_B2):
            assert torch.allclose(part_B[0], part_B[1], atol=1e-6) == (summary == "words")
        inputs = replace(tiny_input((4, 4)), text_ids=ids_BT, text_mask=mask_BT)
        longer = replace(inputs, text_ids=F.pad(ids_BT, (0, 3), value=9), text_mask=F.pad(mask_BT, (0, 3)))
        torch.testing.assert_close(model(longer).actions, model(inputs).actions, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_order_adds_nothing_before_training() -> None:
    torch.manual_seed(0)
    words = CogVLA(tiny_config(summary="words"), ROBOT).eval()
    torch.manual_seed(0)
    contextual = CogVLA(tiny_config(summary="contextual"), ROBOT).eval()
    assert torch.equal(words(tiny_input()).actions, contextual(tiny_input()).actions)
    assert CogVLA(tiny_config(efa=False), ROBOT).order is None


@torch.inference_mode()
def test_summary_of_words_and_faithful_summary() -> None:
    inputs = tiny_input((2, 4))
    embedded = tiny_model().decoder.embed(inputs.text_ids)
    special = tiny_model().decoder.embed(torch.tensor([48, 49])).sum(0)
    words = torch.stack((embedded[0, :2].mean(0), embedded[1].mean(0)))
    faithful = torch.stack(((embedded[0, :2].sum(0) + special) / 4, (embedded[1].sum(0) + special) / 6))
    for summary, expected in (("words", words), ("faithful", faithful)):
        model = tiny_model(summary=summary)
        condition = model.encode_text(inputs.text_ids, inputs.text_mask).vision
        assert condition.weights_B2 is not None
        torch.testing.assert_close(condition.weights_B2, model.vision.fusion.weights(expected))


@pytest.mark.parametrize("head", HEADS)
def test_weights_survive_a_round_trip(head: str) -> None:
    first, second = tiny_model(HEADS[head], seed=0).eval(), tiny_model(HEADS[head], seed=1).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tiny_input()).actions, second(tiny_input()).actions)


def test_it_learns_to_obey() -> None:
    """One scene, two instructions, two answers: a few steps must pull them apart."""
    model, inputs = tiny_model(scale="values"), tiny_input((4, 4))
    scene = replace(inputs, pixels=inputs.pixels[:1].expand(2, -1, -1, -1, -1), state=inputs.state[:1].expand(2, -1))
    target = torch.stack((torch.full((4, 3), 0.5), torch.full((4, 3), -0.5)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        loss = (model(scene).actions - target).abs().mean()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1
