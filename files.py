"""Write files so that a crash or a full disk leaves the old content, and list the files of a folder."""

from __future__ import annotations

import os
from pathlib import Path


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


def visible(folder: Path, pattern: str) -> list[Path]:
    """List the paths in a folder that fit a glob pattern, sorted, without hidden files and those in hidden folders.

    macOS writes hidden files beside the data: `._NAME` for each NAME on other file systems, and `.DS_Store`.
    """
    found = folder.glob(pattern)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def is_left_by_macos(path: Path) -> bool:
    """Return True for the hidden files that macOS writes by itself into any folder that it shows."""
    return path.name == ".DS_Store" or path.name.startswith("._")
