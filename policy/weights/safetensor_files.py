"""The tensors of a folder of safetensors files as one mapping; the index decides which file holds which tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
from safetensors import safe_open
from torch import Tensor

from cogvla.files import read_object, visible

AGAIN = "download it again"


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
                        f"{path} and {self._file[twice[0]].name} both hold {some(twice)}, and no index says which one "
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
    folder, shards = index.parent, read_object(index, AGAIN).get("weight_map")
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
                    f"{folder / file} {says} {some(sorted(wrong))}, {index.name} says otherwise: they are of "
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


def some(names: Sequence[str]) -> str:
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
