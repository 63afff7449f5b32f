"""Load published weights with other names into our model, tensor by tensor.

A checkpoint is a mapping from names to tensors that opens its file for each tensor and closes it again. So no weights
are in memory twice, and a model from `cogvla.policy.model.empty_model` needs no more memory than its weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor, nn

from cogvla.files import visible

Names = Callable[[str], Sequence[str]]
"""Function from the name of our parameter to published names: none if it has no counterpart, several to be stacked."""


class SafetensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder with one or more safetensors files, by name.

    Raises:
        ValueError: there are no such files, one is damaged, or one that the index names is missing.
    """

    def __init__(self, folder: Path, pattern: str = "*.safetensors") -> None:
        self._file: dict[str, Path] = {}
        for index in visible(folder, "*.safetensors.index.json"):
            if absent := sorted({file for file in _shards(index) if not (folder / file).is_file()}):
                raise ValueError(f"{folder} is incomplete: {', '.join(absent)} missing; download all of its files")
        for path in visible(folder, pattern):
            with _opened(path) as file:
                self._file |= dict.fromkeys(file.keys(), path)
        if not self._file:
            raise ValueError(f"no weights ({pattern}) in {folder}; download all of its files")

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._file[name]) as file:
            return file.get_tensor(name).clone()  # a copy, so that closing the file frees its memory

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def _shards(index: Path) -> list[str]:
    try:
        return list(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}); download it again") from error


class _opened:  # noqa: N801 - used like a function
    """Context manager that opens a safetensors file; raises ValueError with its name if it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> safe_open:
        try:
            self._file = safe_open(self._path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{self._path} is damaged or incomplete ({error}); download it again") from error
        return self._file

    def __exit__(self, *_: object) -> None:
        del self._file


class LoraMerged(Mapping[str, Tensor]):
    """Weights with merged low-rank updates of peft, `W + alpha/rank * B @ A`, by name.

    Args:
        base: weights by name; layers with an update may be named `x.base_layer.weight` or `x.weight`.
        updates: tensors `x.lora_A...weight` and `x.lora_B...weight` of each update; other names are ignored.
        scale: alpha / rank.

    Raises:
        ValueError: one matrix of an update is missing.
    """

    _UPDATE = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")

    def __init__(self, base: Mapping[str, Tensor], updates: Mapping[str, Tensor], scale: float) -> None:
        self._base, self._updates, self.scale = base, updates, scale
        self._names = {name.replace(".base_layer.", "."): name for name in base if not self._UPDATE.fullmatch(name)}
        self._pairs: dict[str, dict[str, str]] = {}
        for name in updates:
            if match := self._UPDATE.fullmatch(name):
                self._pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = name
        for target, pair in self._pairs.items():
            if pair.keys() != {"A", "B"}:
                raise ValueError(f"the adapter has only one matrix of the update of {target}; download it again")

    @property
    def targets(self) -> set[str]:
        """Names of the weights that have an update."""
        return set(self._pairs)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[self._names[name]]
        if name not in self._pairs:
            return weight
        b, a = (self._updates[self._pairs[name][half]].float() for half in "BA")
        return (weight.float() + self.scale * (b @ a)).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Renamed(Mapping[str, Tensor]):
    """Several mappings as one, with changed names.

    Args:
        parts: mappings, each with a function from an old name to the new name (None: leave the tensor out). If several
            have the same new name, the last one is used.
    """

    def __init__(self, *parts: tuple[Mapping[str, Tensor], Callable[[str], str | None]]) -> None:
        self._where: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        for mapping, rename in parts:
            for name in mapping:
                if (new := rename(name)) is not None:
                    self._where[new] = (mapping, name)

    def __getitem__(self, name: str) -> Tensor:
        mapping, original = self._where[name]
        return mapping[original]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def read_pt(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote, without running code from the file.

    The prefix `module.` (DDP) is removed, and names in nested mappings are joined by dots.

    Raises:
        ValueError: the file is damaged, or not a mapping of names to tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files make torch raise almost anything
        raise ValueError(f"cannot read weights from {path} ({type(error).__name__}: {error})") from error
    return {name.removeprefix("module."): tensor for name, tensor in _flat(content, path)}


def _flat(content: object, path: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a state dict: {prefix or 'it'} is a {type(content).__name__}")
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, path, f"{prefix}{key}.")


@torch.no_grad()
def load_parameters(
    model: nn.Module, source: Mapping[str, Tensor], names: Names, dtype: torch.dtype | None = None
) -> list[str]:
    """Load the parameters of `model` from published weights, in place.

    Args:
        model: model to fill; parameters on the meta device are replaced, others are overwritten.
        source: published weights by name.
        names: published names of our parameters, see `Names`.
        dtype: precision of parameters that were on the meta device; None: that of the source.

    Returns:
        Names of our parameters that have no published name.

    Raises:
        ValueError: a tensor is missing or has the wrong shape.
    """
    filled: dict[str, Tensor] = {}
    rest = []
    for ours, parameter in model.state_dict().items():
        theirs = names(ours)
        if not theirs:
            rest.append(ours)
            continue
        value = _stack(source, theirs, parameter.shape)
        if parameter.is_meta:
            filled[ours] = value.to(dtype) if dtype else value
        else:
            parameter.copy_(value)
    if filled:
        model.load_state_dict(filled, strict=False, assign=True)
    return rest


def _stack(source: Mapping[str, Tensor], names: Sequence[str], shape: torch.Size) -> Tensor:
    """Return one tensor in this shape, or several of equal size concatenated along the first dimension."""
    wanted = (shape[0] // len(names), *shape[1:]) if len(names) > 1 else tuple(shape)
    parts = []
    for name in names:
        if name not in source:
            raise ValueError(f"parameter {name} {list(wanted)} is missing")
        found = tuple((tensor := source[name]).shape)
        if found not in (wanted, (1, *wanted)):
            raise ValueError(f"parameter {name} must have shape {list(wanted)}, found {list(found)}")
        parts.append(tensor.reshape(wanted))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
