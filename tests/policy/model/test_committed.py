"""Committed actions as an input of the network: nothing changes without them, and with them what is known beforehand.

Shape legend: as in `policy.model.heads.committed`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cogvla.policy.chunk_queue import soft_mask
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.engine.engine import Engine, EngineConfig
from cogvla.policy.interface import Committed, Observation
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.heads.committed import CommittedInput, none_committed
from cogvla.policy.model.heads.denoising import DenoisingHead, DiffusionHead, FlowHead, pull
from cogvla.policy.model.heads.interface import HeadSizes
from cogvla.policy.model.heads.registry import HEADS
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.objective import Objective
from cogvla.policy.training.trainer import Trainer
from cogvla.scripts.training.build import build_trainer
from cogvla.tests.support.small_data import (
    IMITATION,
    INSTRUCTIONS,
    MODEL,
    settings,
    small_data,
    small_policy,
    small_preprocessor,
)
from cogvla.tests.support.small_data import ROBOT as SMALL
from cogvla.tests.support.tiny_model import ROBOT, tiny_input, tiny_model

every_head = pytest.mark.parametrize("kind", sorted(HEADS))
K, A = ROBOT.chunk, ROBOT.action_dim


def trained(kind: str, per_step: str = "one") -> CogVLA:
    """A model that reads committed actions, with a matrix as after training."""
    model = tiny_model(head={"kind": kind, "prefix": 3, "tokens_per_step": per_step}).eval()
    assert model.committed is not None
    nn.init.normal_(model.committed.matrix, generator=torch.Generator().manual_seed(1))
    return model


def some(*delays: int, seed: int = 0) -> CommittedInput:
    """Random committed actions, so many for each sample."""
    actions_BKA = torch.rand(len(delays), K, A, generator=torch.Generator().manual_seed(seed)) - 0.5
    weight_BK = (torch.arange(K) < torch.tensor(delays)[:, None]).float()
    return CommittedInput(actions_BKA * weight_BK[..., None], weight_BK)


@every_head
@pytest.mark.parametrize("prefix", [0, 3])
@torch.no_grad()
def test_without_committed_actions_the_same_bits(kind: str, prefix: int) -> None:
    model, inputs = trained(kind) if prefix else tiny_model(head={"kind": kind}).eval(), tiny_input()
    none = none_committed(3, K, A, "cpu")
    assert torch.equal(model(replace(inputs, committed=none)).actions, model(inputs).actions)


@every_head
@torch.no_grad()
def test_a_new_input_changes_nothing_before_it_is_trained(kind: str) -> None:
    before, after = tiny_model(head={"kind": kind}).eval(), tiny_model(head={"kind": kind, "prefix": 3}).eval()
    assert set(after.state_dict()) - set(before.state_dict()) == {"committed.matrix"}
    expected = before(tiny_input()).actions
    assert torch.equal(after(tiny_input()).actions, expected)
    given = after(replace(tiny_input(), committed=some(0, 1, 3))).actions
    if not after.head.guided:
        assert torch.equal(given[1, 1:], expected[1, 1:])
        assert torch.equal(given[2, 3:], expected[2, 3:])


@every_head
@pytest.mark.parametrize("per_step", ["one", "action_dim"])
@torch.no_grad()
def test_certain_actions_come_back_and_change_the_others(kind: str, per_step: str) -> None:
    model, inputs, committed = trained(kind, per_step), tiny_input(), some(0, 1, 3)
    expected, found = model(inputs), model(replace(inputs, committed=committed))
    assert torch.equal(found.actions[0], expected.actions[0])
    for row, delay in ((1, 1), (2, 3)):
        assert torch.equal(found.actions[row, :delay], committed.actions[row, :delay])
        after = delay * model.action_tokens // K
        assert not torch.allclose(found.states[row, after:], expected.states[row, after:], atol=1e-3)


@every_head
@torch.no_grad()
def test_an_engine_records_them(kind: str) -> None:
    model, inputs = trained(kind), tiny_input((5, 5))
    engine = Engine(model, EngineConfig("trace", text_buckets=(8,)))
    engine.warm_up(inputs)
    text = engine.encode(inputs.text_ids, inputs.text_mask)
    for committed in (None, some(0, 2), some(3, 1, seed=1)):
        given = replace(inputs, committed=committed)
        torch.testing.assert_close(engine.run(given, text), model(given).actions, atol=1e-5, rtol=1e-4)


class Straight(nn.Module):
    """A denoiser that always leads a flow straight to the same chunk."""

    def __init__(self, goal_KA: Tensor) -> None:
        super().__init__()
        self.goal_KA = goal_KA

    def see(self, joined: Tensor) -> Tensor:
        return joined

    def embed_time(self, time: Tensor) -> Tensor:
        return time[:, None]

    def forward(self, seen: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        return (noisy - self.goal_KA) / time


def test_guidance_by_hand() -> None:
    """Two steps from noise 1 towards 0, pulled towards 2 with the weights 1, .5 and 0."""
    head = FlowHead(HeadSizes(width=4, chunk=3, action_dim=1, tokens_per_step=1, steps=2))
    head.denoiser = Straight(torch.zeros(3, 1))  # type: ignore[assignment]
    committed = CommittedInput(torch.full((1, 3, 1), 2.0), torch.tensor([[1.0, 0.5, 0.0]]))
    found = head.decode(torch.zeros(1, 3, 4), torch.ones(1, 3, 1), committed)
    # Step 1, time 1: the chunk 0 is pulled to w * 2 with pull 1 -> 2, 1, 0; half way from 1: 1.5, 1, 0.5.
    # Step 2, time .5: weight .5/.5 (.25 + .25)/.25 = 2, pull .5 * 2 = 1: the chunk 0 is pulled to 2, 1, 0.
    assert [pull(1.0), pull(0.5)] == [1.0, 1.0]
    torch.testing.assert_close(found.flatten(), torch.tensor([2.0, 1.0, 0.0]))
    free = head.decode(torch.zeros(1, 3, 4), torch.ones(1, 3, 1))
    assert torch.equal(free, torch.zeros(1, 3, 1))


def test_the_pull_is_that_of_the_paper() -> None:
    assert [round(pull(1 - s), 4) for s in (0.25, 0.5, 0.75, 0.9)] == [1.0, 1.0, 0.8333, 0.5]


@pytest.mark.parametrize("kind", [FlowHead, DiffusionHead])
@torch.no_grad()
def test_certain_actions_clamp_every_step(kind: type[DenoisingHead]) -> None:
    """So the decoding itself ends there, before the certain actions replace the chunk's."""
    torch.manual_seed(0)
    head = kind(HeadSizes(width=8, chunk=K, action_dim=A, tokens_per_step=1))
    committed = some(2, 4)
    found = head.decode(torch.randn(2, K, 8), committed=committed)
    for row, delay in ((0, 2), (1, 4)):
        torch.testing.assert_close(found[row, :delay], committed.actions[row, :delay], atol=1e-5, rtol=1e-5)


