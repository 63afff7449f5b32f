"""Small random checkpoints in the layouts in which OpenVLA and CogVLA are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cogvla.tests.support.plain_cogvla import Sizes, norm_stats, random_weights

SIZES = Sizes(lfp_type="interleave", lfp_avg=0.6, vocab_size=48)
ALPHA, RANK = 16, 4


def write_tokenizer(folder: Path) -> None:
    words = [
        "<s>",
        "</s>",
        "<unk>",
        "<p>",
        "In",
        "Out",
        "What",
        "action",
        "robot",
        "take",
        "to",
        "push",
        "cube",
        ":",
        "?",
    ]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", pad_token="<p>")
    fast.save_pretrained(folder)


def write_shards(folder: Path, weights: dict[str, Tensor], shards: int = 3) -> None:
    """As transformers shards a model: files with numbers, and an index."""
    names = list(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = names[shard::shards]
        save_file({name: weights[name].contiguous() for name in own}, folder / file)
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def hub_config(sizes: Sizes = SIZES, **more: Any) -> dict[str, Any]:
    """What config.json says about sizes; towers of timm have no place in it for sizes of our own, so it names none."""
    text = {
        "model_type": "llama",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inter,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.llm_heads,
        "pad_token_id": 3,
    }
    return {"model_type": "openvla", "text_config": text, "image_sizes": [sizes.image_size] * 2, **more}


def openvla_weights(sizes: Sizes = SIZES, seed: int = 0) -> dict[str, Tensor]:
    """Names and random weights of an OpenVLA with these sizes, as on the hub."""
    weights = {}
    for name, tensor in random_weights(sizes, seed).items():
        if name.startswith("vision_backbone.vision_backbone."):
            if ".scale." not in name and ".shift." not in name:
                plain = name.removeprefix("vision_backbone.").replace(".block.", ".")
                weights[plain] = tensor
        elif name.startswith("language_model.") and ".router." not in name:
            weights[name] = tensor
    total, generator = sizes.dino_dim + sizes.siglip_dim, torch.Generator().manual_seed(seed)
    for name, shape in {
        "fc1": (4 * total, total),
        "fc2": (sizes.hidden, 4 * total),
        "fc3": (sizes.hidden,) * 2,
    }.items():
        weights[f"projector.{name}.weight"] = 0.2 * torch.randn(shape, generator=generator)
        weights[f"projector.{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return weights


def write_openvla(folder: Path, weights: dict[str, Tensor] | None = None, sizes: Sizes = SIZES) -> None:
    folder.mkdir(parents=True)
    write_shards(folder, openvla_weights(sizes) if weights is None else weights)
    config = hub_config(sizes, norm_stats={"robot": norm_stats(sizes), "another": norm_stats(sizes)})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def write_prismatic(folder: Path, weights: dict[str, Tensor]) -> None:
    """A run of the Prismatic training code: nested state dicts in one .pt."""
    nested: dict[str, dict[str, Tensor]] = {"projector": {}, "llm_backbone": {}, "vision_backbone": {}}
    steps = {"fc1": "0", "fc2": "2", "fc3": "4"}
    for name, tensor in weights.items():
        area, _, rest = name.partition(".")
        if area == "projector":
            part, kind = rest.split(".")
            nested[area][f"projector.{steps[part]}.{kind}"] = tensor
        elif area == "language_model":
            nested["llm_backbone"][f"llm.{rest}"] = tensor
        else:
            rest = rest.replace("fused_featurizer.", "siglip_featurizer.") if "fused" in rest else f"dino_{rest}"
            nested["vision_backbone"][rest.replace(".scale_factor", ".gamma")] = tensor
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"model": nested}, folder / "checkpoints" / "latest-checkpoint.pt")
    (folder / "config.json").write_text(json.dumps({"model": {"model_id": "prism"}}))


def write_cogvla(folder: Path, sizes: Sizes = SIZES, seed: int = 0, merged: bool = True) -> dict[str, Tensor]:
    """A CogVLA as its training leaves it, with (`merged`) or without the language model beside the adapter.

    Returns the weights that it stands for. Its towers hold updates that are not merged, its adapter updates that are.
    """
    folder.mkdir(parents=True)
    weights, generator = random_weights(sizes, seed), torch.Generator().manual_seed(seed + 7)

    def update(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = 0.1 * torch.randn(RANK, weight.shape[1], generator=generator)
        b = 0.1 * torch.randn(weight.shape[0], RANK, generator=generator)
        return a, b, weight - ALPHA / RANK * (b @ a)

    towers: dict[str, Tensor] = {}
    model: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith("vision_backbone."):
            inner = name.removeprefix("vision_backbone.")
            stem, _, kind = inner.rpartition(".")
            if stem.endswith(("attn.qkv", "mlp.fc1")):
                towers[f"{stem}.base_layer.{kind}"] = tensor
                if kind == "weight":
                    pair = (f"{stem}.lora_A.default.weight", f"{stem}.lora_B.default.weight")
                    towers[pair[0]], towers[pair[1]], towers[f"{stem}.base_layer.weight"] = update(tensor)
            else:
                towers[inner] = tensor
        elif name.startswith(("action_head.", "proprio_projector.")):
            continue
        elif ".router." in name or "_proj." in name.partition("language_model")[0]:
            (model if merged else new)[name] = tensor
        elif name.endswith(("q_proj.weight", "down_proj.weight")):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"], before = update(tensor)
            model[name] = tensor if merged else before
        else:
            model[name] = tensor
    if merged:
        model["vision_backbone.featurizer.pos_embed"] = torch.zeros(1)  # the base's towers lie there too, unused
        write_shards(folder, model)
    else:
        torch.save(new, folder / "non_lora_trainables--20_checkpoint.pt")
        write_openvla(folder.with_name("base"), {**openvla_weights(sizes, seed + 1), **model})
    torch.save(towers, folder / "vision_backbone--20_checkpoint.pt")
    for part in ("action_head", "proprio_projector"):
        own = {f"module.{n.removeprefix(f'{part}.')}": t for n, t in weights.items() if n.startswith(f"{part}.")}
        torch.save(own, folder / f"{part}--20_checkpoint.pt")
    (folder / "lora_adapter").mkdir()
    save_file(adapter, folder / "lora_adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "dataset_statistics.json").write_text(json.dumps({"robot": {**norm_stats(sizes), "num_transitions": 9}}))
    config = hub_config(sizes, use_aggr=True, use_film=True, num_vision_aggr=sizes.agg, vision_aggregate_type="moe")
    config["text_config"] |= {"use_lfp": True, "lfp_type": sizes.lfp_type, "lfp_average_factor": sizes.lfp_avg}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return weights
