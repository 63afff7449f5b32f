"""Load published weights with other names into our model, tensor by tensor.

A checkpoint is a mapping from names to tensors that opens its file for each tensor and closes it again. So no weights
are in memory twice, and a model from `cogvla.policy.model.empty_model` needs no more memory than its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

Names = Callable[[str], Sequence[str]]
"""Function from the name of our parameter to published names: none if it has no counterpart, several to be stacked."""


def check_numbers(name: str, tensor: Tensor) -> None:
    """Check that a tensor holds finite numbers of at least 16 bits.

    Raises:
        ValueError: it has NaN or infinite numbers, or integers, 8-bit or other numbers that need a scale.
    """
    _check_type(name, tensor)
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise ValueError(f"{name} has NaN or infinite numbers; download the weights again, or use other ones")


def _check_type(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} has numbers of type {kind}: weights must be float16, bfloat16, float32 or float64")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse; save it as a dense tensor")


class Renamed(Mapping[str, Tensor]):
    """Several mappings as one, with changed names.

    Args:
        parts: mappings, each with a function from an old name to the new name (None: leave the tensor out). If several
            have the same new name, the last one is used.

    Raises:
        ValueError: two tensors of one mapping get the same name.
    """

    def __init__(self, *parts: tuple[Mapping[str, Tensor], Callable[[str], str | None]]) -> None:
        self._where: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        for mapping, rename in parts:
            for name in mapping:
                if (new := rename(name)) is None:
                    continue
                if new in self._where and self._where[new][0] is mapping:
                    raise ValueError(f"the weights hold {new} twice, as {self._where[new][1]} and as {name}")
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

    The prefixes `module.` (DDP) and `_orig_mod.` (torch.compile) are removed, names in nested mappings are joined by
    dots, and a state dict inside of `state_dict` or `model_state_dict` is taken out.

    Raises:
        ValueError: the file is damaged, not a mapping of names to tensors, or has a name twice.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files make torch raise almost anything
        raise ValueError(f"cannot read weights from {path} ({type(error).__name__}: {error})") from error
    if isinstance(content, Mapping):
        inner = [key for key in ("state_dict", "model_state_dict") if isinstance(content.get(key), Mapping)]
        if len(inner) > 1:
            raise ValueError(f"{path} has several state dicts: {', '.join(inner)}; save the one that you want")
        content = content[inner[0]] if inner else content
    tensors: dict[str, Tensor] = {}
    for name, tensor in _flat(content, path):
        plain = re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)
        if plain in tensors:
            raise ValueError(f"{path} has {plain} twice, with and without a prefix; save the one that you want")
        tensors[plain] = tensor
    if not tensors:
        raise ValueError(f"{path} has no tensors; download it again")
    return tensors


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
        ValueError: a tensor is missing, has the wrong shape or type, or is not finite; or the weights hold more of a
            part than the model has, such as more layers or a bias.
    """
    used: set[str] = set()
    filled: dict[str, Tensor] = {}
    rest = []
    for ours, parameter in model.state_dict().items():
        theirs = names(ours)
        if not theirs:
            rest.append(ours)
            continue
        used.update(theirs)
        value = _stack(source, theirs, parameter.shape)
        if parameter.is_meta:
            filled[ours] = value.to(dtype) if dtype else value
        else:
            parameter.copy_(value)
        check_numbers(theirs[0], filled.get(ours, parameter))
    _check_places([name for name in source if name not in used], used)
    if filled:
        model.load_state_dict(filled, strict=False, assign=True)
    return rest


_WHOLE = re.compile(r"language_model\.model\.layers\.(?!\d+\.router\.)|action_head\.|proprio_projector\.")
"""Parts that are used completely or not at all."""


def _check_places(unused: Sequence[str], used: Collection[str]) -> None:
    """Check that tensors without a place in the model do not belong to what is used.

    Raises:
        ValueError: they are updates of LoRA, of a module of which other tensors are used, or of such a part.
    """
    modules = {name.rpartition(".")[0] for name in used}
    parts = {match[0] for name in used if (match := _WHOLE.match(name))}
    for name in unused:
        match = _WHOLE.match(name)
        if name.endswith(".inv_freq"):
            continue
        if ".lora_" in name:
            raise ValueError(f"{name} is an update of LoRA that is not merged; merge the adapter with peft first")
        if name.rpartition(".")[0] in modules or (match and match[0] in parts):
            raise ValueError(f"{name} has no place in the model, which uses other tensors of this part; set its sizes")


def unused_tensors(model: nn.Module, source: Mapping[str, Tensor], names: Names) -> list[str]:
    """Return the names in `source` that no parameter of the model has, in their order."""
    used = {theirs for ours in model.state_dict() for theirs in names(ours)}
    return [name for name in source if name not in used]


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
        _check_type(name, tensor)
        parts.append(tensor.reshape(wanted))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