@given(st.data())
def test_every_list_of_committed_actions_has_the_same_shape(data: st.DataObject) -> None:
    preprocessor, chunk = small_preprocessor(), SMALL.chunk
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        count = data.draw(st.integers(0, 2 * chunk))
        delay = data.draw(st.integers(0, min(count, chunk - 1)))
        actions_NA = np.full((count, SMALL.action_dim), 0.1, np.float32)
        rows.append(data.draw(st.sampled_from([None, Committed(actions_NA, delay)])))
    longest = data.draw(st.sampled_from([None, 1, 2]))
    found = preprocessor.committed(rows, longest)
    if found is None:
        assert all(row is None for row in rows)
        return
    assert found.actions.shape == (len(rows), chunk, SMALL.action_dim)
    assert found.actions.isfinite().all()
    for row, weight_K, actions_KA in zip(rows, found.weight, found.actions, strict=True):
        count = 0 if row is None else min(len(row.actions), chunk)
        certain = 0 if row is None else min(row.delay, chunk if longest is None else longest)
        assert int((weight_K >= 1).sum()) == certain
        np.testing.assert_allclose(weight_K, soft_mask(chunk, certain, count), rtol=1e-6)
        assert (actions_KA[count:] == 0).all()


@pytest.mark.parametrize(
    ("actions", "delay", "words"),
    [
        (np.zeros((3, 5)), 1, r"shape \[N,A=4\], one row for each action, got \[3, 5\]"),
        (np.zeros(4), 1, r"got \[4\]"),
        (np.full((3, 4), np.nan), 1, "NaN"),
        (np.zeros((3, 4)), 4, "0 to 3, got 4"),
        (np.zeros((3, 4)), -1, "0 to 3, got -1"),
        (np.zeros((3, 4)), 1.5, "delay must be a whole number, got 1.5"),
        (np.zeros((3, 4)), True, "delay must be a whole number, got True"),
        (np.zeros((3, 4), bool), 1, "committed must be an array of numbers"),
        ([[0.0] * 4], 1, "committed must be an array of numbers, got list"),
        (np.full((3, 4), 1e300), 1, "infinite"),
        (np.zeros((9, 4)), 4, "a delay of 4 control steps is as long as a chunk of 4 actions"),
    ],
)
def test_wrong_committed_actions_are_refused_in_one_line(actions: Any, delay: Any, words: str) -> None:
    seen = replace(SMALL.fake_observation(), instruction=INSTRUCTIONS[:1], committed=[Committed(actions, delay)])
    with pytest.raises(ValueError, match=words) as refused:
        small_policy().act(seen)
    assert "\n" not in str(refused.value)


def test_a_row_for_each_sample() -> None:
    with pytest.raises(ValueError, match="one entry per sample, 2, got 1"):
        replace(SMALL.fake_observation(2), committed=[None]).validate(SMALL)


