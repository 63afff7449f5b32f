from __future__ import annotations

import pytest
import torch

from cogvla.routing.aggregation import AggregationTokens, StreamFusion
from cogvla.routing.film import FiLM, modulate


def test_film_is_two_linear_maps_per_block() -> None:
    torch.manual_seed(0)
    film = FiLM(summary_width=5, width=3, blocks=2)
    e = torch.randn(4, 5)
    scale, shift = film(e)
    assert scale.shape == shift.shape == (2, 4, 1, 3)
    weight, bias = film.project.weight.view(2, 2, 3, 5), film.project.bias.view(2, 2, 3)
    x = torch.randn(8, 6, 3)  # two views per sample
    for block in range(2):
        gamma, beta = (e @ weight[block, i].T + bias[block, i] for i in range(2))
        expected = x * (1 + gamma.repeat_interleave(2, 0)[:, None]) + beta.repeat_interleave(2, 0)[:, None]
        torch.testing.assert_close(modulate(x, scale[block], shift[block]), expected)


def test_film_init() -> None:
    scale, shift = FiLM(5, 3, 2, init=0.0)(torch.randn(4, 5))
    assert (scale == 1).all()
    assert (shift == 0).all()
    torch.manual_seed(0)
    _, shift = FiLM(64, 64, 4, init=0.5)(torch.randn(200, 64))
    assert shift.std().item() == pytest.approx(0.5, rel=0.1)


def test_aggregation_tokens_go_last_and_come_back() -> None:
    tokens = AggregationTokens(3, 4)
    x = tokens.append_to(torch.zeros(2, 5, 4))
    assert x.shape == (2, 8, 4)
    assert (x[:, :5] == 0).all()
    assert torch.equal(tokens.take_from(x)[1], tokens.tokens)


def test_mixing_is_the_weighted_sum_of_the_projected_streams() -> None:
    torch.manual_seed(0)
    fusion = StreamFusion([3, 4], 6, "mix")
    streams, e = [torch.randn(2, 5, 3), torch.randn(2, 5, 4)], torch.randn(2, 6)
    weights = fusion.weights(e)
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    projected = [project(stream) for project, stream in zip(fusion.projectors, streams, strict=True)]
    expected = weights[:, :1, None] * projected[0] + weights[:, 1:, None] * projected[1]
    torch.testing.assert_close(fusion(streams, weights), expected)
    only_first = torch.tensor([[1.0, 0.0]]).expand(2, -1)
    torch.testing.assert_close(fusion(streams, only_first), projected[0])


def test_variants() -> None:
    streams = [torch.randn(2, 5, 3), torch.randn(2, 5, 4)]
    added = StreamFusion([3, 4], 6, "sum")
    assert added.weights(torch.randn(2, 6)) is None
    first, second = (project(stream) for project, stream in zip(added.projectors, streams, strict=True))
    torch.testing.assert_close(added(streams, None), first + second)
    joined = StreamFusion([3, 4], 6, "concat")
    torch.testing.assert_close(joined(streams, None), joined.project(torch.cat(streams, -1)))
    with pytest.raises(ValueError, match="same number of tokens, got 5 and 4"):
        joined([streams[0], streams[1][:, :4]], None)
    experts = StreamFusion([3, 4], 6, "experts")
    weights = experts.weights(torch.randn(2, 6))
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    base = experts.projectors[0](streams[0]) + experts.projectors[1](streams[1])
    torch.testing.assert_close(experts(streams, weights), base), "they start as a plain sum"
    for parameter in experts.experts.parameters():
        torch.nn.init.normal_(parameter)
    only_third = torch.tensor([[0.0, 0, 1, 0]]).expand(2, -1)
    torch.testing.assert_close(experts(streams, only_third), base + experts.experts[2](base))
    with pytest.raises(ValueError, match="mix, sum, concat"):
        StreamFusion([3, 4], 6, "product")
