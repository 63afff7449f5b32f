"""Load models and tokenizers of transformers from a hub id, a folder or a GGUF file, with errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GGUF = ".gguf"


def load_pretrained(auto: Any, source: str | Path, **options: Any) -> Any:
    """Call `auto.from_pretrained` for a source, without code from it.

    Args:
        auto: a class of transformers, such as `AutoModel`.
        source: hub id, folder in the format of transformers, GGUF file, or folder with one GGUF file.
        options: options of `from_pretrained`.

    Raises:
        ValueError: there is no such source, or it cannot be loaded.
    """
    name, file = _located(str(source))
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **file, **options)
    except Exception as error:  # damaged files make the libraries raise almost anything
        raise ValueError(_problem(str(source), error)) from error


def _located(source: str) -> tuple[str, dict[str, str]]:
    """Return the arguments of `from_pretrained` that say where a source is."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != GGUF:
            raise ValueError(f"{source} is a file; give the folder of the model, a {GGUF} file or a hub id")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        files = sorted(file.name for file in path.glob(f"*{GGUF}"))
        if (path / "config.json").exists() or not files:
            return str(path), {}
        if len(files) > 1:
            raise ValueError(f"{source} has several {GGUF} files, {', '.join(files[:3])}; give one of them")
        return str(path), {"gguf_file": files[0]}
    if path.suffix == GGUF or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ValueError(f"there is no file or folder {source}")
    return source, {}


def _problem(source: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, ImportError) and "gguf" in said.lower():
        return f"{source} needs the package gguf: `uv pip install gguf`"
    cause = f"({type(error).__name__}: {said.partition('. ')[0][:200]})"
    if isinstance(error, OSError) and not Path(source).expanduser().exists():
        return (
            f"there is no folder {source}, and no such model on the Hugging Face hub or in its cache {cause}: correct "
            f"the name; without a connection, give a folder or a {GGUF} file, or run `hf download {source}` before"
        )
    return f"cannot load {source} {cause}: get it again, or choose a model that transformers can read"
