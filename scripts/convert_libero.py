"""`convert_libero`: convert LIBERO's HDF5 demonstrations, or its LeRobotDataset v2.1, to a LeRobotDataset v3.

    convert_libero source=datasets/libero_object
    convert_libero source=datasets/libero_goal replay=actions workers=8 output=/data/libero_goal
    convert_libero source=libero_v21 output=libero_v3

The same command resumes a stopped conversion (`envs/recording/dataset_folder.py`): `OUTPUT.converting/episodes/N.json`
has the result of the N-th demonstration, and `N.npz` its episode if it is kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.files import visible
from cogvla.libero.env import LiberoSettings
from cogvla.libero.hdf5.conversion import CONVERSION, Conversion, convert
from cogvla.libero.hdf5.lerobot_upgrade import is_old_lerobot, upgrade
from cogvla.libero.hdf5.reader import SUFFIX, is_hdf5
from cogvla.scripts import console
from cogvla.scripts.command import plain, usual

LISTED = 8


def main(config: DictConfig) -> None:
    """Convert `config.source`; see configs/convert_libero.yaml."""
    root = run(config)
    record = root / CONVERSION
    for warning in json.loads(record.read_text()).get("warnings", []) if record.is_file() else []:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"data set: {root}")


def run(config: DictConfig) -> Path:
    """Convert `config.source`; return the folder of the data set.

    Raises:
        ValueError: the source does not exist or is of another format, or a setting is wrong.
    """
    source = Path(config.source)
    if not source.exists():
        raise ValueError(f"there is no {source}; LIBERO's demonstrations are downloaded from its project page")
    output = Path(config.output or f"outputs/datasets/{source.stem}_v3")
    if is_old_lerobot(source):
        _check_unused(source, plain(config))
        return upgrade(source, output)
    if not is_hdf5(source):
        raise ValueError(f"{source} holds neither TASK_demo.hdf5 files nor a LeRobotDataset v2.1; {_there(source)}")
    conversion = Conversion.of(
        source,
        config.suite,
        build(LiberoSettings, plain(config.libero), "libero"),
        replay=config.replay,
        image_size=config.image_size,
        keep_noops=config.keep_noops,
    )
    return convert(conversion, output, config.workers, resume=config.resume, video=config.video)


def _check_unused(source: Path, values: dict[str, Any]) -> None:
    """Check that no key is given that only a replay has; ValueError names one."""
    before = usual("convert_libero")
    for key in ("suite", "replay", "image_size", "keep_noops", "video"):
        if values[key] != before[key]:
            raise ValueError(
                f"{key}={values[key]} changes nothing for {source}, a LeRobotDataset, whose frames stay as they are: "
                "leave it out, or give LIBERO's HDF5 files"
            )


def _there(source: Path) -> str:
    """Return in words what is in a folder instead."""
    if source.is_file():
        return "its name must end in .hdf5"
    if below := sorted({path.parent.name for path in visible(source, f"*/*{SUFFIX}")}):
        return f"give one of its folders: {', '.join(below)}"
    return f"it holds {', '.join(path.name for path in visible(source, '*')[:LISTED]) or 'nothing'}"


if __name__ == "__main__":
    console.convert_libero()
