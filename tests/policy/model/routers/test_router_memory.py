"""What token routers remember: what the network reads and returns, and what a policy keeps for each robot."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.interface import Observation, Remembering, begin_episode
from cogvla.policy.model.cogvla import CogVLA, Past
from cogvla.policy.model.routers.memory import MemoryLayout, Remembered, TokenMemory
from cogvla.policy.policy import CogVLAPolicy
from cogvla.routing.router import RouterConfig, RouterContext
from cogvla.tests.support.small_data import ROBOT, small_policy
from cogvla.tests.support.tiny_model import tiny_input, tiny_model

ROUTERS: dict[str, dict[str, Any]] = {
    "vla_pruner": {"name": "vla_pruner", "layers": (1,)},
    "spec_prune": {"name": "spec_prune", "layers": (1,)},
    "vla_iap": {"name": "vla_iap"},
    "progressive_video": {"name": "progressive_video"},
    "progressive_video after the projector": {"name": "progressive_video", "stage": "projector_out"},
    "adp": {"name": "adp", "layers": (0,)},
    "adp around vla_pruner": {"name": "adp", "layers": (1,), "options": {"base": "vla_pruner"}},
    "adp before the language model": {"name": "adp", "stage": "encoder_out", "options": {"base": "random"}},
}


def model_of(name: str, **routing: Any) -> CogVLA:
    router = RouterConfig(**{"budget": 4, **ROUTERS[name]})
    return tiny_model(**{"efa": False, "lfp": False, **routing}, router=asdict(router)).eval()


def policy_of(name: str, **routing: Any) -> CogVLAPolicy:
    router = RouterConfig(**{"budget": 4, **ROUTERS[name]})
    return small_policy(**{"efa": False, "film": True, "lfp": False, **routing}, router=asdict(router))


def seen(slots: list[Any], seed: int) -> Observation:
    """One observation for each robot; it depends on the robot and the seed only."""
    rows = [ROBOT.fake_observation(1, 100 * (sum(str(slot).encode()) % 97) + seed) for slot in slots]
    return replace(Observation.stack(rows), slots=slots)


# --- the network ---


def layout(**shapes: tuple[int, ...]) -> MemoryLayout:
    return MemoryLayout(3, {"age": (), **shapes}, (0, 1, 2), (4, 4), 1)


def test_what_is_older_than_the_episode_is_not_read() -> None:
    like = torch.zeros(())
    shapes = layout(state=(3, 3), tokens=(3, 32, 5), attention=(3, 32), seen=(3, 32))
    memory = {name: torch.full_like(value, 9) for name, value in shapes.empty(2, like).items()}
    memory["age"] = torch.tensor([0, 2])
    state, pixels, tokens = torch.ones(2, 4), torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), torch.ones(2, 32, 5)
    past = Remembered(shapes, memory, state, pixels)
    needs = {"age_B", "motion_BOC", "past_attention_BON", "past_seen_BON"}
    items = past.items(needs, 3, 2, None)
    assert items["age_B"].tolist() == [0, 0, 2, 2]
    assert items["motion_BOC"][::2, :, 0].tolist() == [[0, 0, 0], [0, 0, -8]]
    assert items["past_attention_BON"][:, :, 0].tolist() == [[0, 0, 0]] * 2 + [[0, 9, 9]] * 2
    assert items["past_seen_BON"][:, :, 0].tolist() == [[False] * 3] * 2 + [[False, True, True]] * 2
    assert past.history(tokens, 3, 2)[::2, :, 0, 0].tolist() == [[1, 1, 1], [1, 9, 9]]
    assert past.items(needs, 1, 1, None)["age_B"].tolist() == [0, 1]
    new = past.next(tokens, (torch.full((2, 32), 0.5), torch.arange(32).expand(2, -1) > 0))
    assert new["age"].tolist() == [1, 3]
    assert new["tokens"][:, :, 0, 0].tolist() == [[9, 9, 1], [9, 9, 1]]
    assert new["attention"][:, -1, :2].tolist() == [[0, 0.5], [9, 0.5]], "not seen: as before, and 0 without a before"
    with pytest.raises(ValueError, match="must have the shapes"):
        Remembered(shapes, {"age": memory["age"]}, state, pixels)


def test_tokens_are_followed_through_the_language_model() -> None:
    shapes = layout(attention=(3, 6), seen=(3, 6))
    memory = shapes.empty(1, torch.zeros(()))
    memory["age"], memory["attention"] = torch.tensor([3]), torch.arange(18.0).view(1, 3, 6)
    pixels = torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8)
    tokens = TokenMemory(Remembered(shapes, memory, torch.zeros(1, 4), pixels), torch.tensor([[5, -1, 2, 3]]))
    tokens.keep(torch.tensor([[0, 1, 3]]))
    assert tokens.present_BN is not None
    assert tokens.present_BN.tolist() == [[5, -1, 3]]
    assert tokens.items({"past_attention_BON"}, 1)["past_attention_BON"].tolist() == [[[17, 0, 15]]]
    tokens.read(torch.tensor([[0.5, 0.9, 0.25]]))
    new = tokens.next(None)
    assert new["attention"][0, -1].tolist() == [12, 13, 14, 0.25, 16, 0.5]
    assert new["seen"][0, -1].tolist() == [0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("name", ["vla_pruner", "adp around vla_pruner"])
@torch.inference_mode()
def test_the_watched_layer_is_that_of_the_trace(name: str) -> None:
    model, inputs = model_of(name), tiny_input()
    output = model(replace(inputs, memory=model.empty_memory(3)), debug=True)
    assert model.router is not None
    assert model.router.memory is not None
    assert output.memory is not None
    assert output.debug is not None
    layer, present = model.router.memory.watched, output.debug["kept"][1]
    assert layer == 1, "of four, after tokens were removed"
    found, expected = output.memory["attention"][:, -1], output.debug["attention"][layer]
    torch.testing.assert_close(found.gather(1, present), expected)
    assert output.memory["seen"][:, -1].sum(1).tolist() == [8, 8, 8]
    dense = model(replace(inputs, memory=model.empty_memory(3), dense=True), debug=True)
    assert dense.memory is not None
    assert dense.debug is not None
    torch.testing.assert_close(dense.memory["attention"][:, -1], dense.debug["attention"][layer])
    plain = model.with_router(RouterConfig()).eval()
    torch.testing.assert_close(dense.actions, plain(inputs).actions)


@torch.inference_mode()
def test_the_past_of_tokens_that_lfp_leaves() -> None:
    router = RouterConfig("vla_pruner", 1, layers=(3,))
    model = tiny_model(efa=False, lfp=True, mode="drop", router=asdict(router)).eval()
    inputs, contexts = tiny_input(), []
    assert model.router is not None
    model.router.layers["3"].register_forward_pre_hook(lambda module, args: contexts.append(args[1]))
    memory = model(replace(inputs, memory=model.empty_memory(3))).memory
    output = model(replace(inputs, memory=memory), debug=True)
    assert memory is not None
    assert output.debug is not None
    left = output.debug["kept"][2]
    torch.testing.assert_close(contexts[1].past_attention_BON[:, -1], memory["attention"][:, -1].gather(1, left))


@torch.inference_mode()
def test_patches_that_stay_the_same_are_alike() -> None:
    model, inputs = model_of("spec_prune"), tiny_input()
    contexts: list[RouterContext] = []
    assert model.router is not None
    model.router.layers["1"].register_forward_pre_hook(lambda module, args: contexts.append(args[1]))
    first = model(replace(inputs, memory=model.empty_memory(3)))
    other = inputs.pixels.clone()
    other[0, 1, :, :8, 8:16] = 255 - other[0, 1, :, :8, 8:16]  # patch 1 of the second view
    moved = replace(inputs, pixels=other, state=inputs.state + torch.tensor([0.5, 0, 0, 0, 0]), memory=first.memory)
    model(moved)
    alike, motion = contexts[1].alike_BON, contexts[1].motion_BOC
    assert alike is not None
    assert motion is not None
    changed = alike[:, -1] < 0.999
    assert changed.nonzero().tolist() == [[0, 17]]
    torch.testing.assert_close(motion[:, -1], torch.tensor([[0.5, 0, 0]]).expand(3, -1))
    assert (contexts[0].age_B, contexts[1].age_B) != (None, None)


def test_black_patches_that_stay_black_are_alike() -> None:
    layout = MemoryLayout.of({"alike_BON"}, 1, (0, 1, 2), (1, 3, 4, 12), (3, 4), (1, 3), None)
    now = torch.zeros(1, 1, 3, 4, 12, dtype=torch.uint8)
    before = now.clone()
    before[..., 4:8] = 7  # only this patch was not black
    memory = {"age": torch.tensor([1]), "pixels": before[:, None]}
    alike = Remembered(layout, memory, torch.zeros(1, 3), now).items({"alike_BON"}, 1, 1, None)["alike_BON"]
    assert alike.tolist() == [[[1.0, 0.0, 1.0]]]


@torch.inference_mode()
def test_motion_reads_the_entries_of_the_hand() -> None:
    model = tiny_model(
        efa=False, lfp=False, router=asdict(RouterConfig("adp", 4, layers=(0,), hand=(4, 0, 1, 2)))
    ).eval()
    inputs = tiny_input()
    memory = model(replace(inputs, memory=model.empty_memory(3))).memory
    assert memory is not None
    torch.testing.assert_close(memory["state"][:, -1], inputs.state[:, [4, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"router\.hand names the entries \[3, 4, 5\] of the state, which has 5"):
        tiny_model(efa=False, lfp=False, router=asdict(RouterConfig("adp", 4, layers=(0,), hand=(3, 4, 5))))
    with pytest.raises(ValueError, match=r"router\.hand must name x, y and z"):
        RouterConfig("adp", hand=(0, 1))


@pytest.mark.parametrize("name", ROUTERS)
@torch.inference_mode()
def test_the_past_of_training_gives_the_memory_of_playing(name: str) -> None:
    """Replayed from earlier observations, and decided one after the other."""
    model, now = model_of(name), tiny_input()
    decisions, steps = model.history
    assert steps == model.embodiment.chunk
    before = [tiny_input(seed=1 + step) for step in range(decisions)]
    before = [replace(one, text_ids=now.text_ids, text_mask=now.text_mask) for one in before]
    age = torch.tensor([0, 1, decisions])
    past = Past(torch.stack([b.pixels for b in before], 1), torch.stack([b.state for b in before], 1), age)
    found = model(replace(now, past=past)).actions
    for row in range(3):
        memory = model.empty_memory(1)
        for one in (*before[decisions - int(age[row]) :], now):
            output = model(replace(one.rows(torch.tensor([row])), memory=memory))
            memory = output.memory
        torch.testing.assert_close(output.actions[0], found[row], rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_weights_of_a_router_with_history() -> None:
    model, now = model_of("progressive_video").train(), tiny_input()
    past = Past(now.pixels[:, None].flip(-1).repeat(1, 2, 1, 1, 1, 1), now.state[:, None].repeat(1, 2, 1),
                torch.tensor([0, 1, 2]))  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(replace(now, past=past)).actions.sum().backward()
    assert model.router is not None
    for weight, parameter in model.router.named_parameters():
        assert parameter.grad is not None, weight
    first = next(model.vision.named_towers()[0][1].vit.blocks.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0, "of the present"


@pytest.mark.parametrize("name", ["vla_pruner", "progressive_video"])
def test_a_place_without_memory_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=rf"router '{name}' remembers earlier decisions .*`Policy\.act"):
        model_of(name)(tiny_input())


def test_the_router_that_remembers_is_named() -> None:
    router = {"name": "token_norm", "layers": [2], "layer_router": "vla_pruner", "budget": 4}
    with pytest.raises(ValueError, match="router 'vla_pruner' remembers earlier decisions"):
        tiny_model(efa=False, lfp=False, router=router)(tiny_input())


def test_what_cannot_be_remembered() -> None:
    with pytest.raises(ValueError, match="needs alike_BON, which this policy does not provide"):
        model_of("spec_prune", efa=True)
    with pytest.raises(ValueError, match=r"works at language layers: give router\.layers"):
        tiny_model(efa=False, lfp=False, router=asdict(RouterConfig("vla_pruner", 4)))
    assert model_of("vla_pruner", efa=True, lfp=True).empty_memory(1) is not None


# --- the policy ---


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=4, deadline=None)
@given(order=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True), min_size=1, max_size=7))
def test_robots_that_take_turns_are_as_if_alone(name: str, order: list[list[str]]) -> None:
    policy = policy_of(name)
    policy.begin(["a", "b", "c"])
    found: dict[str, list[np.ndarray]] = {slot: [] for slot in "abc"}
    for slots in order:
        rows = [seen([slot], len(found[slot])) for slot in slots]
        actions = policy.act(Observation.stack(rows)).actions
        for slot, actions_KA in zip(slots, actions, strict=True):
            found[slot].append(actions_KA)
    for slot, answers in found.items():
        policy.begin([slot])
        for step, expected_KA in enumerate(answers):
            np.testing.assert_allclose(policy.act(seen([slot], step)).actions[0], expected_KA, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_reset_forgets_and_a_replay_is_the_same_to_the_bit(name: str) -> None:
    policy = policy_of(name)
    policy.reset()
    first = [policy.act(_plain(step)) for step in range(6)]
    policy.reset()
    again = [policy.act(_plain(step)) for step in range(6)]
    assert all(np.array_equal(a.actions, b.actions) for a, b in zip(first, again, strict=True))
    late = [policy.act(_plain(step)) for step in range(6)]
    assert any(not np.array_equal(a.actions, b.actions) for a, b in zip(first, late, strict=True)), "it remembers"


def _plain(step: int) -> Observation:
    return ROBOT.fake_observation(2, step)


def test_a_new_robot_gets_a_row_of_its_own_and_gives_it_back() -> None:
    policy = policy_of("progressive_video")
    slots = [f"robot {i}" for i in range(9)]
    policy.begin(slots[:3])
    alone = [policy.act(seen(slots[:1], step)).actions for step in range(2)]
    policy.begin(slots[3:])
    policy.end(slots[1:5])
    policy.begin(["late", *slots[:1]])
    for step in range(2):
        found = policy.act(seen([slots[0], "late", *slots[5:]], step)).actions
        np.testing.assert_allclose(found[:1], alone[step], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="robot 'robot 1' has not begun one"):
        policy.act(seen(slots[1:2], 0))


def test_mistakes_are_one_clear_line() -> None:
    policy = policy_of("vla_pruner")
    assert isinstance(policy, Remembering)
    with pytest.raises(ValueError, match=r"none has begun: call `reset\(\)`"):
        policy.act(_plain(0))
    with pytest.raises(ValueError, match=r"robot 'a' has not begun one: call `begin\(\['a'\]\)`"):
        policy.act(seen(["a"], 0))
    begin_episode(policy, ["a"])
    with pytest.raises(ValueError, match="robot 'a' occurs twice in one batch"):
        policy.act(seen(["a", "a"], 0))
    with pytest.raises(ValueError, match="names 1 robots for 2 observations"):
        policy.act(replace(_plain(0), slots=["a"]))
    policy.reset()
    policy.act(_plain(0))
    with pytest.raises(ValueError, match=r"of 2 robots, and now gets 3 observations: say whose"):
        policy.act(ROBOT.fake_observation(3))
    with pytest.raises(ValueError, match="has not begun"):
        policy.act(seen(["a"], 0))
    without = small_policy(efa=False, lfp=False)
    without.act(seen(["a", "a"], 0))  # no memory, no rule


@pytest.mark.parametrize("name", ["vla_pruner", "progressive_video", "adp"])
def test_the_engine_remembers_the_same(name: str) -> None:
    policy = policy_of(name)
    engine = policy.with_engine(EngineConfig("trace", text_buckets=(6,)))
    engine.warm_up(2)
    assert engine.engine is not None
    assert len(engine.engine._recorded) == (2 if name == "adp" else 1), "with a gate, one for each number of tokens"
    for each in (policy, engine):
        each.begin(["a", "b", "c"])
    for step, slots in enumerate((["a", "b"], ["b", "c"], ["c", "a"], ["b", "a"], ["a", "b"], ["c"], ["a", "b", "c"])):
        observation = seen(slots, step)
        np.testing.assert_allclose(engine.act(observation).actions, policy.act(observation).actions, atol=2e-5)


def test_a_gate_splits_a_batch() -> None:
    policy = policy_of("adp")
    budgets: list[tuple[int, bool]] = []
    step = policy._step
    policy._step = lambda text, inputs, dense=False: (  # type: ignore[method-assign, assignment]
        budgets.append((len(text), dense)) or step(text, inputs, dense)  # type: ignore[func-returns-value]
    )
    policy.begin(["still", "fast"])
    for decision in range(5):
        observation = seen(["still", "fast"], decision)
        state = np.zeros((2, ROBOT.state_dim), np.float32)
        state[0, 0], state[1, 0] = 1 - 0.5 ** (decision + 1), 0.02 * 2**decision
        policy.act(replace(observation, state=state))
    assert budgets == [(2, True)] * 3 + [(1, False), (1, True)] * 2
