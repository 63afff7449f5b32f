"""The differences between the versions of lerobot that fit: 0.4.4 (Python 3.11) and 0.6 from 0.6.1 (from Python 3.12).

Only this module knows the differences; `tests/test_versions.py` checks that nobody else imports these names.
Importing it takes seconds, because lerobot does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def installed_version() -> str | None:
    """Return the version of the installed lerobot; None: there is none."""
    try:
        return version("lerobot")
    except PackageNotFoundError:
        return None


def is_old(found: str | None) -> bool:
    """Return True for lerobot 0.4.4, False for 0.6.1 to below 0.7.

    Args:
        found: version of lerobot; None: it is not installed.

    Raises:
        ValueError: another version, or none.
    """
    number = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", found or "")
    parts = tuple(int(part or 0) for part in number.groups()) if number else ()
    if parts == (0, 4, 4) or (0, 6, 1) <= parts < (0, 7):
        return parts < (0, 6)
    fits = "lerobot[dataset]>=0.6.1,<0.7" if sys.version_info >= (3, 12) else "lerobot==0.4.4"
    raise ValueError(
        f"lerobot {found or 'is not installed'}{' does not fit' if found else ''}: cogvla works with lerobot 0.4.4 on "
        f"Python 3.11, and with 0.6.1 to below 0.7 on Python 3.12 and newer; here: `uv pip install '{fits}'`"
    )


OLD = is_old(installed_version())

if OLD:
    from lerobot.datasets.utils import DEFAULT_FEATURES, get_hf_features_from_features, load_tasks
else:
    from lerobot.datasets.feature_utils import get_hf_features_from_features
    from lerobot.datasets.io_utils import load_tasks
    from lerobot.utils.constants import DEFAULT_FEATURES

# In the same place in both: imported from here, they come after the check of the version.
from lerobot.datasets.compute_stats import compute_episode_stats  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402
from lerobot.datasets.utils import update_chunk_file_indices  # noqa: E402

__all__ = [
    "DEFAULT_FEATURES",
    "LeRobotDataset",
    "compute_episode_stats",
    "converter",
    "encoding",
    "episode_buffer",
    "frozen_at_the_end",
    "get_hf_features_from_features",
    "load_tasks",
    "update_chunk_file_indices",
]


def encoding(codec: str) -> dict[str, Any]:
    """Return the arguments of `LeRobotDataset.create` that choose the codec of its videos."""
    if OLD:
        return {"vcodec": codec}
    from lerobot.configs.video import RGBEncoderConfig

    return {"rgb_encoder": RGBEncoderConfig(vcodec=codec)}


def episode_buffer(dataset: Any) -> dict[str, Any]:
    """Return the frames that were added to a data set since its last episode: feature -> list of values."""
    buffer: dict[str, Any] = dataset.episode_buffer if OLD else dataset.writer.episode_buffer
    return buffer


def frozen_at_the_end(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a factory of environments that compute nothing between the end of an episode and the next one."""
    if OLD:
        return make
    from lerobot.envs.utils import freeze_after_episode_end

    frozen: Callable[[], Any] = freeze_after_episode_end(make)
    return frozen


def converter(folder: Path) -> list[str]:
    """Return the command that converts the LeRobotDataset v2.1 in a folder to v3, in place."""
    module = "lerobot.datasets.v30.convert_dataset_v21_to_v30" if OLD else "lerobot.scripts.convert_dataset_v21_to_v30"
    root = folder.parent if OLD else folder
    return [sys.executable, "-m", module, f"--root={root}", f"--repo-id={folder.name}", "--push-to-hub=false"]
