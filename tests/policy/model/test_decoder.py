from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvla.policy.model.config import LanguageConfig, RoutingConfig
from cogvla.policy.model.language import DecoderContext, DecoderTrace, RoutedDecoder
from cogvla.routing.layout import TokenLayout

LAYOUT = TokenLayout(vision=10, text=5, action=4)
PLAIN = RoutingConfig(efa=False, lfp=False, attention="causal")


def language(architecture: str = "llama", layers: int = 4) -> LanguageConfig:
    return LanguageConfig(
        vocab_size=20,
        width=32,
        intermediate=48,
        layers=layers,
        heads=4,
        kv_heads=2,
        bos_token=0,
        stop_token=1,
        architecture=architecture,  # type: ignore[arg-type]
        init_std=0.2,
    )


def decoder(routing: RoutingConfig, config: LanguageConfig | None = None, **options: bool) -> RoutedDecoder:
    torch.manual_seed(0)
    return RoutedDecoder(config or language(), routing, **options).eval()


def sequence(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, LAYOUT.length, 32), torch.arange(5) < torch.tensor([[5], [2], [3]])[:batch]


def run(ours: RoutedDecoder, x: torch.Tensor, mask: torch.Tensor, trace: DecoderTrace | None = None) -> torch.Tensor:
    return ours(x, DecoderContext(ours, LAYOUT, mask), trace)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@torch.inference_mode()
def test_with_everything_off_it_is_the_transformers_model(architecture: str) -> None:
    ours = decoder(PLAIN, language(architecture))
    x, _ = sequence()
    mask = torch.ones(3, 5, dtype=torch.bool)
    expected = ours.llm(inputs_embeds=x, use_cache=False).last_hidden_state[:, LAYOUT.actions]
    torch.testing.assert_close(run(ours, x, mask), expected, rtol=1e-4, atol=1e-5)
    shifted = decoder(PLAIN, language(architecture), shifted=True)
    before = ours.llm(inputs_embeds=x, use_cache=False).last_hidden_state[
        :, LAYOUT.actions.start - 1 : LAYOUT.actions.stop - 1
    ]
    torch.testing.assert_close(run(shifted, x, mask), before, rtol=1e-4, atol=1e-5)


ROUTED = [
    RoutingConfig(mode=mode, position_policy=positions, scale=scale)  # type: ignore[arg-type]
    for mode in ("bypass", "drop")
    for positions in ("keep", "renumber")
    for scale in ("all", "visual_only", "values")
]


