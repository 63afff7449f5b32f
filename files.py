"""Write files so that a crash or a full disk leaves the old content, hash them, read JSON files, list a folder."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it always has either its old or its new content, even after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class KeyTwiceError(ValueError):
    """A mapping in a file has a key twice, of which most readers keep the last."""


def unique(pairs: Sequence[tuple[Hashable, Any]]) -> dict[Any, Any]:
    """Return the mapping of these pairs; for the `object_pairs_hook` of `json`.

    Raises:
        KeyTwiceError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise KeyTwiceError(f"the key {twice!r} twice; keep one of them")
    return found


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON file with an object.

    Args:
        path: the file.
        advice: what the user can do if it is damaged, the end of the message.

    Raises:
        ValueError: it is missing or damaged, holds something else, or has a key twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)  # as Windows may write it
    except KeyTwiceError as error:
        raise ValueError(f"{path} has {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it is not a JSON object); {advice}")
    return content


def visible(folder: Path, pattern: str) -> list[Path]:
    """List the paths in a folder that fit a glob pattern, sorted, without hidden files and those in hidden folders.

    macOS writes hidden files beside the data: `._NAME` for each NAME on other file systems, and `.DS_Store`.
    """
    # unlike Path.glob, glob follows links to folders, such as videos on another disk
    return sorted(folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True))


def is_left_by_macos(path: Path) -> bool:
    """Return True for the hidden files that macOS writes by itself into any folder that it shows."""
    return path.name == ".DS_Store" or path.name.startswith("._")
