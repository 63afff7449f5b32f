"""Convert a LeRobotDataset v2.1 to v3 with lerobot's own converter.

The converter works in place, and finds the data set by the name of its folder. We give it a link to the source in a
working folder, so that it does not change or copy the source. One rename puts the result in place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

OLD, NEW = "v2.1", "v3"
STATISTICS = "episodes_stats.jsonl"


def is_old_lerobot(source: Path) -> bool:
    """Return True for the folder of a LeRobotDataset v2.1, False for a folder that is no LeRobotDataset.

    Raises:
        ValueError: a LeRobotDataset of another version; the message says what to do.
    """
    info = source / "meta" / "info.json"
    if not info.is_file():
        return False
    try:
        version = str(json.loads(info.read_text()).get("codebase_version"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{info} is damaged ({error}): download the data set again") from error
    if version.startswith(NEW):
        raise ValueError(f"{source} is a LeRobotDataset {version} already: train on it with data.root={source}")
    if not version.startswith("v2"):
        raise ValueError(f"{source} is a LeRobotDataset {version}: convert it to {OLD} with an old lerobot first")
    if version != OLD or not (source / "meta" / STATISTICS).is_file():
        raise ValueError(
            f"{source} is a LeRobotDataset {version}: lerobot converts only {OLD} with meta/{STATISTICS}. Train on it "
            f"as it is, with data.root={source}"
        )
    return True


def upgrade(source: Path, output: Path) -> Path:
    """Write the data set `source` as v3 to `output`, and return `output`.

    Raises:
        ValueError: `output` exists, or lerobot's converter failed; the message holds the last line of its output.
    """
    from cogvla.lerobot_versions import converter  # here, because importing lerobot takes seconds

    if output.exists():
        raise ValueError(f"{output} exists: choose another output, or delete it")
    work = output.with_name(output.name + ".converting")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "dataset").symlink_to(source.resolve(), target_is_directory=True)
    command = converter(work / "dataset")
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(work)
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"lerobot's converter (python -m {command[2]}) could not convert {source}: {said[0]}")
    os.replace(work / "dataset", output)
    shutil.rmtree(work)
    return output
