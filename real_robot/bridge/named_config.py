"""Read a file of `configs/` without Hydra, for programs with parameters of their own, such as the ROS 2 node."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def named_config(group: str, name: str) -> dict[str, Any]:
    """Return the values of `configs/GROUP/NAME.yaml`, or of the file `name` if it ends in .yaml or .yml.

    Raises:
        ValueError: there is no such name (the message lists them), or the file holds no mapping.
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
