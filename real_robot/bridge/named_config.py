"""Files of `configs/` without Hydra, for programs that get their parameters from elsewhere."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def named_config(group: str, name: str) -> dict[str, Any]:
    """The values of `configs/GROUP/NAME.yaml`, or of the file `name` if it ends in .yaml.

    Raises:
        ValueError: there is no such name (the text lists them), or no mapping in the file.
    """
    folder = resources.files("cogvla.configs") / group
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if name.endswith((".yaml", ".yml")):
        text = Path(name).read_text()
    elif name in names:
        text = (folder / f"{name}.yaml").read_text()
    else:
        raise ValueError(f"{group} {name!r} is neither a YAML file nor one of {', '.join(names)}")
    values = OmegaConf.to_container(OmegaConf.create(text))
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{group} {name!r} holds no mapping")
    return {str(key): value for key, value in values.items()}
