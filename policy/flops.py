"""Parameters and floating-point operations of a configuration, stage by stage, without allocating a weight.

Counts what matrix products cost in one forward pass of one sample, two operations per multiply-accumulate; element-wise
work is left out, as it is by `torch.utils.flop_counter`, which a test holds this against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from timm.layers import Attention
from torch import nn

from cogvla.policy.config import CogVLAConfig
from cogvla.policy.interface import Embodiment
from cogvla.policy.model import CogVLA
from cogvla.policy.vision import VisionTower
from cogvla.routing.layout import TokenLayout
from cogvla.routing.pruning import FiLMRouter
from cogvla.routing.schedule import keep_count


@dataclass(frozen=True)
class StageCost:
    """One row of the table: parameters, and FLOPs of a forward pass with one sample."""

    stage: str
    parameters: int
    flops: int


def build_on_meta(config: CogVLAConfig, embodiment: Embodiment) -> CogVLA:
    """The model without storage: shapes only, whatever its size."""
    with torch.device("meta"):
        return CogVLA(config, embodiment)


def count_flops(config: CogVLAConfig, embodiment: Embodiment, text_length: int) -> list[StageCost]:
    """Cost of every stage; the last row is the total.

    Args:
        config, embodiment: the model.
        text_length: T, tokens of the instruction.
    """
    model = build_on_meta(config, embodiment)
    views = len(embodiment.cameras)
    rows = [
        StageCost(f"tower {name}", _parameters(tower), 2 * _tower(tower, views))
        for name, tower in model.vision.named_towers()
    ]
    fusion = model.vision.fusion
    weigher = _linears(fusion.weigher) if fusion.kind == "mix" else 0
    rows.append(
        StageCost("fusion", _parameters(fusion), 2 * ((_linears(fusion) - weigher) * model.vision_tokens + weigher))
    )
    rows.append(StageCost("state", _parameters(model.state), 2 * _linears(model.state)))
    layout = TokenLayout(model.vision_tokens, text_length, model.action_tokens)
    dense, routed, routers = _decoder(model, layout)
    rows.append(StageCost("language, dense layers", _parameters(dense[0]), 2 * dense[1]))
    rows.append(StageCost("language, routed layers", _parameters(routed[0]), 2 * routed[1]))
    rows.append(StageCost("routers", _parameters(model.decoder.routers), 2 * routers))
    rest = _parameters(model.decoder.llm.embed_tokens) + _parameters(model.decoder.llm.norm)
    rest += 0 if model.placeholder is None else model.placeholder.numel()
    rows.append(StageCost("embeddings", rest, 0))
    rows.append(StageCost("head", _parameters(model.head), 2 * _linears(model.head) * embodiment.chunk))
    total = StageCost("total", sum(r.parameters for r in rows), sum(r.flops for r in rows))
    assert total.parameters == _parameters(model), "every parameter belongs to one stage"
    return [*rows, total]


def format_table(costs: list[StageCost]) -> str:
    """The table as text, in millions of parameters and GFLOP."""
    lines = [f"{'stage':<26}{'parameters (M)':>16}{'GFLOP':>14}{'share':>8}"]
    whole = max(costs[-1].flops, 1)
    lines += [f"{c.stage:<26}{c.parameters / 1e6:>16,.3f}{c.flops / 1e9:>14,.4f}{c.flops / whole:>8.1%}" for c in costs]
    return "\n".join(lines)


def _parameters(module: nn.Module | list[nn.Module]) -> int:
    modules = module if isinstance(module, list) else [module]
    return sum(p.numel() for m in modules for p in m.parameters())


def _linears(module: nn.Module) -> int:
    """Multiply-accumulates of all linear layers for one token."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _tower(tower: VisionTower, views: int) -> int:
    vit, width = tower.vit, tower.width
    patches = vit.patch_embed.num_patches
    extra = 0 if tower.aggregation is None else len(tower.aggregation.tokens)
    tokens = patches + vit.num_prefix_tokens + extra
    macs = patches * vit.patch_embed.proj.weight.numel()
    for index, block in enumerate(vit.blocks[: tower.computed]):
        # Only the aggregation tokens come out of the last block, so only they ask there.
        few = extra and index == tower.computed - 1 and type(block.attn) is Attention
        asking = extra if few else tokens
        macs += 2 * tokens * width * width + 2 * asking * width * width  # k, v; q, output
        macs += 2 * asking * tokens * width + asking * _linears(block.mlp)
    # FiLM works once per instruction; folding the normalisation into the bias is one small matrix-vector product.
    return views * macs + (0 if tower.film is None else _linears(tower.film)) + 3 * width


def _decoder(
    model: CogVLA, layout: TokenLayout
) -> tuple[tuple[list[nn.Module], int], tuple[list[nn.Module], int], int]:
    decoder = model.decoder
    layers = list(decoder.llm.layers)
    groups: dict[bool, tuple[list[nn.Module], list[int]]] = {False: ([], []), True: ([], [])}
    routers, present = 0, layout.vision
    for index, (layer, ratio) in enumerate(zip(layers, decoder.ratios, strict=True)):
        seen = present
        if ratio is not None:
            seen = min(keep_count(layout.vision, ratio), present)
            router = cast(FiLMRouter, decoder.routers[str(index)])
            scored = layout.with_vision(present).length if router.score_all else present
            routers += _linears(router.scale) + _linears(router.shift) + scored * _linears(router.logits)
            present = seen if decoder.routing.mode == "drop" else present
        now = layout.with_vision(seen)
        length = now.length
        read = decoder.read_rows(now)
        asking = read.stop - read.start if index == len(layers) - 1 else length
        attention = layer.self_attn
        macs = length * (_linears(attention.k_proj) + _linears(attention.v_proj))
        macs += asking * (_linears(attention.q_proj) + _linears(attention.o_proj) + _linears(layer.mlp))
        macs += 2 * asking * length * attention.q_proj.out_features
        groups[ratio is not None][0].append(layer)
        groups[ratio is not None][1].append(macs)
    dense, routed = groups[False], groups[True]
    return (dense[0], sum(dense[1])), (routed[0], sum(routed[1])), routers
