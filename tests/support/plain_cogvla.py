"""CogVLA written down once more, plainly: one sample, float64, no tricks, in the published parameter names.

Follows the equations of the paper and what its code does; shares nothing with `policy/` and `routing/`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

LLM = "language_model.model"


@dataclass(frozen=True)
class Sizes:
    """The keys of fixture.json."""

    image_size: int = 12
    patch_size: int = 6
    vit_depth: int = 3
    vit_heads: int = 2
    dino_dim: int = 8
    siglip_dim: int = 12
    dinov2_registers: int = 2
    agg: int = 5
    images: int = 2
    hidden: int = 16
    inter: int = 24
    layers: int = 5
    llm_heads: int = 4
    vocab_size: int = 40
    rms_norm_eps: float = 1e-6
    lfp_type: str = "shiftedcos_decay_0.85_0.15"
    lfp_avg: float = 0.5
    action_dim: int = 3
    chunk: int = 2
    proprio_dim: int = 4
    normalization: str = "bounds_q99"
    cases: int = 2


def keep_ratios(sizes: Sizes) -> dict[int, float]:
    """Routed layers and their ratios."""
    kind, layers, mean = sizes.lfp_type, range(sizes.layers), sizes.lfp_avg
    if "_decay_" in kind:
        shape, limits = kind.split("_decay_")
        high, low = (float(limit) for limit in limits.split("_"))
        decay = {
            "shiftedcos": lambda layer: math.cos(layer * math.pi / 31) / 2 + mean,
            "shiftedlinear": lambda layer: (-layer / 31 + 0.5) + mean,
        }[shape]
        return {layer: max(decay(layer), low) for layer in layers if max(decay(layer), low) <= high}
    chosen = {
        "interleave": layers[1::2],
        "deep_all": layers[2:],
        "deep_all_wo_last": layers[2:-1],
        "none": (),
    }[kind]
    return dict.fromkeys(chosen, mean)


def random_weights(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights; those of the head and the state's projector have their prefixes."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def norm(name: str, width: int, bias: bool = True) -> None:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        if bias:
            weights[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        if bias:
            weights[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    d, patches = sizes.hidden, (sizes.image_size // sizes.patch_size) ** 2
    for tower, width in (("featurizer", sizes.dino_dim), ("fused_featurizer", sizes.siglip_dim)):
        vit = f"vision_backbone.vision_backbone.{tower}"
        linear(f"{vit}.patch_embed.proj", 3 * sizes.patch_size**2, width)
        kernel = weights[f"{vit}.patch_embed.proj.weight"]
        weights[f"{vit}.patch_embed.proj.weight"] = kernel.reshape(width, 3, sizes.patch_size, sizes.patch_size)
        tokens = {"pos_embed": patches}
        if tower == "featurizer":
            tokens |= {"cls_token": 1} | ({"reg_token": sizes.dinov2_registers} if sizes.dinov2_registers else {})
        for name, count in tokens.items():
            weights[f"{vit}.{name}"] = torch.randn(1, count, width, generator=generator)
        weights[f"vision_backbone.vision_aggr_{tower}"] = torch.randn(1, sizes.agg, width, generator=generator)
        for index in range(sizes.vit_depth):
            block = f"{vit}.blocks.{index}"
            for part in ("scale", "shift"):
                linear(f"{block}.{part}", d, width)
            for part in ("norm1", "norm2"):
                norm(f"{block}.block.{part}", width)
            linear(f"{block}.block.attn.qkv", width, 3 * width)
            linear(f"{block}.block.attn.proj", width, width)
            linear(f"{block}.block.mlp.fc1", width, 4 * width)
            linear(f"{block}.block.mlp.fc2", 4 * width, width)
            if tower == "featurizer":
                for part in ("ls1", "ls2"):
                    weights[f"{block}.block.{part}.scale_factor"] = torch.rand(width, generator=generator)
        norm(f"{vit}.norm", width)
        linear(f"{tower}_proj.fc1", width, d)
        linear(f"{tower}_proj.fc2", d, d)
    linear("aggregation_router.router.0", d, d)
    linear("aggregation_router.router.2", d, 2)
    weights[f"{LLM}.embed_tokens.weight"] = torch.randn(sizes.vocab_size, d, generator=generator)
    weights["language_model.lm_head.weight"] = torch.randn(sizes.vocab_size, d, generator=generator)
    routed = keep_ratios(sizes)
    for index in range(sizes.layers):
        layer = f"{LLM}.layers.{index}"
        for part in ("input_layernorm", "post_attention_layernorm"):
            norm(f"{layer}.{part}", d, bias=False)
        for part in "qkvo":
            linear(f"{layer}.self_attn.{part}_proj", d, d, bias=False)
        for part, inputs, outputs in (("gate", d, sizes.inter), ("up", d, sizes.inter), ("down", sizes.inter, d)):
            linear(f"{layer}.mlp.{part}_proj", inputs, outputs, bias=False)
        if index in routed:
            for part in ("scale", "shift"):
                linear(f"{layer}.router.{part}.0", d, d // 2)
                linear(f"{layer}.router.{part}.2", d // 2, d)
            linear(f"{layer}.router.router", d, 2)
    norm(f"{LLM}.norm", d, bias=False)
    head = "action_head.model"
    norm(f"{head}.layer_norm1", d * sizes.action_dim)
    linear(f"{head}.fc1", d * sizes.action_dim, d)
    for number in range(2):
        norm(f"{head}.mlp_resnet_blocks.{number}.ffn.0", d)
        linear(f"{head}.mlp_resnet_blocks.{number}.ffn.1", d, d)
    norm(f"{head}.layer_norm2", d)
    linear(f"{head}.fc2", d, sizes.action_dim)
    linear("proprio_projector.fc1", sizes.proprio_dim, d)
    linear("proprio_projector.fc2", d, d)
    return weights


class PlainCogVLA:
    """Every stage of one sample, by its name in cases.safetensors."""

    def __init__(self, weights: dict[str, Tensor], sizes: Sizes) -> None:
        self.w, self.sizes = {name: tensor.double() for name, tensor in weights.items()}, sizes

    def run(self, input_ids: Tensor, pixel_values: Tensor, proprio: Tensor) -> dict[str, Tensor]:
        sizes, out = self.sizes, {}
        ids = [*input_ids.flatten().tolist(), 2]
        words = self.w[f"{LLM}.embed_tokens.weight"][ids]
        summary = words.mean(0)
        share = self._linear(
            "aggregation_router.router.2", F.gelu(self._linear("aggregation_router.router.0", summary))
        )
        share = share.softmax(-1)
        views = []
        for view in range(sizes.images):
            mixed: Any = 0
            for stream, (tower, name) in enumerate((("featurizer", "dinov2"), ("fused_featurizer", "siglip"))):
                channel = 6 * view + 3 * stream
                tokens = self._tower(tower, pixel_values[0, channel : channel + 3].double(), summary)
                out[f"vision.view{view}.{name}"] = tokens[None]
                hidden = F.gelu(self._linear(f"{tower}_proj.fc1", tokens))
                mixed = mixed + share[stream] * self._linear(f"{tower}_proj.fc2", hidden)
            views.append(mixed)
        state = self._linear("proprio_projector.fc1", proprio.double().flatten())
        state = self._linear("proprio_projector.fc2", F.gelu(state))
        actions = torch.zeros(sizes.chunk * sizes.action_dim, sizes.hidden, dtype=torch.double)
        x = torch.cat((words[:1], *views, state[None], words[1:-1], actions, words[-1:]))
        first_action = len(x) - 1 - len(actions)
        routed, vision = keep_ratios(sizes), sizes.images * sizes.agg
        for index in range(sizes.layers):
            rows, scale = list(range(len(x))), torch.ones(len(x), dtype=torch.double)
            if index in routed:
                rows, scale = self._route(index, x, vision, first_action, int(vision * routed[index]))
                out[f"kept.layer{index}"] = torch.tensor([rows])
            x = x.clone()
            x[rows] = self._layer(index, x[rows], len(actions) + 1, scale)
            out[f"hidden.layer{index}"] = x[None]
        # The state of a token predicts the next one, so the first action is read from the last word.
        read = self._rms(f"{LLM}.norm", x)[first_action - 1 : first_action - 1 + len(actions)]
        out["action_hidden"] = read[None]
        normalized = self._head(read.reshape(sizes.chunk, -1))
        out["normalized_actions"] = normalized[None]
        return out

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def _rms(self, name: str, x: Tensor) -> Tensor:
        return self.w[f"{name}.weight"] * x * (x.pow(2).mean(-1, keepdim=True) + self.sizes.rms_norm_eps).rsqrt()

    def _tower(self, tower: str, image: Tensor, summary: Tensor) -> Tensor:
        vit = f"vision_backbone.vision_backbone.{tower}"
        kernel, bias = (self.w[f"{vit}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        x = F.conv2d(image[None], kernel, bias, stride=self.sizes.patch_size)[0].flatten(1).T
        x = x + self.w[f"{vit}.pos_embed"][0]
        prefix = [self.w[f"{vit}.{name}"][0] for name in ("cls_token", "reg_token") if f"{vit}.{name}" in self.w]
        x = torch.cat((*prefix, x, self.w[f"vision_backbone.vision_aggr_{tower}"][0]))
        for index in range(self.sizes.vit_depth - 1):  # the last block is not used
            block = f"{vit}.blocks.{index}"
            x = x + self._attend(f"{block}.block", x) * self.w.get(f"{block}.block.ls1.scale_factor", 1.0)
            x = x * (1 + self._linear(f"{block}.scale", summary)) + self._linear(f"{block}.shift", summary)
            hidden = F.gelu(self._linear(f"{block}.block.mlp.fc1", self._norm(f"{block}.block.norm2", x, 1e-6)))
            update = self._linear(f"{block}.block.mlp.fc2", hidden)
            x = x + update * self.w.get(f"{block}.block.ls2.scale_factor", 1.0)
        return x[-self.sizes.agg :]

    def _attend(self, block: str, x: Tensor) -> Tensor:
        q, k, v = self._linear(f"{block}.attn.qkv", self._norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        heads = []
        for q_h, k_h, v_h in zip(*(t.chunk(self.sizes.vit_heads, -1) for t in (q, k, v)), strict=True):
            heads.append((q_h @ k_h.T / math.sqrt(q_h.shape[-1])).softmax(-1) @ v_h)
        return self._linear(f"{block}.attn.proj", torch.cat(heads, -1))

    def _route(self, index: int, x: Tensor, vision: int, first_action: int, count: int) -> tuple[list[int], Tensor]:
        layer = f"{LLM}.layers.{index}"
        h = self._rms(f"{layer}.input_layernorm", x)
        text = h[1 + vision : first_action].mean(0)
        gamma, beta = (
            self._linear(f"{layer}.router.{part}.2", F.gelu(self._linear(f"{layer}.router.{part}.0", text)))
            for part in ("scale", "shift")
        )
        seen = torch.cat((h[:1], h[1 : 1 + vision] * (1 + gamma) + beta, h[1 + vision :]))
        share = self._linear(f"{layer}.router.router", seen).softmax(-1)[:, 1]
        best = sorted(range(1, 1 + vision), key=lambda row: -float(share[row]))[:count]
        rows = [0, *sorted(best), *range(1 + vision, len(x))]
        return rows, share[rows]

    def _layer(self, index: int, x: Tensor, block: int, scale: Tensor) -> Tensor:
        layer, size = f"{LLM}.layers.{index}", len(x)
        h = self._rms(f"{layer}.input_layernorm", x)
        width = self.sizes.hidden // self.sizes.llm_heads
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.double) / width)
        angle = torch.outer(torch.arange(size, dtype=torch.double), frequency).repeat(1, 2)
        mask = torch.ones(size, size).tril().bool()
        mask[-block:, -block:] = True
        heads = []
        chunks = (self._linear(f"{layer}.self_attn.{part}_proj", h).split(width, -1) for part in "qkv")
        for q, k, v in zip(*chunks, strict=True):
            turned = []
            for t in (q, k):
                half = torch.cat((-t[:, width // 2 :], t[:, : width // 2]), -1)
                turned.append(t * angle.cos() + half * angle.sin())
            logits = (turned[0] @ turned[1].T / math.sqrt(width)).masked_fill(~mask, -math.inf)
            heads.append(logits.softmax(-1) @ v)
        x = x + self._linear(f"{layer}.self_attn.o_proj", torch.cat(heads, -1))
        h = self._rms(f"{layer}.post_attention_layernorm", x)
        gated = F.silu(self._linear(f"{layer}.mlp.gate_proj", h)) * self._linear(f"{layer}.mlp.up_proj", h)
        return x + self._linear(f"{layer}.mlp.down_proj", gated) * scale[:, None]

    def _head(self, x: Tensor) -> Tensor:
        head = "action_head.model"
        x = self._linear(f"{head}.fc1", self._norm(f"{head}.layer_norm1", x)).relu()
        for block in range(2):
            ffn = f"{head}.mlp_resnet_blocks.{block}.ffn"
            x = x + self._linear(f"{ffn}.1", self._norm(f"{ffn}.0", x)).relu()
        return self._linear(f"{head}.fc2", self._norm(f"{head}.layer_norm2", x))


def norm_stats(sizes: Sizes) -> dict[str, Any]:
    def of(dim: int) -> dict[str, list[float]]:
        low = [-1 - 0.1 * index for index in range(dim)]
        high = [0.5 + 0.2 * index for index in range(dim)]
        return {
            "q01": low,
            "q99": high,
            "min": [value - 0.3 for value in low],
            "max": [value + 0.4 for value in high],
            "mean": [0.0] * dim,
            "std": [1.0] * dim,
        }

    mask = [True] * (sizes.action_dim - 1) + [False]
    return {"action": {**of(sizes.action_dim), "mask": mask}, "proprio": of(sizes.proprio_dim)}


def unnormalise(sizes: Sizes, normalized: Tensor) -> Tensor:
    action = norm_stats(sizes)["action"]
    bounds = ("q01", "q99") if sizes.normalization == "bounds_q99" else ("min", "max")
    low, high = (torch.tensor(action[bound]).double() for bound in bounds)
    return torch.where(torch.tensor(action["mask"]), (normalized + 1) / 2 * (high - low + 1e-8) + low, normalized)


def write_reference(folder: Path, sizes: Sizes, seed: int = 0) -> None:
    """A reference folder, see `cogvla.policy.weights.reference`."""
    weights, generator = random_weights(sizes, seed), torch.Generator().manual_seed(seed + 1)
    plain = PlainCogVLA(weights, sizes)
    cases: dict[str, Tensor] = {}
    for case in range(sizes.cases):
        words = torch.randint(3, sizes.vocab_size, (1, 2 + 3 * case), generator=generator)
        given = {
            "input_ids": torch.cat((torch.ones_like(words[:, :1]), words), dim=1),
            "pixel_values": torch.randn(1, 6 * sizes.images, sizes.image_size, sizes.image_size, generator=generator),
            "proprio": torch.randn(sizes.proprio_dim, generator=generator),
        }
        found = plain.run(**given)
        found["actions"] = unnormalise(sizes, found["normalized_actions"][0])
        cases |= {f"{case}.{name}": tensor.contiguous() for name, tensor in (given | found).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(cases, folder / "cases.safetensors")
    for part in ("action_head", "proprio_projector"):
        own = {name.removeprefix(f"{part}."): t for name, t in weights.items() if name.startswith(f"{part}.")}
        save_file(own, folder / f"{part}.safetensors")
    rest = {name: t for name, t in weights.items() if not name.startswith(("action_head.", "proprio_projector."))}
    save_file(rest, folder / "model.safetensors")
    (folder / "norm_stats.json").write_text(json.dumps(norm_stats(sizes)))
    (folder / "fixture.json").write_text(json.dumps(asdict(sizes)))
