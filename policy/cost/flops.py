"""Count parameters, FLOPs and bytes of a configuration, stage by stage, without allocating a weight.

Only matrix products are counted, as in `torch.utils.flop_counter`, with which a test compares the result. For each
product:

- FLOPs: two per multiply-accumulate.
- weights: weight and bias are read once per pass, whatever the number of samples. A head that decodes in several steps
  reads its weights in every step.
- activations: the input is read once and the output is written once. Attention is one kernel that reads queries, keys
  and values and writes its output; the scores stay on the chip.

Layers with the same input (queries, keys and values) each read it; caches are ignored. Embedding tables, norms,
residual sums and other element-wise operations are not counted. A number has two bytes (bfloat16). A text encoder is
counted with the instruction. The work of a token router (`routing.router`) is not counted, but later stages are counted
with the tokens that it keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from timm.layers import Attention
from torch import nn

from cogvla.policy.inputs.text_encoder import encoder_shape
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.vision import VisionTower
from cogvla.routing.layout import TokenLayout
from cogvla.routing.pruning import FiLMRouter

BYTES = 2
TOTAL, REPEATED = "total", "total, same instruction"
INSTRUCTION = "instruction"
"""The stage that runs once per instruction, not once per chunk."""


@dataclass(frozen=True)
class Counting:
    """Operations to count. The defaults count those of this model; other values allow comparisons with other code.

    Attributes:
        attention: count the products of queries with keys, and of attention with values.
            False: count linear layers only.
        every_row: count all rows of the last layers, including rows whose results are not used.
        last_block: count the last block of each tower, whose output is not used.
        lm_head: count the output vocabulary for every token of the sequence.
    """

    attention: bool = True
    every_row: bool = False
    last_block: bool = False
    lm_head: bool = False


@dataclass(frozen=True)
class Work:
    """Work of a stage.

    Attributes:
        macs: multiply-accumulates.
        weights: numbers read from weights.
        activations: numbers read from and written to activations.
    """

    macs: int = 0
    weights: int = 0
    activations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.weights + other.weights, self.activations + other.activations)

    def for_samples(self, count: int) -> Work:
        """Return the work for several samples with the same weights."""
        return Work(count * self.macs, self.weights, count * self.activations)


@dataclass(frozen=True)
class StageCost:
    """One row of the table: parameters of a stage, and its work in a forward pass."""

    stage: str
    parameters: int
    work: Work

    @property
    def flops(self) -> int:
        return 2 * self.work.macs

    @property
    def weight_bytes(self) -> int:
        return BYTES * self.work.weights

    @property
    def activation_bytes(self) -> int:
        return BYTES * self.work.activations

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / max(self.weight_bytes + self.activation_bytes, 1)


def build_on_meta(config: CogVLAConfig, embodiment: Embodiment) -> CogVLA:
    """Build the model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return CogVLA(config, embodiment)