@pytest.mark.parametrize("routing", ROUTED, ids=lambda r: f"{r.mode}-{r.position_policy}-{r.scale}")
@pytest.mark.parametrize("shifted", [False, True])
@torch.inference_mode()
def test_the_short_last_layer_equals_the_whole_one(routing: RoutingConfig, shifted: bool) -> None:
    ours = decoder(routing, shifted=shifted)
    x, mask = sequence()
    torch.testing.assert_close(run(ours, x, mask), run(ours, x, mask, DecoderTrace()), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_bypassed_tokens_pass_bit_for_bit() -> None:
    ours = decoder(RoutingConfig())
    x, mask = sequence()
    trace = DecoderTrace()
    run(ours, x, mask, trace)
    assert list(trace.kept) == [1, 2, 3]
    for layer, kept in trace.kept.items():
        before, after = (trace.hidden[i][:, LAYOUT.visual] for i in (layer - 1, layer))
        skipped = torch.ones(3, 10, dtype=torch.bool).scatter_(1, kept, False)
        assert torch.equal(before[skipped], after[skipped])
        assert not torch.isclose(before[~skipped], after[~skipped]).all(dim=-1).any()


@torch.inference_mode()
def test_dropped_tokens_are_gone() -> None:
    ours = decoder(RoutingConfig(mode="drop"))
    x, mask = sequence()
    trace = DecoderTrace()
    run(ours, x, mask, trace)
    counts = {layer: kept.shape[1] for layer, kept in trace.kept.items()}
    assert counts == {1: 7, 2: 2, 3: 1}
    for layer, count in counts.items():
        assert trace.hidden[layer].shape[1] == LAYOUT.with_vision(count).length
    for before, after in ((1, 2), (2, 3)):
        for row in range(3):
            assert set(trace.kept[after][row].tolist()) <= set(trace.kept[before][row].tolist())


@pytest.mark.parametrize("mode", ["bypass", "drop"])
@torch.inference_mode()
def test_keeping_all_tokens_is_the_plain_layer_up_to_the_probability(mode: str) -> None:
    """Ratio 1 with a router that is sure of every token: p is 1, and so the result is that of no routing at all."""
    routed = decoder(RoutingConfig(schedule="deep_all", mean_keep=1.0, mode=mode))  # type: ignore[arg-type]
    plain = decoder(RoutingConfig(lfp=False))
    plain.load_state_dict(routed.state_dict(), strict=False)
    x, mask = sequence()
    assert not torch.allclose(run(routed, x, mask), run(plain, x, mask), atol=1e-4)
    routers: Any = routed.routers
    for router in routers.values():
        router.logits.weight.zero_()
        router.logits.bias.copy_(torch.tensor([0.0, 200.0]))
    torch.testing.assert_close(run(routed, x, mask), run(plain, x, mask), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_one_layer_by_hand() -> None:
    """A routed layer written out: gather, attend among the kept, scale the MLP of vision tokens, put back."""
    routing = RoutingConfig(
        schedule="interleave", mean_keep=0.4, position_policy="renumber", scale="visual_only", attention="bidirectional"
    )
    ours = decoder(routing, language(layers=2))
    x, _ = sequence(batch=1)
    trace = DecoderTrace()
    run(ours, x, torch.ones(1, 5, dtype=torch.bool), trace)
    x, layer = trace.hidden[0], ours.llm.layers[1]
    router: Any = ours.routers["1"]
    h = layer.input_layernorm(x)
    text = h[:, LAYOUT.context].mean(1, keepdim=True)
    p = router.logits(h[:, LAYOUT.visual] * (1 + router.scale(text)) + router.shift(text)).softmax(-1)[0, :, 1]
    kept = p.argsort(descending=True)[:4].sort().values
    assert trace.kept[1][0].tolist() == kept.tolist()
    rows = torch.cat((torch.tensor([0]), kept + 1, torch.arange(11, LAYOUT.length)))
    kept_x = x[:, rows]
    positions = torch.arange(len(rows))[None]
    rotation = ours.llm.rotary_emb(kept_x, positions)
    everything = torch.zeros(1, 1, len(rows), len(rows))
    attended = layer.self_attn(h[:, rows], position_embeddings=rotation, attention_mask=everything)[0]
    middle = kept_x + attended
    factor = torch.ones(len(rows), 1)
    factor[1:5, 0] = p[kept]
    expected = x.clone()
    expected[:, rows] = middle + layer.mlp(layer.post_attention_layernorm(middle)) * factor
    torch.testing.assert_close(trace.hidden[1], expected, rtol=1e-4, atol=1e-5)


def test_position_policies_differ_only_where_tokens_were_left_out() -> None:
    x, mask = sequence()
    traces = []
    for policy in ("keep", "renumber"):
        trace = DecoderTrace()
        run(decoder(RoutingConfig(position_policy=policy)), x, mask, trace)  # type: ignore[arg-type]
        traces.append(trace)
    assert torch.equal(traces[0].hidden[0], traces[1].hidden[0])
    assert not torch.allclose(traces[0].hidden[1], traces[1].hidden[1])


@torch.inference_mode()
def test_actions_see_each_other_only_with_coupled_attention() -> None:
    x, mask = sequence()
    changed = x.clone()
    changed[:, LAYOUT.actions.stop - 1] += 1
    for attention, sees in (("coupled", True), ("causal", False), ("bidirectional", True)):
        ours = decoder(RoutingConfig(lfp=False, attention=attention))  # type: ignore[arg-type]
        same = torch.equal(run(ours, x, mask)[:, 0], run(ours, changed, mask)[:, 0])
        assert same is not sees, attention
