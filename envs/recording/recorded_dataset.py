"""Read the demonstrations of a data set that `DatasetWriter` wrote with images: the same ones, byte for byte.

Shape legend: T steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cogvla.envs.recording.demonstration import Demonstration, pack_encoded
from cogvla.files import visible
from cogvla.lerobot_versions import DEFAULT_FEATURES, load_tasks


class EditedError(ValueError):
    """Another tool has written the data set anew."""


def recorded_episodes(root: Path) -> Iterator[Demonstration]:
    """Yield the episodes of a data set in order.

    Raises:
        ValueError: the files are damaged, or were edited: by `DatasetWriter`, each row group is an episode.
    """
    try:
        info = json.loads((root / "meta" / "info.json").read_text())
        instructions = {int(row.task_index): str(task) for task, row in load_tasks(root).iterrows()}
        count = 0
        for path in visible(root / "data", "*/*.parquet"):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):  # one for each episode
                table = file.read_row_group(group)
                if set(table["episode_index"].to_pylist()) != {count}:
                    raise EditedError(f"{root} was edited after it was recorded ({path.name} was written anew)")
                yield _episode(table, info, instructions)
                count += 1
        if count != info["total_episodes"]:
            raise ValueError(f"{count} of {info['total_episodes']} episodes are there")
    except EditedError:
        raise
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{root} cannot be read ({type(error).__name__}: {error}): it is damaged") from error


def _episode(table: pa.Table, info: dict[str, Any], instructions: dict[int, str]) -> Demonstration:
    own = {name: feature for name, feature in info["features"].items() if name not in DEFAULT_FEATURES}
    images = {
        name: [value["bytes"] for value in table[name].to_pylist()]
        for name, feature in own.items()
        if feature["dtype"] == "image"
    }
    arrays = {
        name: np.array(table[name].to_pylist(), feature["dtype"]).reshape(len(table), *feature["shape"])
        for name, feature in own.items()
        if name not in images
    }
    return pack_encoded(instructions[table["task_index"][0].as_py()], info["fps"], arrays, images)