def count_flops(
    config: CogVLAConfig, embodiment: Embodiment, text_length: int, batch: int = 1, counting: Counting | None = None
) -> list[StageCost]:
    """Count the cost of every stage for one pass.

    Args:
        config: configuration of the model.
        embodiment: robot of the model.
        text_length: T, tokens of the instruction.
        batch: samples in one pass.
        counting: operations to count; None: the default.

    Returns:
        One row per stage; then `TOTAL`, and `REPEATED`, the total without `INSTRUCTION`, for an instruction whose
        encoding is reused.

    Raises:
        ValueError: text length or batch is less than 1.
    """
    if text_length < 1 or batch < 1:
        raise ValueError(f"text length and batch must be at least 1, got {text_length} and {batch}")
    counting = counting or Counting()
    model = build_on_meta(config, embodiment)
    views, fusion = len(embodiment.cameras), model.vision.fusion
    towers = model.vision.named_towers()
    once: list[nn.Module] = [tower.film for _, tower in towers if tower.film is not None]
    once += [] if fusion.weigher is None else [fusion.weigher]
    # Folding the normalisation of pixels into the bias is a small matrix-vector product per tower.
    fold = sum((Work(3 * tower.width, 0, 4 * tower.width) for _, tower in towers), Work())
    instruction = _linears(once, batch) + fold
    if model.order is not None:
        width = model.order.down.out_features
        instruction += _linears([model.order.down, model.order.block], batch * text_length)
        instruction += _linears([model.order.up], batch)
        instruction += _attention(text_length, text_length, width, counting).for_samples(batch)
        once.append(model.order)
    if model.text is not None:
        once.append(model.text)
        instruction += _linears([model.text], batch * text_length)
    if config.language.encoder is not None:
        encoder = encoder_shape(config.language.encoder)
        once.append(encoder)
        instruction += _encoder(encoder, text_length, counting).for_samples(batch)
    rows = [StageCost(INSTRUCTION, _parameters(once), instruction)]
    reduced = None
    if model.router is not None and len(model.router.inside):
        reduced = model.router.block, model.vision_tokens // views
    for name, tower in towers:
        work = _tower(tower, counting, reduced).for_samples(batch * views)
        rows.append(StageCost(f"tower {name}", _parameters([tower]) - _parameters([tower.film]), work))
    projectors = [module for module in fusion.children() if module not in once]
    # A router before the projectors reduces their tokens; a router after them does not.
    whole = model.router is not None and model.router.stage not in ("encoder_block", "encoder_out")
    projected = batch * (model.vision.tokens if whole else model.vision_tokens)
    before = None if model.router is None else model.router.before
    projecting = [before] if before is not None and before.projects else projectors
    rows.append(StageCost("fusion", _parameters(projectors), _linears(projecting, projected)))
    rows.append(StageCost("state", _parameters([model.state]), _linears([model.state], batch)))
    if model.committed is not None:
        steps, matrix = batch * embodiment.chunk, model.committed.matrix
        adding = Work(steps * matrix.numel(), matrix.numel(), steps * sum(matrix.shape))
        rows.append(StageCost("committed actions", matrix.numel(), adding))
    layout = TokenLayout(model.vision_tokens, text_length, model.action_tokens)
    rows += [StageCost(r.stage, r.parameters, r.work.for_samples(batch)) for r in _decoder(model, layout, counting)]
    embeddings = _parameters([model.decoder.llm.embed_tokens, model.decoder.llm.norm])
    embeddings += 0 if model.placeholder is None else model.placeholder.numel()
    rows.append(StageCost("embeddings", embeddings, Work()))
    if counting.lm_head:
        output = nn.Linear(config.language.width, config.language.vocab_size, bias=False, device="meta")
        rows.append(StageCost("output vocabulary", _parameters([output]), _linears([output], batch * layout.length)))
    states = torch.empty(batch, layout.action, config.language.width, device="meta")
    rows.append(StageCost("head", _parameters([model.head]), _watched(model.head, states)))
    total = _sum(TOTAL, rows)
    return [*rows, total, StageCost(REPEATED, total.parameters, _sum("", rows[1:]).work)]


def count_decoding(
    config: CogVLAConfig, embodiment: Embodiment, text_length: int, batch: int = 1, counting: Counting | None = None
) -> list[StageCost]:
    """Count OpenVLA as published on the same backbone: one view, one token for each action dimension, a cache.

    The first token comes from the pass over vision and text, every other one from a pass over a single token, which
    reads all weights again. The output vocabulary is counted once for each token. See `policy.cost.decoding`.

    Returns:
        One row per stage, then `TOTAL` and `REPEATED`, which are equal: nothing is kept for the next image.
    """
    counting = counting or Counting()
    model = build_on_meta(*without_stages(config, embodiment))
    rows = [StageCost(INSTRUCTION, 0, Work())]
    for name, tower in model.vision.named_towers():
        rows.append(StageCost(f"tower {name}", _parameters([tower]), _tower(tower, counting).for_samples(batch)))
    fusion = model.vision.fusion
    rows.append(StageCost("fusion", _parameters([fusion]), _linears([fusion], batch * model.vision.tokens)))
    llm, prompt, tokens = model.decoder.llm, 1 + model.vision.tokens + text_length, embodiment.action_dim
    first = _causal(llm, prompt, prompt, counting).for_samples(batch)
    rows.append(StageCost("language, vision and text", _parameters(llm.layers), first))
    singles = (_causal(llm, 1, prompt + done, counting).for_samples(batch) for done in range(1, tokens))
    rows.append(StageCost("language, single tokens", 0, sum(singles, Work())))
    rows.append(StageCost("embeddings", _parameters([llm.embed_tokens, llm.norm]), Work()))
    output = nn.Linear(config.language.width, config.language.vocab_size, bias=False, device="meta")
    chosen = sum((_linear(output, batch) for _ in range(tokens)), Work())
    rows.append(StageCost("output vocabulary", _parameters([output]), chosen))
    return [*rows, _sum(TOTAL, rows), _sum(REPEATED, rows)]


def without_stages(config: CogVLAConfig, embodiment: Embodiment) -> tuple[CogVLAConfig, Embodiment]:
    """Return the backbone of OpenVLA: no stage of CogVLA, and the first view only."""
    routing = replace(config.routing, efa=False, film=False, lfp=False)
    return replace(config, routing=routing), replace(embodiment, cameras=embodiment.cameras[:1])


def _encoder(network: Any, tokens: int, counting: Counting) -> Work:
    """Count a text encoder for one instruction, without the special tokens that its tokenizer adds."""
    config = network.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = sum((_attention(tokens, tokens, width, counting) for _ in range(config.num_hidden_layers)), Work())
    return _linears([network], tokens) + layers


