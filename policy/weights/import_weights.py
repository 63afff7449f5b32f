"""Load published weights with other names into our model, tensor by tensor.

A checkpoint is a mapping from names to tensors that opens its file for each tensor and closes it again. So no weights
are in memory twice, and a model from `cogvla.policy.model.empty_model` needs no more memory than its weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor, nn

from cogvla.files import visible

Names = Callable[[str], Sequence[str]]
"""Function from the name of our parameter to published names: none if it has no counterpart, several to be stacked."""


class SafetensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder with one or more safetensors files, by name.

    If there is an index, it says which file holds which tensor; files that it does not name are not read.

    Attributes:
        files: the files that are read.

    Raises:
        ValueError: there are no such files, one is damaged or missing, files and index contradict each other, or
            without an index several files hold the same tensor.
    """

    def __init__(self, folder: Path, pattern: str = "*.safetensors") -> None:
        self._file: dict[str, Path] = {}
        indices = visible(folder, "*.safetensors.index.json")
        if len(indices) > 1:
            raise ValueError(
                f"{folder} has several indices ({', '.join(i.name for i in indices)}): keep only the one of the weights"
                " that you want"
            )
        if indices:
            self._file = _indexed(indices[0])
        else:
            found = visible(folder, pattern)
            _check_numbers(found)
            for path in found:
                with _opened(path) as file:
                    names = list(file.keys())
                if twice := sorted(self._file.keys() & set(names)):
                    raise ValueError(
                        f"{path} and {self._file[twice[0]].name} both hold {_some(twice)}, and no index says which one "
                        "counts; keep the files of one version"
                    )
                self._file |= dict.fromkeys(names, path)
        if not self._file:
            raise ValueError(f"no weights ({pattern}) in {folder}; download all of its files")
        self.files = frozenset(self._file.values())

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._file[name]) as file:
            return file.get_tensor(name).clone()  # a copy, so that closing the file frees its memory

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def _indexed(index: Path) -> dict[str, Path]:
    """Return the file of each tensor by the index, which must agree with the files that it names."""
    folder, shards = index.parent, read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(_is_file_name(file) for file in shards.values()):
        raise ValueError(f"{index} is damaged (its weight_map must give each tensor a file); download it again")
    files = sorted(set(shards.values()))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{folder} is incomplete: {', '.join(absent)} missing; download all of its files")
    single = index.name.removesuffix(".index.json")
    if (folder / single).is_file() and single not in files:
        raise ValueError(f"{folder} has {single} and an index of other files: delete the one that you do not want")
    for file in files:
        with _opened(folder / file) as opened:
            held = set(opened.keys())
        promised = {name for name, shard in shards.items() if shard == file}
        for wrong, says in ((promised - held, "lacks"), (held - promised, "holds")):
            if wrong:
                raise ValueError(
                    f"{folder / file} {says} {_some(sorted(wrong))}, {index.name} says otherwise: they are of "
                    "different versions; download all files again"
                )
    return {name: folder / shard for name, shard in shards.items()}


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _check_numbers(paths: Sequence[Path]) -> None:
    """Check that files named as NAME-00001-of-00003 are all there."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.+)-(\d+)-of-(\d+)", path.stem):
            numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, count), found in numbers.items():
        if absent := sorted(set(range(1, int(count) + 1)) - found):
            raise ValueError(
                f"{paths[0].parent} is incomplete: number {absent[0]} of {int(count)} files {stem}-* is missing; "
                "download all of its files"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping from a JSON file.

    Raises:
        ValueError: the file is missing or damaged, is not a mapping, or has a key twice.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1] if len(set(keys)) < len(keys) else []:
        raise ValueError(f"it has {twice[0]!r} twice")
    return dict(pairs)


def _some(names: Sequence[str]) -> str:
    """Return up to three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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


@dataclass(frozen=True)
class Lora:
    """What an adapter's configuration says about its updates.

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
            raise ValueError(f"the updates of {_some(bare)} are missing (base_layer without lora_A); download it again")
        self._pairs = {name: pair for name, pair in self._pairs.items() if name not in elsewhere}
        if lost := [name for name in (*self._pairs, *self._replaced) if name not in self._names]:
            raise ValueError(
                f"{len(lost)} of {len(self._pairs) + len(self._replaced)} tensors of the adapter fit nothing in its "
                f"base: {_some(lost)}; names of the base are such as {_some(list(self._names)[:1])}; give the base that"
                " the adapter was trained on"
            )
        layers = {name.removesuffix(".weight") for name in {*self._pairs, *elsewhere}}
        layers |= {name.rpartition(".")[0] for name in self._replaced}
        if absent := [t for t in lora.targets if not any(f".{layer}".endswith(f".{t}") for layer in layers)]:
            raise ValueError(f"the adapter has no update of its target_modules {_some(absent)}; download it again")

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
