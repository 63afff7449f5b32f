"""What every action head promises, and of each kind what is known beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cogvla.policy.checkpoint import load_policy, save_checkpoint
from cogvla.policy.cost.flops import count_flops
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.heads.denoising import DenoisingHead, DiffusionHead, FlowHead
from cogvla.policy.model.heads.discrete import TOKENS, DiscreteHead, decode, encode
from cogvla.policy.model.heads.interface import DRAWS, ActionHead, HeadSizes
from cogvla.policy.model.heads.registry import HEADS
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.objective import Objective
from cogvla.tests.support.small_data import LABELLED, MODEL, ROBOT, small_data, small_preprocessor
from cogvla.tests.support.tiny_model import ROBOT as TOY
from cogvla.tests.support.tiny_model import alone, tiny_config, tiny_input, tiny_model

SIZES = HeadSizes(width=32, chunk=4, action_dim=3, tokens_per_step=1)
DENOISING = (DiffusionHead, FlowHead)

every_head = pytest.mark.parametrize("kind", sorted(HEADS))
every_denoising_head = pytest.mark.parametrize("kind", DENOISING)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(samples: int, generator: torch.Generator, sizes: HeadSizes = SIZES) -> tuple[Tensor, Tensor]:
    noise = torch.randn(samples, DRAWS, sizes.chunk, sizes.action_dim, generator=generator)
    return noise, torch.rand(samples, DRAWS, generator=generator)


def fit(head: ActionHead, states: Tensor, expert: Tensor, steps: int) -> list[float]:
    """Losses of the head and the states themselves while they learn these actions."""
    optimiser = torch.optim.Adam([*head.parameters(), *([states] if states.requires_grad else [])], lr=5e-3)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    losses, generator = [], seeded()
    for _ in range(steps):
        loss = head.error(states, expert, *draws(len(states), generator)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
        losses.append(loss.item())
    return losses


# Every head.


@every_head
@pytest.mark.parametrize("tokens", ["one", "action_dim"])
@torch.inference_mode()
def test_decoding_depends_on_nothing_but_the_sample(kind: str, tokens: str) -> None:
    model, inputs = tiny_model({"kind": kind, "tokens_per_step": tokens}).eval(), tiny_input()
    torch.manual_seed(1)
    together = model(inputs).actions
    torch.manual_seed(2)
    assert together.shape == (3, TOY.chunk, TOY.action_dim)
    assert torch.equal(model(inputs).actions, together)
    for index in range(3):
        torch.testing.assert_close(model(alone(inputs, index)).actions[0], together[index], rtol=1e-5, atol=1e-5)
    output = model(inputs, decode=False)
    assert output.actions.shape == (3, 0, TOY.action_dim)
    assert torch.equal(model.head.decode(output.states), together)


@every_head
def test_the_error_is_of_each_action_and_reaches_every_parameter(kind: str) -> None:
    model, generator = tiny_model({"kind": kind}), seeded()
    states = model(tiny_input(), decode=False).states
    expert = torch.rand(3, TOY.chunk, TOY.action_dim, generator=generator) * 2 - 1
    error = model.head.error(states, expert, *draws(3, generator))
    assert error.shape == (3, TOY.chunk)
    assert 0.4 < error.mean().item() < 2, "an untrained head costs about as much in every kind"
    error.sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@every_head
def test_its_cost_is_counted(kind: str) -> None:
    model, inputs = tiny_model({"kind": kind}).eval(), alone(tiny_input(), 1)
    states = model(inputs, decode=False).states.detach()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.head(states)
    counted = {cost.stage: cost for cost in count_flops(tiny_config({"kind": kind}), TOY, text_length=7)}["head"]
    assert counted.flops == counter.get_total_flops()
    assert counted.parameters == sum(p.numel() for p in model.head.parameters())


@every_head
def test_it_learns_a_few_samples_by_heart(kind: str) -> None:
    torch.manual_seed(0)
    head = HEADS[kind](SIZES)
    states = nn.Parameter(torch.randn(4, 4, 32))
    expert = torch.rand(4, 4, 3, generator=seeded(1)) * 1.8 - 0.9
    losses = fit(head, states, expert, 300)
    assert np.mean(losses[-20:]) < losses[0] / 10
    with torch.no_grad():
        assert (head.decode(states) - expert).abs().mean() < 0.04


@every_head
def test_a_checkpoint_gives_the_same_actions(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CogVLAConfig.from_dict({**MODEL, "head": {"kind": kind, "steps": 3}})
    policy = CogVLAPolicy(CogVLA(config, ROBOT), small_preprocessor())
    weights, statistics = policy.model.state_dict(), small_data().statistics()
    save_checkpoint(tmp_path / "it", weights, config, policy.preprocessor, statistics, {})
    loaded, observation = load_policy(tmp_path / "it"), ROBOT.fake_observation(2)
    assert loaded.model.config.head == config.head
    np.testing.assert_array_equal(loaded.act(observation).actions, policy.act(observation).actions)


@every_head
def test_training_weighs_its_error_and_keeps_the_other_losses(kind: str) -> None:
    data = small_data()
    torch.manual_seed(0)
    objective = Objective(CogVLA(CogVLAConfig.from_dict({**MODEL, "head": {"kind": kind}}), ROBOT), LABELLED)
    builder = BatchBuilder(data, small_preprocessor(data), LABELLED)
    samples = TrainingBatches(data, 6, seed=0).gather(torch.arange(6))
    choices = builder.choose(samples, seeded())
    batch = builder.build(samples, choices)
    name = f"action_{objective.model.head.error_name}"
    losses = objective(batch)
    assert losses.keys() == {"loss", name, "grounding_l1", "reading_l1", "pointing_ce"}
    assert objective(replace(batch, weight_BK=torch.zeros(6, 4)))[name] == 0
    double = objective(replace(batch, weight_BK=2 * batch.weight_BK))
    torch.testing.assert_close(double[name], 2 * losses[name])
    # The noise belongs to the sample, so that the halves of a batch have together the error of the whole.
    halves = []
    for part in torch.arange(6).chunk(2):
        rows = TrainingBatches(data, 3, seed=0).gather(part)
        halves.append(objective(builder.build(rows, choices.part(part)))[name])
    torch.testing.assert_close(torch.stack(halves).mean(), losses[name])


def test_mistakes_are_explained() -> None:
    with pytest.raises(ValueError, match=r"head\.kind is 'fast'; it must be one of l1, diffusion, flow, discrete"):
        tiny_config({"kind": "fast"})
    with pytest.raises(ValueError, match="steps at least 1"):
        tiny_config({"kind": "flow", "steps": 0})
    with pytest.raises(ValueError, match=r"head\.kind=discrete clips .* choose action_normalisation q99 or min_max"):
        CogVLA(tiny_config({"kind": "discrete"}), replace(TOY, action_normalisation="mean_std"))


# From noise to action.


class Known(nn.Module):
    """In place of the `Denoiser`: a velocity that is known."""

    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.see, self.velocity = nn.Identity(), velocity

    def embed_time(self, time: Tensor) -> Tensor:
        return time[..., None]

    def forward(self, seen: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        return self.velocity(noisy, time[..., None, :])


def known(kind: type[DenoisingHead], velocity: Any, steps: int = 10) -> DenoisingHead:
    head = kind(replace(SIZES, steps=steps))
    head.denoiser = Known(velocity)  # type: ignore[assignment]
    return head


def perfect(kind: type[DenoisingHead], action: Tensor) -> Any:
    """The velocity of a world with one action only."""

    def velocity(noisy: Tensor, time: Tensor) -> Tensor:
        signal, share = kind.mixture(torch.ones(1), torch.zeros(1), time)[0], kind.mixture(0, 1, time)[0]  # type: ignore[arg-type]
        return kind.mixture(action, (noisy - signal * action) / share, time)[1]

    return velocity


def gaussian(kind: type[DenoisingHead], mean: float, std: float) -> Any:
    """The expected velocity of a world whose actions are normally distributed."""

    def velocity(noisy: Tensor, time: Tensor) -> Tensor:
        one, zero = torch.ones(1), torch.zeros(1)
        (a, da), (s, ds) = kind.mixture(one, zero, time), kind.mixture(zero, one, time)
        surprise = (noisy - a * mean) / (a**2 * std**2 + s**2)
        return da * (mean + std**2 * a * surprise) + ds * (s * surprise)

    return velocity


def test_the_cosine_schedule() -> None:
    time = torch.tensor([0.0, 0.25, 0.5, 1.0])
    signal, velocity = DiffusionHead.mixture(torch.ones(4), torch.zeros(4), time)
    noise, _ = DiffusionHead.mixture(torch.zeros(4), torch.ones(4), time)
    torch.testing.assert_close(signal**2, torch.tensor([1, 0.5 + math.sqrt(0.125), 0.5, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(4))
    torch.testing.assert_close(velocity, -noise)


def test_a_step_is_ddim() -> None:
    """Estimate the action and the noise from the velocity, and mix them anew for the next time."""
    noisy, velocity = torch.randn(2, 50, generator=seeded())
    a, s, b, r = (f(t * math.pi / 2) for t in (0.7, 0.4) for f in (math.cos, math.sin))
    action, noise = a * noisy - s * velocity, s * noisy + a * velocity
    torch.testing.assert_close(DiffusionHead.follow(noisy, velocity, 0.7, 0.4), b * action + r * noise)


def test_the_straight_line() -> None:
    action, noise = torch.randn(2, 5, generator=seeded())
    mixture, velocity = FlowHead.mixture(action, noise, torch.tensor(0.25))
    torch.testing.assert_close(mixture, 0.75 * action + 0.25 * noise)
    torch.testing.assert_close(FlowHead.follow(mixture, velocity, 0.25, 0.0), action)
    time = FlowHead.training_time((torch.arange(10000) + 0.5) / 10000)  # Beta(1.5, 1)
    assert time.mean().item() == pytest.approx(1.5 / 2.5, abs=1e-3)
    assert time.var().item() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=1e-3)


def test_a_constant_velocity_is_integrated_exactly() -> None:
    noise = torch.randn(2, 4, 3, generator=seeded())
    for steps in (1, 7):
        head = known(FlowHead, lambda noisy, time: torch.full_like(noisy, 0.3), steps)
        torch.testing.assert_close(head.decode(torch.zeros(2, 4, 32), noise), noise - 0.3)


@every_denoising_head
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_perfect_network_finds_the_action(kind: type[DenoisingHead], steps: int) -> None:
    action = torch.rand(4, 3, generator=seeded()) * 2 - 1
    found = known(kind, perfect(kind, action), steps).decode(torch.zeros(2, 4, 32))
    torch.testing.assert_close(found, action.expand(2, -1, -1), atol=1e-5, rtol=0)


@every_denoising_head
def test_normal_noise_becomes_the_normal_distribution_of_actions(kind: type[DenoisingHead]) -> None:
    """Along the expected velocity z arrives at mean + std z."""
    noise = torch.randn(8, 4, 3, generator=seeded())
    found = known(kind, gaussian(kind, 0.4, 0.2), 400).decode(torch.zeros(8, 4, 32), noise)
    torch.testing.assert_close(found, 0.4 + 0.2 * noise, atol=0.01, rtol=0)


@every_denoising_head
def test_the_error_is_least_for_the_expected_velocity(kind: type[DenoisingHead]) -> None:
    generator = seeded()
    expert = 0.4 + 0.2 * torch.randn(500, 4, 3, generator=generator)
    noise, time = draws(500, generator)

    def error(change: Any) -> float:
        best = gaussian(kind, 0.4, 0.2)
        head = known(kind, lambda noisy, time: change(best(noisy, time)))
        return head.error(torch.zeros(500, 4, 32), expert, noise, time).mean().item()

    least = error(lambda v: v)
    assert least < min(error(lambda v: v + 0.1), error(lambda v: v - 0.1), error(lambda v: 1.1 * v)) - 2e-3
    assert error(lambda v: v + 0.1) == pytest.approx(least + 0.01, abs=2e-3)


@every_denoising_head
def test_of_two_ways_it_takes_one_and_all_steps_take_the_same(kind: type[DenoisingHead]) -> None:
    """Regression would answer 0, which is neither."""
    torch.manual_seed(0)
    head, states = kind(SIZES), torch.zeros(32, 4, 32)
    left_or_right = torch.where(torch.arange(32) % 2 == 0, 0.7, -0.7)
    fit(head, states, left_or_right[:, None, None].expand(32, 4, 3), 200)
    with torch.no_grad():
        found = head.decode(torch.zeros(64, 4, 32), torch.randn(64, 4, 3, generator=seeded(5)))
    side = found.sign().mean(dim=(1, 2))
    assert (side.abs() == 1).float().mean() > 0.8
    assert 0.25 < (side > 0).float().mean() < 0.75
    assert (found.abs() - 0.7).abs().mean() < 0.15


@every_denoising_head
def test_more_steps_need_no_other_weights_and_bfloat16_changes_little(kind: type[DenoisingHead]) -> None:
    torch.manual_seed(0)
    head, more = kind(SIZES), kind(replace(SIZES, steps=20))
    more.load_state_dict(head.state_dict())
    states = torch.randn(1, 4, 32, generator=seeded())
    with torch.no_grad():
        exact = head.decode(states)
        torch.testing.assert_close(more.decode(states), exact, atol=0.2, rtol=0)
        rough = head.bfloat16().decode(states.bfloat16())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0)


# Tokens.


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=50))
def test_a_value_comes_back_to_half_a_token(values: list[float]) -> None:
    x = torch.tensor(values)
    tokens = encode(x)
    assert tokens.min() >= 0
    assert tokens.max() < TOKENS
    assert (decode(tokens) - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(encode(decode(tokens)), tokens.clamp(max=TOKENS - 2))


def test_tokens_are_openvlas() -> None:
    edges = np.linspace(-1, 1, 256)
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 5000)
    expected = np.digitize(np.clip(x, -1, 1), edges) - 1
    assert np.array_equal(encode(torch.from_numpy(x)).numpy(), expected)
    centres = (edges[:-1] + edges[1:]) / 2
    np.testing.assert_allclose(decode(torch.arange(256)).numpy(), np.append(centres, centres[-1]), atol=1e-6)


def test_the_most_probable_token_is_taken_and_not_knowing_costs_one() -> None:
    head = DiscreteHead(replace(SIZES, blocks=0))
    states, expert = torch.randn(2, 4, 32), torch.zeros(2, 4, 3)
    last: Any = head.net[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    torch.testing.assert_close(head.error(states, expert), torch.ones(2, 4))
    with torch.no_grad():
        last.bias[TOKENS + 200] = 3.0  # of the second dimension
    found = head.decode(states)
    torch.testing.assert_close(found[..., 1], decode(torch.full((2, 4), 200)))
    torch.testing.assert_close(found[..., 0], torch.full((2, 4), -1 + 1 / 255))
