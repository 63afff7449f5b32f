"""Low-rank updates (LoRA) that peft saved: read their configuration, and merge them into the weights of their base."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cogvla.files import read_object
from cogvla.policy.weights.import_weights import check_numbers
from cogvla.policy.weights.safetensor_files import AGAIN, some

_NOT_PLAIN = (
    *("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"),
    *("layer_replication", "alora_invocation_tokens", "target_parameters", "trainable_token_indices"),
    *("arrow_config", "monteclora_config", "kasa_config", "megatron_config"),
)
"""Keys of an `adapter_config.json` that make updates more than `W + scale * B @ A`."""


@dataclass(frozen=True)
class Lora:
    """Rank, scale and targets of an adapter's updates.

    Attributes:
        rank: rank of every update.
        scale: factor of the updates, alpha / rank (with rsLoRA, alpha / sqrt(rank)).
        targets: endings of the names of the layers that have an update; empty: not checked.
    """

    rank: int
    scale: float
    targets: tuple[str, ...] = ()


class LoraMerged(Mapping[str, Tensor]):
    """Weights with merged low-rank updates of peft, `W + scale * B @ A`, by name.

    Args:
        base: weights by name; layers with an update may be named `x.base_layer.weight` or `x.weight`.
        adapter: tensors `x.lora_A...weight` and `x.lora_B...weight` of each update; others, as peft saves them for
            `modules_to_save` and `bias`, replace the base's tensor of their name. None: the updates are in `base`.
        lora: rank and scale.
        elsewhere: layers whose updates are merged from another file, and therefore left out here.

    Raises:
        ValueError: an update has only one matrix, another rank, or is not plain LoRA; or a tensor of the adapter has
            no counterpart in the base.
    """

    _UPDATE = re.compile(r"(.+)\.lora_([AB])(?:\.([\w-]+))?\.weight")

    def __init__(
        self,
        base: Mapping[str, Tensor],
        adapter: Mapping[str, Tensor] | None,
        lora: Lora,
        elsewhere: Collection[str] = (),
    ) -> None:
        self._base, self.lora = base, lora
        self._updates = updates = base if adapter is None else adapter
        self._pairs: dict[str, dict[str, str]] = {}
        self._names: dict[str, str] = {}
        self._replaced: dict[str, str] = {}
        wrapped: set[str] = set()
        for name in base:
            if ".lora_" in name and adapter is None:
                continue
            plain = name.replace(".base_layer.", ".")
            if plain in self._names:
                raise ValueError(f"the weights hold {plain} twice, with and without base_layer")
            self._names[plain] = name
            if plain != name and plain.endswith(".weight"):
                wrapped.add(plain)
        adapters: set[str] = set()
        for name in updates:
            plain = name.removeprefix("base_model.model.")
            if match := self._UPDATE.fullmatch(plain):
                adapters.add(match[3] or "default")
                pair, half = self._pairs.setdefault(f"{match[1]}.weight", {}), match[2]
                if half in pair and len(adapters) == 1:
                    raise ValueError(f"the adapter has {pair[half]} and {name}, the same matrix twice; keep one")
                pair[half] = name
            elif ".lora_" in plain:
                raise ValueError(f"{name} is not plain LoRA (DoRA, embedding or bias); merge the adapter with peft")
            elif adapter is not None:
                plain = re.sub(r"\.modules_to_save(\.default)?\.|\.(base_layer|original_module)\.", ".", plain)
                self._replaced[plain] = name
        if len(adapters) > 1:
            raise ValueError(f"there are several adapters ({', '.join(sorted(adapters))}); merge them with peft first")
        for target, pair in self._pairs.items():
            if pair.keys() != {"A", "B"}:
                raise ValueError(f"the adapter has only one matrix of the update of {target}; download it again")
        if adapter is None and (bare := sorted(wrapped - self._pairs.keys())):
            raise ValueError(f"the updates of {some(bare)} are missing (base_layer without lora_A); download it again")
        self._pairs = {name: pair for name, pair in self._pairs.items() if name not in elsewhere}
        if lost := [name for name in (*self._pairs, *self._replaced) if name not in self._names]:
            raise ValueError(
                f"{len(lost)} of {len(self._pairs) + len(self._replaced)} tensors of the adapter fit nothing in its "
                f"base: {some(lost)}; names of the base are such as {some(list(self._names)[:1])}; give the base that"
                " the adapter was trained on"
            )
        layers = {name.removesuffix(".weight") for name in {*self._pairs, *elsewhere}}
        layers |= {name.rpartition(".")[0] for name in self._replaced}
        if absent := [t for t in lora.targets if not any(f".{layer}".endswith(f".{t}") for layer in layers)]:
            raise ValueError(f"the adapter has no update of its target_modules {some(absent)}; download it again")

    @property
    def targets(self) -> set[str]:
        """Names of the weights that have an update."""
        return set(self._pairs)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[self._names[name]]
        if name in self._replaced:
            replaced = self._updates[self._replaced[name]]
            if replaced.shape != weight.shape:
                raise ValueError(
                    f"{self._replaced[name]} of the adapter must have shape {list(weight.shape)}, found "
                    f"{list(replaced.shape)}"
                )
            weight = replaced
        if name not in self._pairs:
            return weight
        b, a = (self._updates[self._pairs[name][half]] for half in "BA")
        for tensor in (weight, b, a):
            check_numbers(f"{name} or its update", tensor)
        rank = self.lora.rank
        if weight.ndim != 2 or a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
            raise ValueError(
                f"the update of {name} {list(weight.shape)} with rank {rank} (adapter_config.json) has the shapes "
                f"{list(b.shape)} and {list(a.shape)}; the adapter is for another base, or its configuration is wrong"
            )
        return (weight.float() + self.lora.scale * (b.float() @ a.float())).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_lora(adapter: Path, check_targets: bool = True) -> Lora:
    """Read rank and scale of an adapter's updates from its `adapter_config.json`.

    Raises:
        ValueError: the file is missing or damaged, or describes more than plain LoRA.
    """
    path = adapter / "adapter_config.json"
    try:
        config = read_object(path, AGAIN)
        rank, alpha = config["r"], float(config["lora_alpha"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the weights contain LoRA updates, but {path} does not give r and lora_alpha") from error
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"{path} needs a whole number r from 1 and lora_alpha above 0, got r={rank!r}, {alpha=}")
    start = config.get("init_lora_weights", True)  # others change the base's weights
    more = [key for key in _NOT_PLAIN if config.get(key)]
    more += [] if start in (True, False, None, "gaussian", "eva") else ["init_lora_weights"]
    more += [] if config.get("peft_type", "LORA") == "LORA" else ["peft_type"]
    if more:
        raise ValueError(f"{path} describes more than plain LoRA ({', '.join(more)}); merge it with peft first")
    targets = config.get("target_modules") if check_targets else None
    saved = config.get("modules_to_save") if check_targets else None
    named = tuple(t for group in (targets, saved) if isinstance(group, list) for t in group)
    return Lora(rank, alpha / (rank**0.5 if config.get("use_rslora") else rank), named)
