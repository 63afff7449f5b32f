"""Choose how fine-tuning trains each part of a policy: fully, through LoRA adapters (peft), or not at all.

Only memory and `training.pt` hold adapters. `model.safetensors` holds the weights with the adapters folded in, so that
a checkpoint has the same format with and without them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cogvla.policy.engine.nf4 import Nf4Linear
from cogvla.policy.model.cogvla import CogVLA

Model = TypeVar("Model", bound=nn.Module)

ADAPTER, BASE, PACKED = "default", ".base_layer.", ".packed"
FINGERPRINT = 64
"""Numbers of each frozen tensor that a resumed run compares."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Parts of a policy to train. The default is all parts.

    Parts are named as in the checkpoint, e.g. `decoder.llm` or `vision.towers.*.film`; `*` matches any text.

    Attributes:
        train: parts to train fully; all parts in neither `train` nor `adapt` are frozen.
        adapt: parts whose linear layers get LoRA adapters, unless `train` names them.
        rank: rank of the LoRA adapters.
        alpha: the output of an adapter is scaled by alpha / rank.
        dropout: dropout rate of the adapters.
        bits: 4: keep the weights of layers with an adapter in 4 bits (QLoRA, NF4), see `policy.engine.nf4`; None: as
            they are.
    """

    train: tuple[str, ...] = ("*",)
    adapt: tuple[str, ...] = ()
    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.0
    bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("train", "adapt"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"finetune.{name} must be a list of parts, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if not self.train and not self.adapt:
            raise ValueError("finetune.train and finetune.adapt are both empty: there is nothing to train")
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"finetune.rank must be a positive whole number, got {self.rank!r}")
        if not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError("finetune: alpha must be positive and finite, dropout in [0,1)")
        if self.bits not in (None, 4):
            raise ValueError(f"finetune.bits must be 4 or null, got {self.bits!r}")
        if self.bits is not None and not self.adapt:
            raise ValueError("finetune.bits=4 needs finetune.adapt: weights in 4 bits are frozen")


def check_parts(model: nn.Module, config: FinetuneConfig) -> None:
    """Check that the model has every part that is named; ValueError lists those that it has."""
    parts = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    for above, module in model.named_modules():  # parts that other configurations have are None
        parts |= {f"{above}.{name}".lstrip(".") for name, value in vars(module).items() if value is None}
    for pattern in (*config.train, *config.adapt):
        if not any(fnmatchcase(name, pattern) for name in parts):
            above = pattern.rpartition(".")[0]
            known = {name.rpartition(".")[2] for name in parts if fnmatchcase(name.rpartition(".")[0], above)}
            known = {name for name in known if name and not name.startswith("_")}
            said = f"{above or 'the policy'} has {', '.join(sorted(known))}" if known else f"there is no {above}"
            raise ValueError(f"finetune names {pattern!r}, but {said}")


def prepare(model: CogVLA, config: FinetuneConfig) -> None:
    """Add adapters and freeze the weights that are not trained, in place.

    A projector that the token router replaces is never trained: several GPUs would wait for its gradients.

    Raises:
        ValueError: the model has no such part, there is no linear layer to adapt, or peft or (for 4 bits) bitsandbytes
            is not installed.
    """
    check_parts(model, config)
    before = None if model.router is None else model.router.before
    unused = ("vision.fusion",) if before is not None and before.projects else ()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _named(name, config.adapt) and not _named(name, (*config.train, *unused))
    ]
    if config.adapt and not targets:
        raise ValueError(f"finetune.adapt = {list(config.adapt)} leaves no linear layer to adapt")
    if targets:
        _inject(model, targets, config)
    for _, layer in adapted_layers(model) if config.bits is not None else ():
        layer.base_layer = Nf4Linear(layer.base_layer.weight, layer.base_layer.bias)
    for name, parameter in model.named_parameters():
        # what is new in this training can only be learned in it
        new = name.startswith("committed.") or ".lora_" in name
        trained = new or (BASE not in name and _named(name, config.train))
        parameter.requires_grad_(trained and not _named(name, unused))


def _inject(model: nn.Module, targets: list[str], config: FinetuneConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("adapters need peft: `uv pip install peft`, or train with finetune=full") from error
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        init_lora_weights="gaussian",
        target_modules="|".join(map(re.escape, targets)),
    )
    inject_adapter_in_model(lora, model, ADAPTER)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # updates are too small for bfloat16, even on a bfloat16 layer


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with an adapter, by their names in the model without adapters."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight"):
            yield name, module


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with adapters folded in; the model is not changed.

    Layers in 4 bits get the weights that these bits stand for, as in training. They are put on the CPU one by one,
    since a GPU may have no room for all.

    All weights have one precision: bfloat16 if the model has several, because its frozen weights are in bfloat16.
    Buffers (statistics of a text encoder's states) keep theirs.
    """
    merged = {f"{name}.weight": _merged(layer) for name, layer in adapted_layers(model)}
    state = {
        name.replace(BASE, "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name and not name.endswith(PACKED)
    }
    whole = {**state, **merged}
    buffers = {name for name, _ in model.named_buffers()}
    mixed = len({value.dtype for name, value in whole.items() if name not in buffers}) > 1
    return {name: value.bfloat16() if mixed and name not in buffers else value for name, value in whole.items()}


def merge(model: nn.Module) -> dict[str, Tensor]:
    """Fold the adapters into the weights, in place; return the original weights for `unmerge`.

    Raises:
        ValueError: layers are in 4 bits, into which nothing can be folded.
    """
    base = {}
    for name, layer in adapted_layers(model):
        if isinstance(layer.base_layer, Nf4Linear):
            raise ValueError("adapters of layers in 4 bits cannot be merged in place: use merged_state")
        base[name] = layer.base_layer.weight.detach().clone()
        layer.merge(safe_merge=True)
    return base


def unmerge(model: nn.Module, base: dict[str, Tensor]) -> None:
    """Undo `merge` in place; restores the original weights `base` exactly, which subtraction would not."""
    for name, layer in adapted_layers(model):
        layer.unmerge()
        with torch.no_grad():
            layer.base_layer.weight.copy_(base[name])


def fold(model: Model) -> Model:
    """Replace adapted layers by plain linear layers with merged weights, in place; return the model.

    Other models that share the original weights are not changed. Layers in 4 bits keep their adapters.
    """
    for name, layer in list(adapted_layers(model)):
        if isinstance(layer.base_layer, Nf4Linear):
            continue
        plain = layer.base_layer
        plain.weight = nn.Parameter(_merged(layer), requires_grad=False)
        model.set_submodule(name, plain)
    return model


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    weight = layer.base_layer.weight
    merged = (weight.float() + layer.get_delta_weight(ADAPTER).float()).to(weight.dtype)
    return merged.cpu() if isinstance(layer.base_layer, Nf4Linear) and not merged.is_meta else merged


def fingerprint(module: nn.Module) -> Tensor:
    """Return the first numbers of every frozen tensor, to check that training resumes with the same frozen weights."""
    frozen = [p.detach().flatten()[:FINGERPRINT].float().cpu() for p in module.parameters() if not p.requires_grad]
    return torch.cat([torch.empty(0), *frozen])


def summary(model: nn.Module) -> str:
    """Describe for the log how many parameters are trained fully, trained in adapters, and frozen."""
    full = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    frozen, packed = frozen_numbers(model)
    layers = sum(1 for _ in adapted_layers(model))
    said = f", {packed:,} of them in 4 bits" if packed else ""
    return (
        f"{full:,} parameters are trained, {adapters:,} in the adapters of {layers} layers, {frozen:,} are frozen{said}"
    )


def frozen_numbers(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers are frozen, and how many of these are in 4 bits."""
    layers = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    stored = sum(layer.packed.numel() for layer in layers)
    packed = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(p.numel() for p in model.parameters() if not p.requires_grad) - stored + packed, packed