def _causal(llm: Any, asking: int, keys: int, counting: Counting) -> Work:
    """Count all layers for the last `asking` of `keys` tokens of one sample; the others are in the cache."""
    work = Work()
    for layer in llm.layers:
        work += _linears([layer.self_attn, layer.mlp], asking)
        work += _attention(asking, keys, layer.self_attn.q_proj.out_features, counting)
    return work


def _sum(name: str, rows: Iterable[StageCost]) -> StageCost:
    rows = list(rows)
    return StageCost(name, sum(r.parameters for r in rows), sum((r.work for r in rows), Work()))


def _parameters(modules: Iterable[nn.Module | None]) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def _linear_layers(modules: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    return (layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear))


def _linear(layer: nn.Linear, rows: int) -> Work:
    inputs, outputs = layer.in_features, layer.out_features
    return Work(rows * inputs * outputs, _parameters([layer]), rows * (inputs + outputs))


def _linears(modules: Iterable[nn.Module], rows: int) -> Work:
    """Count all linear layers in these modules, each with this number of rows."""
    return sum((_linear(layer, rows) for layer in _linear_layers(modules)), Work())


def _watched(module: nn.Module, inputs: torch.Tensor) -> Work:
    """Run a module on the meta device, and count every call of its linear layers."""
    seen: list[Work] = []

    def watch(layer: Any, given: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        seen.append(_linear(layer, given[0].numel() // layer.in_features))

    hooks = [layer.register_forward_hook(watch) for layer in _linear_layers([module])]
    with torch.no_grad(), torch.device("meta"):
        module(inputs)
    for hook in hooks:
        hook.remove()
    return sum(seen, Work())


def _attention(asking: int, keys: int, width: int, counting: Counting) -> Work:
    return Work(2 * asking * keys * width, 0, 2 * (asking + keys) * width) if counting.attention else Work()


def _tower(tower: VisionTower, counting: Counting, reduced: tuple[int, int] | None = None) -> Work:
    """Count the work of a tower for one view; `reduced`: a block, and the number of patches from it on."""
    vit, width = tower.vit, tower.width
    patches = vit.patch_embed.num_patches
    extra = 0 if tower.aggregation is None else len(tower.aggregation.tokens)
    tokens = patches + vit.num_prefix_tokens + extra
    kernel = vit.patch_embed.proj.weight
    work = Work(patches * kernel.numel(), kernel.numel() + width, patches * (kernel[0].numel() + width))
    for index, block in enumerate(vit.blocks[: tower.computed]):
        if reduced is not None and index == reduced[0]:
            tokens += reduced[1] - patches
        # The last block returns only the aggregation tokens, so only these have queries and an MLP.
        few = extra and index == tower.computed - 1 and type(block.attn) is Attention and not counting.every_row
        asking = extra if few else tokens
        work += _attention(asking, tokens, width, counting)
        if few:
            weights = _parameters([block.attn.qkv])
            work += Work((2 * tokens + asking) * width * width, weights, (3 * tokens + 2 * asking) * width)
            work += _linear(block.attn.proj, asking)
        else:
            work += _linears([block.attn], tokens)
        work += _linears([block.mlp], asking)
    if counting.last_block:
        block = vit.blocks[-1]  # all blocks have the same shape
        work += _attention(tokens, tokens, width, counting)
        work += _linears([block.attn, block.mlp], tokens)
    return work


def _decoder(model: CogVLA, layout: TokenLayout, counting: Counting) -> list[StageCost]:
    """Count the language model for one sample: dense layers, routed layers, and routers."""
    decoder = model.decoder
    layers = list(decoder.llm.layers)
    parameters, work = {False: 0, True: 0}, {False: Work(), True: Work()}
    routers = Work()
    for index, (layer, tokens) in enumerate(zip(layers, model.plan(layout.vision), strict=True)):
        if routed := str(index) in decoder.routers:
            router = cast(FiLMRouter, decoder.routers[str(index)])
            scored = layout.with_vision(tokens.enter).length if router.score_all else tokens.enter
            routers += _linears([router.scale, router.shift], 1) + _linear(router.logits, scored)
            context = layout.context.stop - layout.context.start
            routers += Work(context * router.logits.in_features, 0, context + (context + 1) * router.logits.in_features)
        now = layout.with_vision(tokens.process)
        read = decoder.read_rows(now)
        last = index == len(layers) - 1 and not counting.every_row
        asking = read.stop - read.start if last else now.length
        heads = layer.self_attn
        parameters[routed] += _parameters([layer])
        work[routed] += _linears([heads.k_proj, heads.v_proj], now.length)
        work[routed] += _linears([heads.q_proj, heads.o_proj, layer.mlp], asking)
        work[routed] += _attention(asking, now.length, heads.q_proj.out_features, counting)
    return [
        StageCost("language, dense layers", parameters[False], work[False]),
        StageCost("language, routed layers", parameters[True], work[True]),
        StageCost("routers", _parameters([decoder.routers, model.router]), routers),
    ]
