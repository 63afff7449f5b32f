"""Say what is wrong with a folder that should be a checkpoint, without importing torch, which takes seconds."""

from __future__ import annotations

import re
from pathlib import Path

from cogvla.files import visible

CONFIG, WEIGHTS, STATISTICS = "config.json", "model.safetensors", "statistics.json"
EXPORTED = "exported.json"
"""File that describes the others in the folder of an exported policy (`policy.export`)."""
_PUBLISHED = ("*.safetensors", "*.pt", "*.bin", "checkpoints/*.pt")
_HUB = re.compile(r"(?:https?:/+(?:huggingface|hf)\.co/)?([A-Za-z0-9][\w.-]*/[\w.-]+)/?")


def check_checkpoint_folder(source: Path | str, otherwise: str = "train one with `train_policy`") -> None:
    """Check that all files of a checkpoint are in a folder.

    Args:
        source: the folder that the user gave.
        otherwise: advice for a folder that does not exist.

    Raises:
        ValueError: there is no such folder, or it is no complete checkpoint; the message names `import_checkpoint` for
            published weights.
    """
    folder = Path(source)
    if not folder.is_dir():
        hub = _HUB.fullmatch(str(source))
        imported = f"; for published weights, run `import_checkpoint {hub[1]} output=FOLDER` first" if hub else ""
        raise ValueError(f"no checkpoint folder at {source}; {otherwise}{imported}")
    missing = [name for name in (CONFIG, WEIGHTS, STATISTICS) if not (folder / name).is_file()]
    if not missing:
        return
    said = f"{folder} is not a complete checkpoint: {', '.join(missing)} missing; "
    if (folder / "policy" / CONFIG).is_file():
        raise ValueError(f"{said}give {folder / 'policy'}")
    text = (folder / CONFIG).read_text(errors="replace") if (folder / CONFIG).is_file() else ""
    if '"type"' in text and '"input_features"' in text:
        raise ValueError(
            f"{folder} holds a policy of lerobot: give checkpoint=lerobot:{folder} where a command takes it, or turn a "
            "cogvla policy into a checkpoint with `convert_checkpoint`"
        )
    if '"embodiment"' not in text and STATISTICS in missing and any(visible(folder, pattern) for pattern in _PUBLISHED):
        raise ValueError(f"{said}these are published weights: run `import_checkpoint {folder} output=FOLDER` first")
    raise ValueError(f"{said}give the folder of another one")


def is_exported(source: str) -> bool:
    """Return whether a source names an exported policy: its folder, or one of its files."""
    return Path(source).suffix in (".onnx", ".xml", ".pt2") or (Path(source) / EXPORTED).is_file()
