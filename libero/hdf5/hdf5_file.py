"""Open an HDF5 file and read its parts; every fault ends in one line with the file, the place in it, and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

BEGINNINGS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the data: run `git lfs pull` in its folder",
    b"<": "is a web page, not the data: its download failed; download it again",
    b"PK": "is a ZIP archive: unpack it",
    b"\x00\x05\x16\x07": "is a hidden file of macOS, not the data: give the file whose name does not begin with `._`",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
}
"""First bytes of what is often found in place of an HDF5 file -> what it is."""
CAUSES = {
    "lock file": "is locked, because another process writes it: wait until that is done",
    "already open": "is being written, or its writer was killed: wait, or run `h5clear -s` on it",
    "truncated file": "is cut off: download or copy it again",
    "signature not found": "is no HDF5 file: download it again",
}
"""Part of a message of HDF5 -> what it means."""
LISTED = 16


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading.

    Raises:
        ValueError: it cannot be opened, or a part of it cannot be read.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError("HDF5 files need h5py: install the extra `libero`") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} {_cause(path, error)}") from error
    with file:
        try:
            yield file
        except (OSError, RuntimeError, KeyError) as error:  # h5py raises all of these for damaged parts
            raise ValueError(f"{path} is damaged ({error}): download or copy it again") from error


def _cause(path: Path, error: OSError) -> str:
    if not path.exists():
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read by this user: change its permissions"
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError as unreadable:
        return f"cannot be read ({unreadable.strerror})"
    if not start:
        return "is empty: download it again"
    for beginning, cause in BEGINNINGS.items():
        if start.startswith(beginning):
            return cause
    known = [cause for part, cause in CAUSES.items() if part in str(error)]
    return known[0] if known else f"is damaged or is no HDF5 file ({error}): download it again"


def contents(group: Any) -> str:
    """Return the names of the data sets in a group, for messages."""
    import h5py

    names: list[str] = []
    group.visititems(lambda name, part: names.append(name) if isinstance(part, h5py.Dataset) else None)
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "") if names else "nothing"


def numbers(group: Any, name: str, width: int | None, where: str) -> np.ndarray:
    """Return the data set `name` of a group as float64 [T,D].

    Args:
        group: group of one demonstration.
        name: name of the data set in the group.
        width: D; None: any.
        where: file and demonstration, for messages.

    Raises:
        ValueError: it is missing, has no numbers or another shape, or holds NaN or infinite values.
    """
    import h5py

    found = group.get(name)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{where} has no data set {name!r}; it has {contents(group)}")
    shape = f"[T,{'D' if width is None else width}]"
    if found.dtype.kind not in "fiu":
        raise ValueError(f"{where}: {name} must hold numbers of shape {shape}, it holds {found.dtype}")
    if found.ndim != 2 or (width is not None and found.shape[1] != width):
        raise ValueError(f"{where}: {name} must have shape {shape}, it has {found.shape}")
    values_TD = np.asarray(found[()], np.float64)
    if not len(values_TD):
        raise ValueError(f"{where}: {name} is empty: delete this demonstration from the file")
    bad = np.flatnonzero(~np.isfinite(values_TD).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{where}: {name} holds NaN or infinite values, first in row {bad[0]}: delete this demonstration from the "
            "file"
        )
    return values_TD


def text(attributes: Any, name: str, where: str) -> str | None:
    """Return a text attribute, or None if it does not exist.

    Raises:
        ValueError: it is no text.
    """
    if name not in attributes:
        return None
    value = attributes[name]
    value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    try:
        value = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        value = None
    if not isinstance(value, str):
        raise ValueError(f"{where}: the attribute {name} must be text")
    return value


def json_object(attributes: Any, name: str, where: str) -> dict[str, Any] | None:
    """Return a text attribute with a JSON object, or None if it does not exist.

    Raises:
        ValueError: it is something else.
    """
    value = text(attributes, name, where)
    if value is None:
        return None
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ValueError(f"{where}: the attribute {name} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: the attribute {name} must be a JSON object, it is {type(found).__name__}")
    return found


def count(attributes: Any, name: str, where: str) -> int | None:
    """Return an attribute with a whole number, or None if it does not exist.

    Raises:
        ValueError: it is something else.
    """
    if name not in attributes:
        return None
    value = np.asarray(attributes[name])
    if value.size != 1 or value.dtype.kind not in "iu":
        raise ValueError(f"{where}: the attribute {name} must be a whole number, it is {attributes[name]!r}")
    return int(value.item())