def test_a_batch_keeps_whose_they_are() -> None:
    one, two = (Committed(np.full((2, 4), value, np.float32), 1) for value in (0.1, 0.2))
    seen = SMALL.fake_observation(1)
    stacked = Observation.stack([replace(seen, committed=[one]), seen, replace(seen, committed=[two])])
    assert list(stacked.committed or ()) == [one, None, two]
    assert stacked.row(2).committed == [two]
    assert Observation.stack([seen, seen]).committed is None


def test_a_policy_that_ignores_them_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    policy = small_policy()
    seen = replace(SMALL.fake_observation(), instruction=INSTRUCTIONS[:1])
    given = replace(seen, committed=[Committed(np.zeros((3, 4), np.float32), 2)])
    for _ in range(2):
        np.testing.assert_array_equal(policy.act(given).actions, policy.act(seen).actions)
    assert not policy.reads_committed
    assert capsys.readouterr().out.count("ignores committed actions") == 1


def test_a_chunk_must_have_actions_of_its_own() -> None:
    with pytest.raises(ValueError, match="must decide at least one"):
        tiny_model(head={"prefix": K})
    with pytest.raises(ValueError, match=r"head\.prefix must be a number of actions"):
        tiny_model(head={"prefix": -1})


def test_training_gives_the_executed_actions_and_learns_the_others() -> None:
    data = small_data()
    executed_NA = data.action_NA + 0.25
    data = replace(data, executed_NA=executed_NA)
    preprocessor = small_preprocessor(data)
    builder = BatchBuilder(data, preprocessor, IMITATION, prefix=2, prefix_share=0.5)
    batches = TrainingBatches(data, 64, seed=0)
    samples, generator = batches.gather(batches.rows(0)), torch.Generator().manual_seed(0)
    choices = builder.choose(samples, generator)
    assert choices.committed_B is not None
    counts = torch.bincount(choices.committed_B, minlength=3).tolist()
    assert len(counts) == 3
    assert all(8 < count < 48 for count in counts), counts
    batch = builder.build(samples, choices)
    committed = batch.inputs.committed
    assert committed is not None
    assert torch.equal(committed.weight.sum(1).long(), choices.committed_B)
    assert (batch.weight_BK[committed.weight > 0] == 0).all()
    assert batch.weight_BK.mean() == pytest.approx(1)
    expected_BKA = preprocessor.normalised_actions(samples["executed"]) * committed.weight[..., None]
    torch.testing.assert_close(committed.actions, expected_BKA)
    assert builder.evaluation(samples).inputs.committed is None


def test_the_matrix_is_learned_though_it_begins_at_zero() -> None:
    data = small_data()
    torch.manual_seed(0)
    model = CogVLA(type(small_policy().model.config).from_dict({**MODEL, "head": {"prefix": 2}}), SMALL)
    objective = Objective(model, IMITATION)
    builder = BatchBuilder(data, small_preprocessor(data), IMITATION, prefix=2)
    batches = TrainingBatches(data, 16, seed=0)
    objective(builder.training(batches.gather(batches.rows(0)), torch.Generator().manual_seed(0)))["loss"].backward()
    assert model.committed is not None
    assert model.committed.matrix.grad is not None
    assert (model.committed.matrix.grad.abs().amax(1) > 0).all(), "of each action dimension, and of the 1"


def test_training_goes_on_only_with_the_same_executed_actions(tmp_path: Path) -> None:
    model = type(small_policy().model.config).from_dict({**MODEL, "head": {"prefix": 2}})
    data = small_data()
    noisy = replace(data, executed_NA=data.action_NA + 0.25)

    def trainer(output: str, data: DemonstrationData, config: CogVLAConfig) -> Trainer:
        return build_trainer(settings(steps=1), config, IMITATION, SMALL, data, tmp_path / output, lambda *_: None)

    trainer("told", noisy, model).run()
    trainer("told", noisy, model).run()
    with pytest.raises(ValueError, match="another setting: data set, executed actions differs; choose another output"):
        trainer("told", data, model).run()
    untold = small_policy().model.config
    trainer("untold", noisy, untold).run()
    trainer("untold", data, untold).run()  # they do not matter


def test_a_policy_with_them_continues_the_plan() -> None:
    torch.manual_seed(0)
    model = CogVLA(type(small_policy().model.config).from_dict({**MODEL, "head": {"prefix": 2}}), SMALL)
    policy = CogVLAPolicy(model, small_preprocessor())
    seen = replace(SMALL.fake_observation(), instruction=INSTRUCTIONS[:1])
    free_KA = policy.act(seen).actions[0]
    plan_NA = free_KA[1:] * 0.5
    found_KA = policy.act(replace(seen, committed=[Committed(plan_NA, 3)])).actions[0]
    np.testing.assert_allclose(found_KA[:2], plan_NA[:2], atol=1e-5)
    np.testing.assert_allclose(found_KA[2:], free_KA[2:], atol=1e-5, err_msg="2 is what it was trained for")
    assert policy.describe()["committed"] == "prefix"
