"""A LeRobotDataset v2.1 to v3, by lerobot's own converter.

The converter works in place and takes its folder apart by name. It is given a link to the source, which is neither
changed nor copied, in a folder of its own; the result is put in place by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

CONVERTER = "lerobot.datasets.v30.convert_dataset_v21_to_v30"
OLD, NEW = "v2.1", "v3"


def is_old_lerobot(source: Path) -> bool:
    """Whether this is the folder of a LeRobotDataset v2.1; ValueError for other versions, saying what to do."""
    info = source / "meta" / "info.json"
    if not info.is_file():
        return False
    version = str(json.loads(info.read_text()).get("codebase_version"))
    if version.startswith(NEW):
        raise ValueError(f"{source} is a LeRobotDataset {version} already; train on it with data.root={source}")
    if version != OLD:
        raise ValueError(f"{source} is a LeRobotDataset {version}; bring it to {OLD} with a lerobot of its time first")
    return True


def upgrade(source: Path, output: Path) -> Path:
    """Write the v3 of `source` to `output` and return it.

    Raises:
        ValueError: `output` exists, or lerobot cannot convert it; what it says is in the message.
    """
    if output.exists():
        raise ValueError(f"{output} exists; choose another output, or delete it")
    work = output.with_name(output.name + ".converting")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "dataset").symlink_to(source.resolve(), target_is_directory=True)
    command = [sys.executable, "-m", CONVERTER, f"--root={work}", "--repo-id=dataset", "--push-to-hub=false"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(work)
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"lerobot's converter (python -m {CONVERTER}) could not convert {source}: {said[0]}")
    os.replace(work / "dataset", output)
    shutil.rmtree(work)
    return output
