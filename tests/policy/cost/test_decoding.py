"""OpenVLA's token by token decoding: with the cache as without it, and its FLOPs as torch counts them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvla.policy.cost.decoding import TokenDecoder
from cogvla.policy.cost.flops import REPEATED, TOTAL, count_decoding, without_stages
from cogvla.policy.model.cogvla import CogVLA
from cogvla.tests.support.tiny_model import ROBOT, tiny_config, tiny_input

CONFIG, ONE_VIEW = without_stages(tiny_config(), ROBOT)
TEXT = 7


@pytest.fixture
def decoder() -> TokenDecoder:
    torch.manual_seed(0)
    return TokenDecoder(CogVLA(CONFIG, ONE_VIEW).eval())


@pytest.fixture
def pixels() -> torch.Tensor:
    return tiny_input().pixels[:2, :1]


def words(batch: int) -> torch.Tensor:
    return torch.randint(0, 20, (batch, TEXT), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_the_cache_changes_nothing(decoder: TokenDecoder, pixels: torch.Tensor) -> None:
    ids = words(len(pixels))
    found = decoder(pixels, ids)
    sequence = decoder.prompt(pixels, ids)
    expected = []
    for _ in range(ROBOT.action_dim):
        states = decoder.llm(inputs_embeds=sequence, use_cache=False).last_hidden_state
        expected.append(decoder.vocabulary(states[:, -1]).argmax(-1))
        sequence = torch.cat((sequence, decoder.llm.embed_tokens(expected[-1])[:, None]), dim=1)
    assert found.tolist() == torch.stack(expected, 1).tolist()
    assert len({tuple(row) for row in found.tolist()}) == len(pixels), "the picture matters"


def test_the_count_is_what_torch_counts(decoder: TokenDecoder, pixels: torch.Tensor) -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(pixels[:1], words(1))
    costs = {cost.stage: cost for cost in count_decoding(CONFIG, ROBOT, TEXT)}
    assert costs[TOTAL].flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert costs[REPEATED].flops == costs[TOTAL].flops
    used = [decoder.vision, decoder.llm, decoder.vocabulary]
    assert costs[TOTAL].parameters == sum(p.numel() for module in used for p in module.parameters())
    assert costs["language, single tokens"].weight_bytes == (ROBOT.action_dim - 1) * 2 * sum(
        p.numel() for layer in decoder.llm.layers for p in layer.parameters() if p.ndim > 1
    )
